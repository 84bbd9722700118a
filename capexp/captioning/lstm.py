"""An LSTM over captions of unlike length, word after word, without a step of padding.

Torch's own takes a padded batch on a CPU, and most steps of Flickr8k's captions would be padding.

Shapes: B captions, the longest first; M words, the first of each caption, then the second of those that have one, and
so on; H hidden, 4H gates: input, forget, cell and output, torch's order.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence


def read(
    lstm: nn.LSTM, embedded: Tensor, counts: Sequence[int], hidden: Tensor, cell: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Reads embedded words ``(M, E)``, ``counts[t]`` captions a t-th one, from hidden and cell ``(B, H)``.

    Gives the outputs ``(M, H)``, and hidden and cell where each caption ended. ``lstm`` has one layer, one direction.
    """
    if embedded.device.type != "cpu" and counts[0] == counts[-1]:
        stepwise = embedded.view(len(counts), counts[0], -1)
        outputs, (hidden, cell) = lstm(stepwise, (hidden.unsqueeze(0), cell.unsqueeze(0)))
        return outputs.flatten(0, 1), hidden[0], cell[0]
    if embedded.device.type != "cpu":
        packed = PackedSequence(embedded, torch.tensor(counts))
        outputs, (hidden, cell) = lstm(packed, (hidden.unsqueeze(0), cell.unsqueeze(0)))
        return outputs.data, hidden[0], cell[0]
    weights = dict(lstm.named_parameters())
    gates = nn.functional.linear(embedded, weights["weight_ih_l0"], weights["bias_ih_l0"] + weights["bias_hh_l0"])
    outputs, cells = _Lstm.apply(gates, weights["weight_hh_l0"], hidden, cell, tuple(counts))
    return outputs, ends(outputs, counts), ends(cells, counts)


def ends(values: Tensor, counts: Sequence[int]) -> Tensor:
    """Of values ``(M, ...)`` those of each caption's last word: ``(B, ...)``."""
    starts = accumulate(counts, initial=0)
    parts = [
        values[start + after : start + count]
        for start, count, after in zip(starts, counts, [*counts[1:], 0], strict=False)
    ]
    return torch.cat(parts[::-1])


class _Lstm(torch.autograd.Function):
    """The steps of an LSTM, from the part of its gates that is known beforehand: outputs and cells, ``(M, H)`` each.

    The products of matrices are in the gates' precision, all else is in float32. Hochreiter and Schmidhuber, 1997, with
    a forget gate. Weights are differentiated in one product for all steps.
    """

    @staticmethod
    def forward(ctx: Any, gates: Tensor, weight: Tensor, hidden: Tensor, cell: Tensor, counts: tuple[int, ...]) -> Any:
        dtype, size = gates.dtype, weight.shape[1]
        recurrent = weight.to(dtype).t()  # (H, 4H)
        active = gates.new_empty(gates.shape, dtype=torch.float32)  # (M, 4H) the gates, after their functions
        outputs = gates.new_empty(len(gates), size, dtype=torch.float32)
        cells, squashed = torch.empty_like(outputs), torch.empty_like(outputs)
        h, c = hidden.float(), cell.float()
        for start, count in zip(accumulate(counts, initial=0), counts, strict=False):
            here = slice(start, start + count)
            a = active[here]
            if dtype == torch.float32:
                torch.addmm(gates[here], h[:count], recurrent, out=a)
            else:
                a.copy_(torch.addmm(gates[here], h[:count].to(dtype), recurrent))
            enter, keep, new, leave = a.chunk(4, 1)
            a[:, : 2 * size].sigmoid_()
            new.tanh_()
            leave.sigmoid_()
            c = torch.mul(keep, c[:count], out=cells[here]).addcmul_(enter, new)
            h = torch.mul(leave, torch.tanh(c, out=squashed[here]), out=outputs[here])
        ctx.save_for_backward(weight, hidden, cell, active, outputs, cells, squashed)
        ctx.counts, ctx.dtype = counts, dtype
        ctx.set_materialize_grads(False)
        return outputs, cells

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        weight, hidden, cell, active, outputs, cells, squashed = ctx.saved_tensors
        counts, dtype = ctx.counts, ctx.dtype
        of_outputs, of_cells = gradients
        starts = list(accumulate(counts, initial=0))
        recurrent = weight.to(dtype)  # (4H, H)
        # Of each gate, and of the cell: what its gradient is a multiple of, for all steps at once. Of a sigmoid that is
        # s (1 - s), of a hyperbolic tangent 1 - t^2.
        enter, keep, new, leave = active.chunk(4, 1)
        factors = torch.empty_like(active)
        f_enter, f_keep, f_new, f_leave = factors.chunk(4, 1)
        torch.mul(new, enter, out=f_enter).mul_(1 - enter)
        torch.mul(_before(cells, cell, counts, starts), keep, out=f_keep).mul_(1 - keep)
        torch.mul(enter, 1 - new * new, out=f_new)
        torch.mul(squashed, leave, out=f_leave).mul_(1 - leave)
        passed = leave * (1 - squashed * squashed)
        of_gates = torch.empty_like(active)
        dh, dc = torch.zeros_like(hidden, dtype=torch.float32), torch.zeros_like(cell, dtype=torch.float32)
        three = factors.view(len(factors), 4, -1)[:, :3]
        of_three = of_gates.view(len(factors), 4, -1)[:, :3]
        of_leave = of_gates.chunk(4, 1)[3]
        for step in reversed(range(len(counts))):
            here = slice(starts[step], starts[step + 1])
            h, c = dh[: counts[step]], dc[: counts[step]]
            if of_outputs is not None:
                h.add_(of_outputs[here])
            if of_cells is not None:
                c.add_(of_cells[here])
            c.addcmul_(h, passed[here])
            torch.mul(h, f_leave[here], out=of_leave[here])
            torch.mul(c.unsqueeze(1), three[here], out=of_three[here])
            c.mul_(keep[here])
            if dtype == torch.float32:
                torch.mm(of_gates[here], recurrent, out=h)
            else:
                h.copy_(of_gates[here].to(dtype) @ recurrent)
        of_gates = of_gates.to(dtype)
        of_weight = (of_gates.t() @ _before(outputs, hidden, counts, starts).to(dtype)).to(weight.dtype)
        return of_gates, of_weight, dh.to(hidden.dtype), dc.to(cell.dtype), None


def _before(values: Tensor, first: Tensor, counts: Sequence[int], starts: Sequence[int]) -> Tensor:
    """Of values after each word, ``(M, H)``, and those before the first ones, ``(B, H)``: what was before each word."""
    earlier = [first.float(), *(values[start:] for start in starts[:-2])]
    return torch.cat([part[:count] for part, count in zip(earlier, counts, strict=True)])
