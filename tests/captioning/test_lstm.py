"""The LSTM over packed captions is torch's."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from capexp.captioning import lstm

E, H = 5, 7
LENGTHS = [6, 6, 4, 1]
COUNTS = [4, 3, 3, 3, 2, 2]


def of_torch(layer: nn.LSTM, padded: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    packed = pack_padded_sequence(padded, torch.tensor(LENGTHS))
    assert packed.batch_sizes.tolist() == COUNTS
    outputs, (hidden, cell) = layer(packed, (hidden.unsqueeze(0), cell.unsqueeze(0)))
    return outputs.data, hidden[0], cell[0]


def test_outputs_states_and_all_gradients_are_torchs() -> None:
    torch.manual_seed(0)
    layer = nn.LSTM(E, H)
    padded = torch.randn(max(LENGTHS), len(LENGTHS), E)
    starts = [torch.randn(len(LENGTHS), H, requires_grad=True) for _ in range(2)]
    found = []
    for ours in (False, True):
        read = padded.clone().requires_grad_()
        if ours:
            words = pack_padded_sequence(read, torch.tensor(LENGTHS)).data
            values = lstm.run(layer, words, COUNTS, *starts)
        else:
            values = of_torch(layer, read, *starts)
        # Every value weighs otherwise, those of the last states too.
        loss = torch.stack([(value * torch.arange(value.numel()).view_as(value).cos()).sum() for value in values]).sum()
        found.append((*values, *torch.autograd.grad(loss, [read, *starts, *layer.parameters()])))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_gradients_are_those_of_differences() -> None:
    torch.manual_seed(0)
    weight = torch.randn(4 * H, H, requires_grad=True)
    values = [torch.randn(sum(COUNTS), 4 * H), torch.randn(len(LENGTHS), H), torch.randn(len(LENGTHS), H)]
    gates, hidden, cell = (value.requires_grad_() for value in values)

    def loss() -> Tensor:
        outputs, cells = lstm._Lstm.apply(gates, weight, hidden, cell, tuple(COUNTS))
        total: Tensor = outputs.sin().sum() + cells.cos().sum()
        return total

    for value in (gates, weight, hidden, cell):
        (gradient,) = torch.autograd.grad(loss(), [value])
        place = int(gradient.abs().argmax())
        with torch.no_grad():
            flat, before = value.view(-1), value.view(-1)[place].clone()
            flat[place] = before + 1e-2
            above = loss()
            flat[place] = before - 1e-2
            below = loss()
            flat[place] = before
        assert gradient.view(-1)[place].item() == pytest.approx((above - below).item() / 2e-2, rel=1e-2)


def test_no_step_is_of_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many rows pass the recurrent product as there are words."""
    rows: list[int] = []
    addmm = torch.addmm

    def counted(gates: Tensor, hidden: Tensor, weight: Tensor, *, out: Tensor) -> Tensor:
        rows.append(len(hidden))
        return addmm(gates, hidden, weight, out=out)

    monkeypatch.setattr(torch, "addmm", counted)
    zeros = torch.zeros(len(LENGTHS), H)
    lstm.run(nn.LSTM(E, H), torch.randn(sum(LENGTHS), E), COUNTS, zeros, zeros)
    assert rows == COUNTS
