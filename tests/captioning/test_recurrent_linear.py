"""A layer over steps is the layer, and so are its gradients."""

import pytest
import torch
from torch import Tensor

from capexp.captioning.recurrent_linear import RecurrentLinear


def run(layer: RecurrentLinear, start: Tensor, over_steps: bool) -> Tensor:
    """What comes of three steps, each of fewer rows."""
    apply = layer.over_steps() if over_steps else layer
    values, ended = start, []
    for rows in (5, 3, 1):
        ended.append(values[rows:].sum())
        values = torch.tanh(apply(values[:rows]))
    return values.sum() + torch.stack(ended).cos().sum()


@pytest.mark.parametrize("bias", [True, False])
def test_over_steps_values_and_gradients_are_the_same(bias: bool) -> None:
    torch.manual_seed(0)
    layer, start = RecurrentLinear(4, 4, bias=bias), torch.randn(6, 4, requires_grad=True)
    found = []
    for over_steps in (False, True):
        loss = run(layer, start, over_steps)
        found.append([loss, *torch.autograd.grad(loss, [start, *layer.parameters()])])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_the_weights_gradient_is_one_product_for_all_steps() -> None:
    layer, start = RecurrentLinear(4, 4), torch.randn(6, 4)
    loss = run(layer, start, over_steps=True)
    with torch.profiler.profile() as profile:
        torch.autograd.backward(loss)
    # One for the inputs of each step, and one for the weight.
    assert sum(event.count for event in profile.key_averages() if event.key == "aten::mm") == 3 + 1


def test_in_bfloat16_it_is_the_layer_of_the_autocast() -> None:
    torch.manual_seed(0)
    layer, start = RecurrentLinear(4, 4), torch.randn(6, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.over_steps()(start), layer(start))
        loss = run(layer, start, over_steps=True)
    torch.autograd.backward(loss)
    assert layer.weight.grad is not None and layer.weight.grad.dtype == torch.float32


def test_without_gradients_it_is_the_layer_itself() -> None:
    layer = RecurrentLinear(4, 4)
    with torch.inference_mode():
        assert layer.over_steps() is layer
