"""What is so of the merge decoder alone."""

import pytest
import torch
from teacher_forcing import logits_of

from capexp.captioning.merge import MergeDecoder
from capexp.data.vocabulary import BOS
from capexp.errors import InputError
from capexp.settings import ModelConfig

V, F = 30, 7


@pytest.fixture
def decoder() -> MergeDecoder:
    torch.manual_seed(0)
    return MergeDecoder(ModelConfig(embedding_size=5, lstm_units=6), (1, F), V).eval()


def test_has_the_tutorials_number_of_parameters() -> None:
    assert MergeDecoder(ModelConfig(), (1, 4096), 7579).parameter_count() == 5_527_963


def test_torchs_second_lstm_bias_is_zero_and_stays_so(decoder: MergeDecoder) -> None:
    optimizer = torch.optim.Adam([p for p in decoder.parameters() if p.requires_grad], lr=0.1)
    torch.autograd.backward(logits_of(decoder, torch.rand(4, 1, F), torch.full((4, 3), BOS)).sum())
    optimizer.step()
    assert not torch.as_tensor(decoder.lstm.bias_hh_l0).any()


def test_the_lstm_never_sees_the_photo(decoder: MergeDecoder) -> None:
    features, words = torch.rand(4, 1, F), torch.randint(3, V, (12,))
    _, one = decoder.read(decoder.start(features), words, [4, 4, 4])
    _, other = decoder.read(decoder.start(features.flip(0)), words, [4, 4, 4])
    assert torch.equal(one.hidden, other.hidden)
    assert torch.equal(one.cell, other.cell)
    assert not torch.equal(one.photo, other.photo)


def test_a_grid_is_refused_with_the_remedy() -> None:
    with pytest.raises(InputError, match=r"grid of 49; set features\.pool = 'mean'.*model\.decoder = 'attention'"):
        MergeDecoder(ModelConfig(), (49, 512), V)
