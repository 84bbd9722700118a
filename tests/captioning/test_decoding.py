"""Laws of decoding, for each method."""

import itertools
from collections import Counter
from typing import Literal

import pytest
import torch
from teacher_forcing import logits_of

from capexp.captioning.consensus import agreement
from capexp.captioning.decoder import Decoder, RecurrentDecoder
from capexp.captioning.decoding import Hypothesis, decode
from capexp.captioning.model import build_decoder
from capexp.data.vocabulary import BOS, EOS, PAD, UNK, Vocabulary
from capexp.errors import InputError
from capexp.settings import DecodingConfig, ModelConfig, Unknown

METHODS = (
    DecodingConfig(maximum_length=8),
    DecodingConfig(method="beam", beam_width=4, maximum_length=8),
    DecodingConfig(method="beam", beam_width=3, length_penalty=1, repeat_trigrams=False, maximum_length=8),
    DecodingConfig(method="sample", temperature=0.7, top_p=0.9, maximum_length=8),
    DecodingConfig(method="consensus", beam_width=4, samples=5, maximum_length=8),
)
methods = pytest.mark.parametrize("config", METHODS, ids=["greedy", "beam", "beam of one mind", "sample", "consensus"])


def vocabulary(unknown: Unknown = "token", words: int = 12) -> Vocabulary:
    return Vocabulary(tuple(f"w{i}" for i in range(words)), "standard", unknown)


Kind = Literal["merge", "attention"]
POSITIONS = {"merge": 1, "attention": 3}
kinds = pytest.mark.parametrize("kind", POSITIONS)


def decoder_for(words: Vocabulary, seed: int = 0, sharp: float = 1.0, kind: Kind = "merge") -> RecurrentDecoder:
    torch.manual_seed(seed)
    config = ModelConfig(decoder=kind, embedding_size=8, lstm_units=8)
    decoder = build_decoder(config, (POSITIONS[kind], 5), len(words)).eval()
    with torch.no_grad():
        decoder.vocabulary.weight *= sharp
        if kind == "attention":  # behind two LSTMs that are fresh, words follow less from photos
            decoder.vocabulary.weight *= 8
            decoder.vocabulary.bias[EOS] -= 2
        decoder.embedding.weight *= 20
    return decoder


def photos(count: int, seed: int = 4, kind: Kind = "merge") -> torch.Tensor:
    return 5 * torch.randn(count, POSITIONS[kind], 5, generator=torch.Generator().manual_seed(seed))


def best(decoder: Decoder, features: torch.Tensor, words: Vocabulary, config: DecodingConfig) -> list[Hypothesis]:
    return [hypotheses[0] for hypotheses in decode(decoder, features, words, config)]


def log_probability(decoder: Decoder, photo: torch.Tensor, words: Vocabulary, tokens: list[int]) -> float:
    """Of entries, EOS among them, by teacher forcing, among the entries that may be emitted."""
    with torch.no_grad():
        logits = logits_of(decoder, photo.unsqueeze(0), torch.tensor([[BOS, *tokens[:-1]]]))[0]
    logits[:, list(words.never_emitted)] = -torch.inf
    return float(logits.log_softmax(1)[torch.arange(len(tokens)), torch.tensor(tokens)].sum())


@methods
@pytest.mark.parametrize("unknown", ["token", "drop"])
@kinds
def test_pad_bos_and_unk_are_never_emitted_however_probable(
    unknown: Unknown, config: DecodingConfig, kind: Kind
) -> None:
    words = vocabulary(unknown)
    decoder = decoder_for(words, kind=kind)
    with torch.no_grad():
        for entry in words.never_emitted:
            decoder.vocabulary.bias[entry] = 100
    tokens = {
        token for found in decode(decoder, photos(20, kind=kind), words, config) for h in found for token in h.tokens
    }
    assert tokens
    assert not {PAD, BOS, EOS} & tokens
    assert unknown == "drop" or UNK not in tokens


