"""The cost of targets without their logits is the cross-entropy of the logits."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from capexp.captioning import vocabulary_layer
from capexp.captioning.vocabulary_layer import VocabularyLayer

M, H, V = 39, 6, 40


def some(scale: float = 1.0) -> tuple[VocabularyLayer, Tensor, Tensor]:
    torch.manual_seed(0)
    layer = VocabularyLayer(H, V)
    nn.init.normal_(layer.weight, std=scale)
    nn.init.normal_(layer.bias)
    return layer, torch.randn(M, H, requires_grad=True), torch.randint(V, (M,))


def gradients(loss: Tensor, layer: VocabularyLayer, outputs: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [outputs, layer.weight, layer.bias]))


@pytest.fixture(params=[2**23, 16 * V, 1], ids=["at once", "in parts", "less than a part"])
def at_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary_layer, "_CHUNK_LOGITS", request.param)


@pytest.fixture(params=[True, False], ids=["by word", "by output"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU, and as on a GPU."""
    monkeypatch.setattr(vocabulary_layer, "_is_by_word", lambda device: request.param)


@pytest.mark.usefixtures("at_once", "way")
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.7])
@pytest.mark.parametrize("scale", [0.1, 1.0, 100.0])
def test_losses_and_gradients_are_those_of_the_logits(smoothing: float, scale: float) -> None:
    layer, outputs, targets = some(scale)
    nats, minimised = layer.cross_entropy(outputs, targets, smoothing)
    logits = layer(outputs)
    expected = nn.functional.cross_entropy(logits, targets, label_smoothing=smoothing)
    torch.testing.assert_close(nats, nn.functional.cross_entropy(logits, targets))
    torch.testing.assert_close(minimised, expected)
    assert not nats.requires_grad
    found = gradients(3 * minimised, layer, outputs)
    for ours, torchs in zip(found, gradients(3 * expected, layer, outputs), strict=True):
        torch.testing.assert_close(ours, torchs, rtol=1e-4, atol=1e-6 * max(scale, 1))


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("small", [40.0, 0.0], ids=["small logits", "any logits"])
def test_in_bfloat16_losses_and_gradients_are_near(small: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary_layer, "_SMALL", small)
    layer, outputs, targets = some(0.3)
    nats, minimised = layer.cross_entropy(outputs, targets, 0.1)
    with torch.autocast("cpu", torch.bfloat16):
        near, minimised_near = layer.cross_entropy(outputs, targets, 0.1)
    assert near.dtype == torch.float32
    assert near.item() == pytest.approx(nats.item(), rel=2e-3)
    exact, close = gradients(minimised, layer, outputs), gradients(minimised_near, layer, outputs)
    for one, other in zip(exact, close, strict=True):
        assert not torch.equal(one, other)
        assert (one - other).norm() < 0.01 * one.norm()


@pytest.mark.usefixtures("at_once", "way")
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_targets_that_are_not_real_count_for_nothing(smoothing: float) -> None:
    layer, outputs, targets = some()
    real = torch.rand(M) < 0.6
    real[16:32] = False  # a whole part
    masked, kept = (
        layer.cross_entropy(*arguments)
        for arguments in ((outputs, targets, smoothing, real), (outputs[real], targets[real], smoothing))
    )
    torch.testing.assert_close(masked, kept)
    pairs = zip(gradients(masked[1], layer, outputs), gradients(kept[1], layer, outputs), strict=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("at_once", "way")
@pytest.mark.parametrize("scale", [0.1, 100.0])
def test_weights_and_forbidden_entries_give_the_policy_loss_of_the_logits(scale: float) -> None:
    layer, outputs, targets = some(scale)
    forbidden, weights, real = torch.tensor([0, 3]), torch.randn(M), torch.rand(M) < 0.6
    targets = targets.where(~torch.isin(targets, forbidden), 1).where(real, 0)
    nats, minimised = layer.cross_entropy(outputs, targets, 0.0, real, weights, forbidden)
    logits = layer(outputs).index_fill(1, forbidden, -torch.inf)
    costs = nn.functional.cross_entropy(logits[real], targets[real], reduction="none")
    expected = (costs * weights[real]).mean()
    torch.testing.assert_close(nats, costs.mean())
    torch.testing.assert_close(minimised, expected)
    found = gradients(minimised, layer, outputs)
    for ours, torchs in zip(found, gradients(expected, layer, outputs), strict=True):
        torch.testing.assert_close(ours, torchs, rtol=1e-4, atol=1e-6 * max(scale, 1))
    _, nothing = layer.cross_entropy(outputs, targets, 0.0, real, torch.zeros(M), forbidden)
    assert all(not gradient.any() for gradient in gradients(nothing, layer, outputs))


@pytest.mark.usefixtures("way")
def test_in_bfloat16_words_as_frequent_as_people_use_them_are_learnt_alike() -> None:
    torch.manual_seed(0)
    words, count = 7579, 300
    layer = VocabularyLayer(64, words)
    with torch.no_grad():
        layer.bias.copy_(-torch.arange(1.0, words + 1).log())
    outputs, targets = torch.randn(count, 64, requires_grad=True), torch.randint(words, (count,))
    exact = gradients(layer.cross_entropy(outputs, targets)[1], layer, outputs)
    with torch.autocast("cpu", torch.bfloat16):
        near = gradients(layer.cross_entropy(outputs, targets)[1], layer, outputs)
    for one, other in zip(exact, near, strict=True):
        assert (one - other).norm() < 0.006 * one.norm()
    assert abs(float(near[2].sum())) < 3e-4, "what one word gains others lose"


def test_each_target_passes_the_layer_once_and_three_products_are_all() -> None:
    """Logits, the outputs' gradient and the weight's: as many multiplications as the arithmetic needs, none again."""
    layer, outputs, targets = some()
    one = 2 * M * H * V
    with FlopCounterMode(display=False) as training:
        gradients(layer.cross_entropy(outputs, targets, 0.1)[1], layer, outputs)
    padded = -(-M // 16) * 16 / M
    assert training.get_total_flops() <= one * 3 * padded * 1.02
    with FlopCounterMode(display=False) as evaluating, torch.inference_mode():
        layer.cross_entropy(outputs, targets)
    assert evaluating.get_total_flops() == one * padded


def test_memory_does_not_grow_with_the_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary_layer, "_CHUNK_LOGITS", 16 * V)
    sizes: list[int] = []
    empty: Callable[..., Tensor] = Tensor.new_empty

    def counted(self: Tensor, *size: int) -> Tensor:
        sizes.append(*size)
        return empty(self, *size)

    monkeypatch.setattr(Tensor, "new_empty", counted)
    layer, outputs, targets = some()
    layer.cross_entropy(outputs, targets)
    assert sizes == [16 * V]


def test_what_is_not_finite_is_told() -> None:
    layer, outputs, targets = some()
    with torch.no_grad():
        layer.bias[3] = torch.inf
    assert layer.cross_entropy(outputs, targets)[0].isnan()
