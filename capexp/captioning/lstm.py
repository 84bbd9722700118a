"""An LSTM over a packed batch, without any work on padding.

Torch's own LSTM needs a padded batch on a CPU, where most steps of Flickr8k's captions would be padding.

Shapes: B captions, the longest first; M words: the first of each caption, then the second of those that have one, and
so on; E embedding; H hidden; 4H gates in torch's order: input, forget, cell (candidate), output.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence


def run(
    lstm: nn.LSTM, embedded: Tensor, counts: Sequence[int], hidden: Tensor, cell: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Run an LSTM of one layer and one direction over a packed batch of embedded words ``(M, E)``.

    ``counts[t]`` captions have a t-th word; ``hidden`` and ``cell`` ``(B, H)`` are the initial state. Return the
    outputs ``(M, H)``, and the hidden and cell state ``(B, H)`` after each caption's last word.
    """
    # On a GPU, torch's own LSTM: over a dense batch where all captions are equally long, else over a packed one.
    if embedded.device.type != "cpu" and counts[0] == counts[-1]:
        by_step = embedded.view(len(counts), counts[0], -1)
        outputs, (hidden, cell) = lstm(by_step, (hidden.unsqueeze(0), cell.unsqueeze(0)))
        return outputs.flatten(0, 1), hidden[0], cell[0]
    if embedded.device.type != "cpu":
        packed = PackedSequence(embedded, torch.tensor(counts))
        outputs, (hidden, cell) = lstm(packed, (hidden.unsqueeze(0), cell.unsqueeze(0)))
        return outputs.data, hidden[0], cell[0]
    # On a CPU, the loop over steps below.
    weights = dict(lstm.named_parameters())
    gates = nn.functional.linear(embedded, weights["weight_ih_l0"], weights["bias_ih_l0"] + weights["bias_hh_l0"])
    outputs, cells = _Lstm.apply(gates, weights["weight_hh_l0"], hidden, cell, tuple(counts))
    return outputs, last_of_each(outputs, counts), last_of_each(cells, counts)


def last_of_each(values: Tensor, counts: Sequence[int]) -> Tensor:
    """Return the values at each caption's last word, ``(B, ...)``, from packed values ``(M, ...)``."""
    starts = accumulate(counts, initial=0)
    parts = [
        values[start + next_count : start + count]
        for start, count, next_count in zip(starts, counts, [*counts[1:], 0], strict=False)
    ]
    return torch.cat(parts[::-1])