@methods
@pytest.mark.parametrize("length", [1, 5])
def test_every_caption_ends(length: int, config: DecodingConfig) -> None:
    words = vocabulary()
    decoder = decoder_for(words)
    with torch.no_grad():
        decoder.vocabulary.bias[EOS] = -100
    found = decode(decoder, photos(3), words, config.model_copy(update={"maximum_length": length}))
    assert {len(h.tokens) for hypotheses in found for h in hypotheses} == {length}


@methods
@kinds
def test_a_batch_gives_each_photo_the_captions_it_gets_alone(config: DecodingConfig, kind: Kind) -> None:
    words = vocabulary()
    decoder = decoder_for(words, seed=3, kind=kind)
    features = photos(16, kind=kind)
    together = decode(decoder, features, words, config)
    alone = [decode(decoder, row.unsqueeze(0), words, config)[0] for row in features]
    assert [[h.tokens for h in found] for found in together] == [[h.tokens for h in found] for found in alone]
    assert len({found[0].tokens for found in together}) > 1
    for one, other in zip(itertools.chain(*together), itertools.chain(*alone), strict=True):
        assert one.log_probability == pytest.approx(other.log_probability, abs=1e-4)


@methods
@kinds
def test_the_log_probability_is_that_of_teacher_forcing(config: DecodingConfig, kind: Kind) -> None:
    words = vocabulary()
    decoder = decoder_for(words, seed=5, kind=kind)
    free = config.model_copy(update={"repeat_trigrams": True})
    features = photos(6, kind=kind)
    for photo, found in zip(features, decode(decoder, features, words, free), strict=True):
        for hypothesis in found:
            tokens = [*hypothesis.tokens, EOS] if len(hypothesis.tokens) < 8 else list(hypothesis.tokens)
            expected = log_probability(decoder, photo, words, tokens)
            assert hypothesis.log_probability == pytest.approx(expected, abs=1e-4)


@kinds
def test_greedy_and_a_beam_of_one_take_the_most_probable_word_each_time(kind: Kind) -> None:
    words = vocabulary()
    decoder = decoder_for(words, seed=6, kind=kind)
    features = photos(20, kind=kind)
    for method in ("greedy", "beam"):
        config = DecodingConfig.model_validate({"method": method, "beam_width": 1, "maximum_length": 6})
        for photo, hypothesis in zip(features, best(decoder, features, words, config), strict=True):
            said = [BOS]
            while len(said) <= 6:
                with torch.no_grad():
                    logits = logits_of(decoder, photo.unsqueeze(0), torch.tensor([said]))[0, -1]
                logits[list(words.never_emitted)] = -torch.inf
                said.append(int(logits.argmax()))
                if said[-1] == EOS:
                    said.pop()
                    break
            assert hypothesis.tokens == tuple(said[1:])


