"""Laws of the merge decoder."""

import math

import pytest
import torch
from torch import Tensor, nn

from capexp.captioning.model import MergeDecoder, ModelConfig, build_decoder
from capexp.data.errors import InputError
from capexp.data.vocabulary import BOS, PAD

V, F = 30, 7


@pytest.fixture
def decoder() -> MergeDecoder:
    torch.manual_seed(0)
    small = ModelConfig(embedding_size=5, lstm_units=6, dropout=0.5)
    return build_decoder(small, (1, F), V).eval()


def some_inputs(captions: int = 4, steps: int = 9) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    features = torch.rand(captions, 1, F, generator=generator)
    inputs = torch.randint(3, V, (captions, steps), generator=generator)
    inputs[:, 0] = BOS
    return features, inputs


def test_has_the_tutorials_number_of_parameters() -> None:
    assert build_decoder(ModelConfig(), (1, 4096), 7579).parameter_count() == 5_527_963


def test_torchs_second_lstm_bias_is_zero_and_stays_so(decoder: MergeDecoder) -> None:
    features, inputs = some_inputs()
    optimizer = torch.optim.Adam([p for p in decoder.parameters() if p.requires_grad], lr=0.1)
    decoder(features, inputs).sum().backward()
    optimizer.step()
    assert not torch.as_tensor(decoder.lstm.bias_hh_l0).any()


def test_a_later_word_cannot_change_an_earlier_prediction(decoder: MergeDecoder) -> None:
    features, inputs = some_inputs()
    changed = inputs.clone()
    changed[:, 5] = (changed[:, 5] + 1) % V
    before, after = decoder(features, inputs), decoder(features, changed)
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.allclose(before[:, 5:], after[:, 5:])


def test_the_lstm_never_sees_the_photo(decoder: MergeDecoder) -> None:
    features, inputs = some_inputs()
    words = inputs[:, :3]
    _, one = decoder.advance(decoder.start(features), words)
    _, other = decoder.advance(decoder.start(features.flip(0)), words)
    assert torch.equal(one.hidden, other.hidden)
    assert torch.equal(one.cell, other.cell)
    assert not torch.equal(one.photo, other.photo)


def test_one_pass_over_a_caption_equals_its_prefixes_one_by_one(decoder: MergeDecoder) -> None:
    """The tutorial makes a sample of each prefix; a merge model gives them all at once: same logits, same loss."""
    features, inputs = some_inputs()
    targets = inputs.roll(-1, 1)
    whole = decoder(features, inputs)
    expanded = []
    for caption in range(len(inputs)):
        for length in range(1, inputs.shape[1] + 1):
            prefix = inputs[caption : caption + 1, :length]
            expanded.append(decoder(features[caption : caption + 1], prefix)[0, -1])
    prefixes = torch.stack(expanded).view_as(whole)
    torch.testing.assert_close(prefixes, whole, rtol=1e-5, atol=1e-6)
    sums = [
        nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
        for logits in (whole, prefixes)
    ]
    torch.testing.assert_close(sums[0], sums[1])


def test_step_by_step_equals_one_pass(decoder: MergeDecoder) -> None:
    features, inputs = some_inputs()
    state = decoder.start(features)
    steps = []
    for words in inputs.unbind(1):
        logits, state = decoder.step(state, words)
        steps.append(logits)
    torch.testing.assert_close(torch.stack(steps, 1), decoder(features, inputs), rtol=1e-5, atol=1e-6)


def test_padding_changes_nothing_before_it(decoder: MergeDecoder) -> None:
    features, inputs = some_inputs()
    padded = torch.cat([inputs, torch.full((len(inputs), 3), PAD)], 1)
    torch.testing.assert_close(decoder(features, padded)[:, : inputs.shape[1]], decoder(features, inputs))


def test_only_marked_steps_pass_the_vocabulary_layer(decoder: MergeDecoder) -> None:
    features, inputs = some_inputs()
    where = torch.rand(inputs.shape, generator=torch.Generator().manual_seed(2)) < 0.5
    seen: list[int] = []
    decoder.vocabulary.register_forward_hook(lambda _, arguments, __: seen.append(arguments[0].shape[0]))
    logits = decoder(features, inputs, where)
    assert seen == [int(where.sum())]
    torch.testing.assert_close(logits, decoder(features, inputs)[where])


def test_uniform_logits_cost_the_logarithm_of_the_vocabulary(decoder: MergeDecoder) -> None:
    nn.init.zeros_(decoder.vocabulary.weight)
    nn.init.zeros_(decoder.vocabulary.bias)
    features, inputs = some_inputs()
    loss = nn.functional.cross_entropy(decoder(features, inputs).flatten(0, 1), inputs.flatten())
    assert loss.item() == pytest.approx(math.log(V), abs=1e-6)


def test_a_grid_is_refused_with_the_remedy() -> None:
    with pytest.raises(InputError, match=r"grid of 49; set features\.pool = 'mean'"):
        build_decoder(ModelConfig(), (49, 512), V)