class _Lstm(torch.autograd.Function):
    """The recurrent part of an LSTM (Hochreiter and Schmidhuber, 1997, with a forget gate).

    ``gates`` ``(M, 4H)`` is the part of the gates that does not depend on earlier steps. Returns outputs and cells,
    ``(M, H)`` each. Matrix products are in the precision of ``gates``, everything else is in float32. The gradient of
    the recurrent weight is one matrix product over all steps.
    """

    @staticmethod
    def forward(ctx: Any, gates: Tensor, weight: Tensor, hidden: Tensor, cell: Tensor, counts: tuple[int, ...]) -> Any:
        dtype, size = gates.dtype, weight.shape[1]
        recurrent = weight.to(dtype).t()  # (H, 4H)
        active = gates.new_empty(gates.shape, dtype=torch.float32)  # (M, 4H): the gates after their activations
        outputs = gates.new_empty(len(gates), size, dtype=torch.float32)
        cells, tanh_cells = torch.empty_like(outputs), torch.empty_like(outputs)
        h, c = hidden.float(), cell.float()
        for start, count in zip(accumulate(counts, initial=0), counts, strict=False):
            rows = slice(start, start + count)
            a = active[rows]
            if dtype == torch.float32:
                torch.addmm(gates[rows], h[:count], recurrent, out=a)
            else:
                a.copy_(torch.addmm(gates[rows], h[:count].to(dtype), recurrent))
            input_gate, forget_gate, candidate, output_gate = a.chunk(4, 1)
            a[:, : 2 * size].sigmoid_()
            candidate.tanh_()
            output_gate.sigmoid_()
            c = torch.mul(forget_gate, c[:count], out=cells[rows]).addcmul_(input_gate, candidate)
            h = torch.mul(output_gate, torch.tanh(c, out=tanh_cells[rows]), out=outputs[rows])
        ctx.save_for_backward(weight, hidden, cell, active, outputs, cells, tanh_cells)
        ctx.counts, ctx.dtype = counts, dtype
        ctx.set_materialize_grads(False)
        return outputs, cells

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        weight, hidden, cell, active, outputs, cells, tanh_cells = ctx.saved_tensors
        counts, dtype = ctx.counts, ctx.dtype
        grad_outputs, grad_cells = gradients
        starts = list(accumulate(counts, initial=0))
        recurrent = weight.to(dtype)  # (4H, H)
        # For all steps at once: the factor that turns the gradient of cell or output into the gradient of each gate
        # before its activation. The derivative of a sigmoid s is s (1 - s), that of a tanh t is 1 - t^2.
        input_gate, forget_gate, candidate, output_gate = active.chunk(4, 1)
        factors = torch.empty_like(active)
        input_factor, forget_factor, candidate_factor, output_factor = factors.chunk(4, 1)
        torch.mul(candidate, input_gate, out=input_factor).mul_(1 - input_gate)
        torch.mul(_previous(cells, cell, counts, starts), forget_gate, out=forget_factor).mul_(1 - forget_gate)
        torch.mul(input_gate, 1 - candidate * candidate, out=candidate_factor)
        torch.mul(tanh_cells, output_gate, out=output_factor).mul_(1 - output_gate)
        cell_factor = output_gate * (1 - tanh_cells * tanh_cells)  # turns the output's gradient into the cell's
        grad_gates = torch.empty_like(active)
        dh, dc = torch.zeros_like(hidden, dtype=torch.float32), torch.zeros_like(cell, dtype=torch.float32)
        # The first three gates act on the cell, the output gate on the output.
        cell_gate_factors = factors.view(len(factors), 4, -1)[:, :3]
        grad_cell_gates = grad_gates.view(len(factors), 4, -1)[:, :3]
        grad_output_gate = grad_gates.chunk(4, 1)[3]
        # Backpropagation through time; dh and dc are the gradients of the state after the step.
        for step in reversed(range(len(counts))):
            rows = slice(starts[step], starts[step + 1])
            h, c = dh[: counts[step]], dc[: counts[step]]
            if grad_outputs is not None:
                h.add_(grad_outputs[rows])
            if grad_cells is not None:
                c.add_(grad_cells[rows])
            c.addcmul_(h, cell_factor[rows])
            torch.mul(h, output_factor[rows], out=grad_output_gate[rows])
            torch.mul(c.unsqueeze(1), cell_gate_factors[rows], out=grad_cell_gates[rows])
            c.mul_(forget_gate[rows])
            if dtype == torch.float32:
                torch.mm(grad_gates[rows], recurrent, out=h)
            else:
                h.copy_(grad_gates[rows].to(dtype) @ recurrent)
        grad_gates = grad_gates.to(dtype)
        grad_weight = (grad_gates.t() @ _previous(outputs, hidden, counts, starts).to(dtype)).to(weight.dtype)
        return grad_gates, grad_weight, dh.to(hidden.dtype), dc.to(cell.dtype), None


def _previous(values: Tensor, first: Tensor, counts: Sequence[int], starts: Sequence[int]) -> Tensor:
    """Return the value before each word, ``(M, H)``.

    ``values`` ``(M, H)`` are the values after each word, ``first`` ``(B, H)`` the values before the first words.
    """
    earlier = [first.float(), *(values[start:] for start in starts[:-2])]
    return torch.cat([part[:count] for part, count in zip(earlier, counts, strict=True)])
