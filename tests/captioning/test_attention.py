"""What is so of the attention decoder alone."""

import pytest
import torch

from capexp.captioning.attention import AttentionDecoder
from capexp.data.vocabulary import BOS, PAD
from capexp.settings import ModelConfig

V, P, F = 30, 6, 7


@pytest.fixture
def decoder() -> AttentionDecoder:
    torch.manual_seed(0)
    config = ModelConfig(decoder="attention", embedding_size=5, lstm_units=6, attention_size=4)
    return AttentionDecoder(config, (P, F), V).eval()


def test_attention_is_spread_over_the_grid_and_sums_to_one_at_each_word(decoder: AttentionDecoder) -> None:
    state = decoder.start(torch.rand(3, P, F)).select(torch.tensor([0, 0, 1, 2]))
    for words in torch.randint(3, V, (5, 4)):
        _, state = decoder.read(state, words, [4])
        assert state.weights.shape == (4, P)
        assert (state.weights > 0).all()
        torch.testing.assert_close(state.weights.sum(1), torch.ones(4))


def test_attention_follows_what_is_looked_for_not_where_it_stands(decoder: AttentionDecoder) -> None:
    """The grid is a set: with its places in another order the same is said, and the weights move with them."""
    features, order = torch.rand(3, P, F), torch.tensor([3, 5, 0, 1, 4, 2])
    words = torch.full((3,), BOS)
    one, before = decoder.read(decoder.start(features), words, [3])
    other, after = decoder.read(decoder.start(features[:, order]), words, [3])
    torch.testing.assert_close(one, other)
    torch.testing.assert_close(before.weights[:, order], after.weights)


def test_a_place_unlike_all_others_moves_the_attention(decoder: AttentionDecoder) -> None:
    features = torch.rand(1, 1, F).repeat(1, P, 1)
    words = torch.tensor([BOS])
    _, even = decoder.read(decoder.start(features), words, [1])
    torch.testing.assert_close(even.weights, torch.full((1, P), 1 / P))
    features[0, 2] *= 30
    _, moved = decoder.read(decoder.start(features), words, [1])
    others = torch.cat([moved.weights[0, :2], moved.weights[0, 3:]])
    torch.testing.assert_close(others, others[:1].expand(P - 1))
    assert (moved.weights[0, 2] - others[0]).abs().item() > 1e-3


def test_the_grids_are_not_copied_for_the_captions_of_a_beam(decoder: AttentionDecoder) -> None:
    state = decoder.start(torch.rand(3, P, F))
    wide = state.select(torch.arange(3).repeat_interleave(5)).select(torch.arange(15).flip(0))
    assert wide.grid.keys is state.grid.keys
    assert wide.grid.values is state.grid.values
    assert wide.weights.shape == (3, P), "nor are the states"


def test_looking_back_finds_the_weights_of_each_word(decoder: AttentionDecoder) -> None:
    features, words = torch.rand(2, P, F), torch.tensor([[5, 9, 7], [8, 4, PAD]])
    looked = decoder.attention_maps(features, words)
    assert looked.shape == (2, 3, P)
    for photo, caption in enumerate(([BOS, 5, 9], [BOS, 8])):
        state = decoder.start(features[photo : photo + 1])
        for row, word in zip(looked[photo], caption, strict=False):
            _, state = decoder.read(state, torch.tensor([word]), [1])
            torch.testing.assert_close(row, state.weights[0])
