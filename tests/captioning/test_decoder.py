"""Laws of every decoder."""

import math
from typing import Literal

import pytest
import torch
from teacher_forcing import logits_of
from torch import Tensor, nn

from capexp.captioning.decoder import Decoder, DecoderState, Packed, RecurrentDecoder
from capexp.captioning.ensemble import Ensemble
from capexp.captioning.merge import MergeDecoder
from capexp.captioning.model import build_decoder
from capexp.data.vocabulary import BOS, PAD
from capexp.settings import ModelConfig

V, F = 30, 7
POSITIONS = {"merge": 1, "attention": 6}
MERGE = ModelConfig(decoder="merge", embedding_size=5, lstm_units=6, dropout=0.5)
ATTENTION = ModelConfig(decoder="attention", embedding_size=5, lstm_units=6, attention_size=4, dropout=0.5)
DECODERS: dict[str, tuple[ModelConfig | tuple[ModelConfig, ...], int]] = {
    "merge": (MERGE, 1),
    "attention": (ATTENTION, 6),
    "ensemble": ((ATTENTION, ATTENTION.model_copy(update={"lstm_units": 7})), 6),
    "ensemble of both": ((MERGE, ATTENTION), 1),
}
networks = pytest.mark.parametrize("decoder", POSITIONS, indirect=True)


@pytest.fixture(params=DECODERS)
def decoder(request: pytest.FixtureRequest) -> Decoder:
    config, positions = DECODERS[request.param]
    torch.manual_seed(0)
    if isinstance(config, tuple):
        return Ensemble([build_decoder(one, (positions, F), V) for one in config]).eval()
    return build_decoder(config, (positions, F), V).eval()


def positions_of(decoder: Decoder) -> int:
    networks = [module for module in decoder.modules() if isinstance(module, RecurrentDecoder)]
    return 1 if any(isinstance(network, MergeDecoder) for network in networks) else 6


def some_inputs(decoder: Decoder, captions: int = 4, steps: int = 9) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    features = torch.rand(captions, positions_of(decoder), F, generator=generator)
    inputs = torch.randint(3, V, (captions, steps), generator=generator)
    inputs[:, 0] = BOS
    return features, inputs


def test_a_later_word_cannot_change_an_earlier_prediction(decoder: Decoder) -> None:
    features, inputs = some_inputs(decoder)
    changed = inputs.clone()
    changed[:, 5] = (changed[:, 5] + 1) % V
    before, after = logits_of(decoder, features, inputs), logits_of(decoder, features, changed)
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.allclose(before[:, 5:], after[:, 5:])


def test_another_photo_changes_every_prediction(decoder: Decoder) -> None:
    features, inputs = some_inputs(decoder)
    one, other = logits_of(decoder, features, inputs), logits_of(decoder, features.flip(0), inputs)
    assert ((one - other).abs().amax(2) > 1e-6).all()


def test_one_pass_over_a_caption_equals_its_prefixes_one_by_one(decoder: Decoder) -> None:
    """The tutorial makes a sample of each prefix; one pass gives them all at once: same logits, same loss."""
    features, inputs = some_inputs(decoder)
    targets = inputs.roll(-1, 1)
    whole = logits_of(decoder, features, inputs)
    expanded = []
    for caption in range(len(inputs)):
        for length in range(1, inputs.shape[1] + 1):
            prefix = inputs[caption : caption + 1, :length]
            expanded.append(logits_of(decoder, features[caption : caption + 1], prefix)[0, -1])
    prefixes = torch.stack(expanded).view_as(whole)
    torch.testing.assert_close(prefixes, whole, rtol=1e-5, atol=1e-6)
    sums = [
        nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
        for logits in (whole, prefixes)
    ]
    torch.testing.assert_close(sums[0], sums[1])


def test_step_by_step_equals_one_pass(decoder: Decoder) -> None:
    features, inputs = some_inputs(decoder)
    state = decoder.start(features)
    steps = []
    for words in inputs.unbind(1):
        logits, state = decoder.step(state, words)
        steps.append(logits)
    torch.testing.assert_close(torch.stack(steps, 1), logits_of(decoder, features, inputs), rtol=1e-5, atol=1e-6)


