"""What is so of an ensemble alone; the laws of every decoder are in test_decoder.py."""

import pytest
import torch
from teacher_forcing import logits_of
from torch import Tensor

from capexp.captioning.decoder import Decoder, Packed, RecurrentDecoder
from capexp.captioning.decoding import decode
from capexp.captioning.ensemble import Ensemble
from capexp.captioning.model import build_decoder
from capexp.data.vocabulary import BOS, Vocabulary
from capexp.settings import DecodingConfig, ModelConfig

WORDS = Vocabulary(tuple(f"w{i}" for i in range(12)), "standard", "token")
V, F = len(WORDS), 5


def member(seed: int, units: int = 8) -> RecurrentDecoder:
    torch.manual_seed(seed)
    decoder = build_decoder(ModelConfig(embedding_size=8, lstm_units=units), (1, F), V).eval()
    with torch.no_grad():
        decoder.embedding.weight *= 20
    return decoder


def some(count: int = 20) -> Tensor:
    return 5 * torch.randn(count, 1, F, generator=torch.Generator().manual_seed(4))


def test_its_probabilities_are_the_geometric_mean_of_its_members_and_sum_to_one() -> None:
    members = [member(1), member(2, units=6), member(3)]
    features, words = some(), torch.full((20,), BOS)
    together, _ = Ensemble(members).step(Ensemble(members).start(features), words)
    torch.testing.assert_close(together.exp().sum(1), torch.ones(20))
    product = torch.ones(20, V)
    for one in members:
        product *= one.step(one.start(features), words)[0].softmax(1)
    mean = product ** (1 / 3)
    torch.testing.assert_close(together.exp(), mean / mean.sum(1, keepdim=True))


@pytest.mark.parametrize("method", ["greedy", "beam", "sample", "consensus"])
def test_of_one_decoder_several_times_it_says_what_that_says(method: str) -> None:
    config = DecodingConfig.model_validate({"method": method, "maximum_length": 8})
    one = member(1)
    alone, together = decode(one, some(), WORDS, config), decode(Ensemble([one, one, one]), some(), WORDS, config)
    assert [[h.tokens for h in found] for found in together] == [[h.tokens for h in found] for found in alone]
    for ours, theirs in zip(together, alone, strict=True):
        expected = [h.log_probability for h in theirs]
        assert [h.log_probability for h in ours] == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_the_order_of_its_members_is_nothing_to_it() -> None:
    members = [member(1), member(2), member(3, units=6)]
    inputs = torch.randint(4, V, (20, 6), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        logits_of(Ensemble(members), some(), inputs), logits_of(Ensemble(members[::-1]), some(), inputs)
    )


def test_its_loss_is_at_most_the_mean_of_its_members_losses() -> None:
    """Where they disagree it is below: a geometric mean sums to less than one, and is made to sum to one again."""
    members = [member(1), member(2)]
    inputs = torch.randint(4, V, (20, 6), generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def loss(decoder: Decoder) -> float:
        return float(
            torch.nn.functional.cross_entropy(
                logits_of(decoder, some(), inputs[:, :-1]).flatten(0, 1), inputs[:, 1:].flatten()
            )
        )

    assert loss(Ensemble(members)) < sum(map(loss, members)) / 2 - 1e-3


def test_its_cross_entropy_is_that_of_its_logits() -> None:
    ensemble = Ensemble([member(1), member(2)])
    inputs = torch.randint(4, V, (20, 6), generator=torch.Generator().manual_seed(0))
    packed = Packed.of(inputs)
    targets = packed.words.roll(1)
    nats = ensemble.cross_entropy(some(), None, packed.words, targets, packed.counts)
    logits = logits_of(ensemble, some(), inputs)[packed.rows, packed.steps]
    torch.testing.assert_close(nats, torch.nn.functional.cross_entropy(logits, targets))
