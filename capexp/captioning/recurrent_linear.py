"""A linear layer that a loop applies step after step, whose weight is differentiated once for all steps.

Autograd differentiates it step by step: as many products as there are steps, each of few rows, and as many sums as
large as the weight.

Shapes: B rows of one step, M rows of all steps, I inputs, O outputs.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class RecurrentLinear(nn.Linear):
    """A linear layer; for a loop, see :meth:`over_steps`."""

    def over_steps(self) -> Callable[[Tensor], Tensor]:
        """The layer for the steps of one forward pass: from ``(B, I)`` to ``(B, O)``, in the autocast's precision."""
        if not torch.is_grad_enabled():
            return self
        kind = self.weight.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.weight.dtype
        weight = self.weight.detach().to(dtype)
        bias = None if self.bias is None else self.bias.detach().to(dtype)
        steps: _Steps = []
        handle = _Weight.apply(self.weight, self.bias, steps)
        return lambda values: _Step.apply(values.to(dtype), handle, weight, bias, steps)


_Steps = list[tuple[Tensor, Tensor]]  # each step's inputs (B, I), and its outputs' gradient (B, O)


class _Weight(torch.autograd.Function):
    """Stands before all steps, so that backwards it comes after them."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, bias: Tensor | None, steps: _Steps) -> Tensor:
        ctx.steps, ctx.dtype, ctx.biased = steps, weight.dtype, bias is not None
        return weight.new_empty(0)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> Any:
        inputs, gradients = (torch.cat(values) for values in zip(*ctx.steps, strict=True))  # (M, I), (M, O)
        ctx.steps.clear()
        of_bias = gradients.sum(0, dtype=ctx.dtype) if ctx.biased else None
        return (gradients.t() @ inputs).to(ctx.dtype), of_bias, None


class _Step(torch.autograd.Function):
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
