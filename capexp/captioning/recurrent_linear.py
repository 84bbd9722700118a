"""A linear layer for use in a loop over steps, whose weight gradient is computed once for all steps.

Autograd would compute it step by step: at each step a matrix product with few rows, and a sum as large as the weight.

Shapes: B rows of one step, M rows of all steps, I inputs, O outputs.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class RecurrentLinear(nn.Linear):
    """A linear layer; :meth:`over_steps` returns the function to call in a loop."""

    def over_steps(self) -> Callable[[Tensor], Tensor]:
        """Return a function from ``(B, I)`` to ``(B, O)``, for all steps of one forward pass.

        It computes in the precision of autocast, if autocast is on.
        """
        if not torch.is_grad_enabled():
            return self
        kind = self.weight.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.weight.dtype
        weight = self.weight.detach().to(dtype)
        bias = None if self.bias is None else self.bias.detach().to(dtype)
        steps: _Steps = []
        handle = _Weight.apply(self.weight, self.bias, steps)
        return lambda values: _Step.apply(values.to(dtype), handle, weight, bias, steps)


_Steps = list[tuple[Tensor, Tensor]]  # for each step, the inputs (B, I) and the gradient of the outputs (B, O)


class _Weight(torch.autograd.Function):
    """Placed before the loop, so that its backward runs last, when the gradients of all steps are known.

    The steps depend on it through its empty output, the handle.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, bias: Tensor | None, steps: _Steps) -> Tensor:
        ctx.steps, ctx.dtype, ctx.has_bias = steps, weight.dtype, bias is not None
        return weight.new_empty(0)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> Any:
        inputs, gradients = (torch.cat(values) for values in zip(*ctx.steps, strict=True))  # (M, I), (M, O)
        ctx.steps.clear()
        grad_bias = gradients.sum(0, dtype=ctx.dtype) if ctx.has_bias else None
        return (gradients.t() @ inputs).to(ctx.dtype), grad_bias, None


class _Step(torch.autograd.Function):
    """One step of the loop. Its backward gives the gradient of the inputs, and records what ``_Weight`` needs."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, handle: Tensor, weight: Tensor, bias: Tensor | None, steps: _Steps) -> Tensor:
        ctx.save_for_backward(values, weight)
        ctx.steps = steps
        return nn.functional.linear(values, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        values, weight = ctx.saved_tensors
        ctx.steps.append((values, gradient))
        return gradient @ weight, gradient.new_empty(0), None, None, None
