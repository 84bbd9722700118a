"""Dropout by bytes is dropout."""

import pytest
import torch
from torch import nn

from capexp.captioning.dropout import Dropout


@pytest.mark.parametrize("p", [0.1, 0.25, 0.5, 0.9])
def test_values_are_dropped_as_often_as_asked_and_their_sum_is_kept(p: float) -> None:
    torch.manual_seed(0)
    size = 400_003  # no multiple of eight
    dropped = Dropout(p)(torch.ones(size))
    share = round(p * 256) / 256
    assert abs(share - p) <= 1 / 512
    assert (dropped == 0).float().mean().item() == pytest.approx(share, abs=5 * (p * (1 - p) / size) ** 0.5)
    assert dropped.unique().tolist() == pytest.approx([0, 1 / (1 - share)])
    assert dropped.mean().item() == pytest.approx(1, abs=0.02)


def test_no_value_tells_of_another() -> None:
    torch.manual_seed(0)
    kept = (Dropout(0.5)(torch.ones(100_000)) > 0).float() - 0.5
    for apart in (1, 7, 8, 64):
        assert abs((kept[apart:] * kept[:-apart]).mean().item()) < 5 * 0.25 / 100_000**0.5


def test_the_gradient_passes_where_the_value_did() -> None:
    values = torch.rand(10, 20, requires_grad=True)
    dropped = Dropout(0.5)(values)
    dropped.sum().backward()
    assert values.grad is not None
    assert torch.equal(values.grad, (dropped != 0) * 2.0)


def test_the_same_seed_drops_the_same_and_evaluation_nothing() -> None:
    layer, values = Dropout(0.5), torch.rand(50)
    masks = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        masks.append(layer(values))
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])
    assert torch.equal(layer.eval()(values), values)
    assert isinstance(layer, nn.Dropout)  # by which training without it finds it