@pytest.mark.parametrize("penalty", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("unknown", ["token", "drop"])
@kinds
def test_a_wide_beam_finds_what_trying_everything_finds(penalty: float, unknown: Unknown, kind: Kind) -> None:
    words = vocabulary(unknown, words=3)
    entries = range(words.first_word, len(words))
    for seed in range(5):
        decoder = decoder_for(words, seed, sharp=3, kind=kind)
        (photo,) = photos(1, seed, kind)
        every = {}
        for length in range(4):
            for tokens in itertools.product(entries, repeat=length):
                ended = [*tokens, EOS] if length < 3 else list(tokens)
                every[tokens] = (log_probability(decoder, photo, words, ended), len(ended))
        ranked = sorted(every, key=lambda tokens: -every[tokens][0] / every[tokens][1] ** penalty)
        config = DecodingConfig(method="beam", beam_width=4, length_penalty=penalty, maximum_length=3)
        # As wide as there are words, where 3 words and EOS make 4 ** 2 prefixes: the first is what counts.
        (found,) = decode(decoder, photo.unsqueeze(0), words, config)
        ours = every[found[0].tokens]
        theirs = every[ranked[0]]
        assert ours[0] / ours[1] ** penalty == pytest.approx(theirs[0] / theirs[1] ** penalty, abs=1e-4)
        ranks = [every[h.tokens][0] / every[h.tokens][1] ** penalty for h in found]
        assert ranks == sorted(ranks, reverse=True)
        assert len({h.tokens for h in found}) == len(found) == 4, "no hypothesis twice"


def test_a_wider_beam_is_not_worse_and_mostly_better_than_greedy() -> None:
    words = vocabulary()
    decoder = decoder_for(words, seed=8, sharp=2)
    features = photos(50)
    greedy = [h.log_probability for h in best(decoder, features, words, DecodingConfig(maximum_length=8))]
    wide = DecodingConfig(method="beam", beam_width=8, maximum_length=8)
    beam = [h.log_probability for h in best(decoder, features, words, wide)]
    assert sum(beam) > sum(greedy) + 1
    assert sum(b < g - 1e-4 for b, g in zip(beam, greedy, strict=True)) <= 2


def test_a_length_penalty_makes_captions_longer() -> None:
    words = vocabulary()
    decoder = decoder_for(words, seed=9)
    with torch.no_grad():
        decoder.vocabulary.bias[EOS] = 1.0
    lengths = [
        sum(len(h.tokens) for h in best(decoder, photos(30), words, DecodingConfig(method="beam", length_penalty=p)))
        for p in (0.0, 1.0, 2.0)
    ]
    assert lengths[0] < lengths[1] < lengths[2]


@pytest.mark.parametrize("method", ["greedy", "beam", "sample", "consensus"])
def test_no_three_words_in_a_row_come_twice_where_that_is_asked_for(method: str) -> None:
    words = vocabulary(words=3)
    decoder = decoder_for(words, seed=10)
    with torch.no_grad():
        decoder.vocabulary.bias[EOS] = -100

    def repeats(allowed: bool) -> int:
        config = {"method": method, "repeat_trigrams": allowed, "maximum_length": 20, "temperature": 0.3}
        found = decode(decoder, photos(10), words, DecodingConfig.model_validate(config))
        counts = [Counter(zip(h.tokens, h.tokens[1:], h.tokens[2:], strict=False)) for hs in found for h in hs]
        return sum(count > 1 for one in counts for count in one.values())

    assert repeats(True) > 0
    assert repeats(False) == 0


def test_sampling_follows_the_seed_and_the_decoders_probabilities() -> None:
    words = vocabulary(words=4)
    decoder = decoder_for(words, seed=11, sharp=2)
    photo = photos(1)
    # One photo, told apart by a trace that changes nothing else: so many draws of the same distribution.
    many = photo.repeat(4000, 1, 1) * (1 + 1e-6 * torch.arange(4000).view(-1, 1, 1))
    config = DecodingConfig(method="sample", maximum_length=1)
    first = [h.tokens for h in best(decoder, many, words, config)]
    assert first == [h.tokens for h in best(decoder, many, words, config)]
    assert first != [h.tokens for h in best(decoder, many, words, config.model_copy(update={"seed": 2}))]
    counts = Counter(first)
    for tokens in [(), *((entry,) for entry in range(words.first_word, len(words)))]:
        expected = 4000 * torch.tensor(log_probability(decoder, photo[0], words, list(tokens) or [EOS])).exp().item()
        assert abs(counts[tokens] - expected) < 4 * max(expected, 1) ** 0.5 + 1


def test_cold_or_narrow_sampling_is_greedy() -> None:
    words = vocabulary()
    decoder = decoder_for(words, seed=12)
    greedy = best(decoder, photos(20), words, DecodingConfig(maximum_length=8))
    for how in ({"temperature": 1e-4}, {"top_p": 1e-6}):
        config = DecodingConfig.model_validate({"method": "sample", "maximum_length": 8, **how})
        assert [h.tokens for h in best(decoder, photos(20), words, config)] == [h.tokens for h in greedy]


@kinds
def test_only_hypotheses_that_go_on_pass_the_vocabulary_layer(kind: Kind) -> None:
    words = vocabulary()
    decoder = decoder_for(words, seed=2 if kind == "merge" else 0, sharp=3, kind=kind)
    rows: list[int] = []
    decoder.vocabulary.register_forward_hook(lambda layer, inputs, logits: rows.append(len(logits)))
    greedy = DecodingConfig(maximum_length=8)
    lengths = [len(hypothesis.tokens) for hypothesis in best(decoder, photos(40, kind=kind), words, greedy)]
    assert len(set(lengths)) > 1, "they end at different steps"
    assert sum(rows) == sum(min(length + 1, greedy.maximum_length) for length in lengths)
    rows.clear()
    beam = DecodingConfig(method="beam", beam_width=4, maximum_length=8)
    decode(decoder, photos(40, kind=kind), words, beam)
    assert rows[0] == 40, "before the first word the hypotheses of a photo are one"
    assert rows[-1] < 40 * 4, "some have ended"


def test_samples_that_have_ended_do_not_pass_the_vocabulary_layer() -> None:
    words = vocabulary()
    decoder = decoder_for(words, seed=2, sharp=3)
    rows: list[int] = []
    decoder.vocabulary.register_forward_hook(lambda layer, inputs, logits: rows.append(len(logits)))
    config = DecodingConfig(method="sample", maximum_length=8)
    lengths = [len(hypothesis.tokens) for hypothesis in best(decoder, photos(40), words, config)]
    assert len(set(lengths)) > 1, "they end at different steps"
    assert sum(rows) == sum(min(length + 1, config.maximum_length) for length in lengths)


@kinds
def test_consensus_chooses_among_the_beams_hypotheses_the_one_most_like_all(kind: Kind) -> None:
    words = vocabulary()
    decoder = decoder_for(words, seed=2 if kind == "merge" else 0, sharp=3, kind=kind)
    beam = DecodingConfig(method="beam", beam_width=5, maximum_length=8)
    config = beam.model_copy(update={"method": "consensus", "samples": 12})
    likely = decode(decoder, photos(30, kind=kind), words, beam)
    chosen = decode(decoder, photos(30, kind=kind), words, config)
    assert [sorted(h.tokens for h in one) for one in chosen] == [sorted(h.tokens for h in one) for one in likely]
    assert [one[0] for one in chosen] != [one[0] for one in likely]
    of_other_seed = decode(decoder, photos(30, kind=kind), words, config.model_copy(update={"seed": 2}))
    assert chosen != of_other_seed, "captions were drawn"
    for one in decode(decoder, photos(30, kind=kind), words, config.model_copy(update={"samples": 0})):
        candidates = [hypothesis.tokens for hypothesis in one]
        (liked,) = agreement([candidates], [candidates])
        assert list(liked) == sorted(liked, reverse=True)
    alone = config.model_copy(update={"beam_width": 1})
    greedy = DecodingConfig(maximum_length=8)
    assert best(decoder, photos(9, kind=kind), words, alone) == best(decoder, photos(9, kind=kind), words, greedy)


@pytest.mark.parametrize("method", ["beam", "consensus"])
def test_a_beam_wider_than_the_vocabulary_is_refused(method: str) -> None:
    words = vocabulary(words=5)
    wide = DecodingConfig.model_validate({"method": method, "beam_width": 7})
    with pytest.raises(InputError, match=r"beam_width = 7: only 6 entries"):
        decode(decoder_for(words), photos(1), words, wide)
    decode(decoder_for(words), photos(1), words, wide.model_copy(update={"beam_width": 6}))