def test_a_selected_state_goes_on_as_the_captions_it_names(decoder: Decoder) -> None:
    """As beam search needs it: captions dropped, repeated and in another order, more than once."""
    features, inputs = some_inputs(decoder)
    state = read(decoder, decoder.start(features), inputs[:, :4])
    rows, again = torch.tensor([2, 0, 0, 3, 2, 2]), torch.tensor([5, 1, 0, 1])
    selected = read(decoder, state.select(rows), inputs[rows, 4:6])
    logits, _ = decoder.step(selected.select(again), inputs[rows[again], 6])
    torch.testing.assert_close(logits, logits_of(decoder, features, inputs)[rows[again], 6], rtol=1e-5, atol=1e-6)


def read(decoder: Decoder, state: DecoderState, words: Tensor) -> DecoderState:
    for step in words.unbind(1):
        _, state = decoder.step(state, step)
    return state


@networks
def test_several_words_are_read_as_one_by_one(decoder: Decoder) -> None:
    assert isinstance(decoder, RecurrentDecoder)
    features, inputs = some_inputs(decoder)
    packed = Packed.of(inputs[:, :4])
    _, state = decoder.read(decoder.start(features), packed.words, packed.counts)
    logits, _ = decoder.step(state, inputs[:, 4])
    torch.testing.assert_close(logits, logits_of(decoder, features, inputs)[:, 4], rtol=1e-5, atol=1e-6)


def test_captions_that_share_a_photo_are_as_with_a_copy_each(decoder: Decoder) -> None:
    features, inputs = some_inputs(decoder, captions=7)
    photos = torch.tensor([1, 0, 1, 1, 3, 0, 1])  # photo 2 has none
    shared, copied = (
        logits_of(decoder, features[:4], inputs, photos=photos),
        logits_of(decoder, features[photos], inputs),
    )
    torch.testing.assert_close(shared, copied, rtol=1e-5, atol=1e-6)


def test_padding_changes_nothing_before_it(decoder: Decoder) -> None:
    features, inputs = some_inputs(decoder)
    padded = torch.cat([inputs, torch.full((len(inputs), 3), PAD)], 1)
    torch.testing.assert_close(
        logits_of(decoder, features, padded)[:, : inputs.shape[1]], logits_of(decoder, features, inputs)
    )


def test_no_padding_passes_the_vocabulary_layer(decoder: Decoder) -> None:
    features, inputs = some_inputs(decoder)
    lengths = torch.tensor([3, inputs.shape[1], 1, 6])
    real = torch.arange(inputs.shape[1]) < lengths.unsqueeze(1)
    seen: list[int] = []
    networks = [module for module in decoder.modules() if isinstance(module, RecurrentDecoder)]
    for network in networks:
        network.vocabulary.register_forward_hook(lambda _, arguments, __: seen.append(arguments[0].shape[0]))
    logits = logits_of(decoder, features, inputs.where(real, PAD))
    assert seen == [int(real.sum())] * len(networks)
    torch.testing.assert_close(logits[real], logits_of(decoder, features, inputs)[real])


@networks
def test_uniform_logits_cost_the_logarithm_of_the_vocabulary(decoder: Decoder) -> None:
    assert isinstance(decoder, RecurrentDecoder)
    nn.init.zeros_(decoder.vocabulary.weight)
    nn.init.zeros_(decoder.vocabulary.bias)
    features, inputs = some_inputs(decoder)
    loss = nn.functional.cross_entropy(logits_of(decoder, features, inputs).flatten(0, 1), inputs.flatten())
    assert loss.item() == pytest.approx(math.log(V), abs=1e-6)


@pytest.mark.parametrize("decoder", ["merge", "attention", "ensemble"], indirect=True)  # attention to one place is 1
def test_every_weight_that_trains_has_a_gradient(decoder: Decoder) -> None:
    features, inputs = some_inputs(decoder)
    torch.autograd.backward(logits_of(decoder, features, inputs).square().sum())
    idle = [name for name, value in decoder.named_parameters() if value.requires_grad and not _moves(value)]
    assert not idle


def _moves(value: Tensor) -> bool:
    return value.grad is not None and bool(value.grad.any())


@pytest.mark.parametrize("name", POSITIONS)
@pytest.mark.parametrize("norm", ["unit", "standard"])
def test_a_norm_makes_a_photos_brightness_count_for_nothing(
    name: Literal["merge", "attention"], norm: Literal["unit", "standard"]
) -> None:
    config = ModelConfig(decoder=name, embedding_size=5, lstm_units=6, photo_norm=norm)
    decoder = build_decoder(config, (POSITIONS[name], F), V).eval()
    features, inputs = some_inputs(decoder)
    torch.testing.assert_close(logits_of(decoder, 100 * features, inputs), logits_of(decoder, 200 * features, inputs))
