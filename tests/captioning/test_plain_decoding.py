"""Decoding, held against the plainest way to write it: one photo, one caption, one whole prefix at a time."""

import zlib
from typing import Literal

import numpy as np
import pytest
import torch
from cases import combined
from teacher_forcing import logits_of

from capexp.captioning.consensus import Tokens, agreement
from capexp.captioning.decoder import Decoder, RecurrentDecoder
from capexp.captioning.decoding import decode
from capexp.captioning.ensemble import Ensemble
from capexp.captioning.model import build_decoder
from capexp.data.vocabulary import BOS, EOS, Vocabulary
from capexp.settings import DecodingConfig, ModelConfig

WORDS = Vocabulary(tuple(f"w{i}" for i in range(9)), "standard", "token")
CONFIGS = {
    "greedy": DecodingConfig(maximum_length=8),
    "beam": DecodingConfig(method="beam", beam_width=4, maximum_length=8),
    "beam for long captions": DecodingConfig(method="beam", beam_width=5, length_penalty=0.7, maximum_length=8),
    "beam without repeats": DecodingConfig(
        method="beam", beam_width=3, length_penalty=1, repeat_trigrams=False, maximum_length=14
    ),
    "sample": DecodingConfig(method="sample", maximum_length=8),
    "sample the likely": DecodingConfig(
        method="sample", temperature=1.3, top_p=0.8, repeat_trigrams=False, maximum_length=14
    ),
    "consensus": DecodingConfig(method="consensus", beam_width=4, samples=20, length_penalty=0.7, maximum_length=8),
    "consensus of the likely": DecodingConfig(
        method="consensus", beam_width=3, samples=5, temperature=0.7, top_p=0.9, repeat_trigrams=False,
        maximum_length=12,
    ),
    "consensus with likelihood": DecodingConfig(
        method="consensus", beam_width=6, samples=20, maximum_length=8, likelihood_weight=0.1
    ),
}  # fmt: skip
Ended = tuple[Tokens, float]  # a caption's words, EOS included, and its log-probability


def network(kind: Literal["merge", "attention"], positions: int, seed: int) -> RecurrentDecoder:
    """Return a decoder whose captions differ and end."""
    torch.manual_seed(seed)
    decoder = build_decoder(ModelConfig(decoder=kind, embedding_size=8, lstm_units=8), (positions, 5), len(WORDS))
    with torch.no_grad():
        decoder.vocabulary.weight *= 4 if kind == "merge" else 24
        decoder.embedding.weight *= 20
        decoder.vocabulary.bias[EOS] -= 1
    return decoder.eval()


def decoder_of(kind: str) -> tuple[Decoder, int]:
    """Return a decoder, and the number of positions of its grid."""
    if kind == "merge":
        return network("merge", 1, seed=2), 1
    if kind == "attention":
        return network("attention", 3, seed=0), 3
    return Ensemble([network("attention", 1, seed=0), network("merge", 1, seed=2)]), 1


def log_probabilities(decoder: Decoder, photo: torch.Tensor, said: Tokens, config: DecodingConfig) -> torch.Tensor:
    """Return the log-probabilities ``(V,)`` of the word after ``said``."""
    with torch.no_grad():
        logits = logits_of(decoder, photo.unsqueeze(0), torch.tensor([[BOS, *said]]))[0, -1]
    logits[list(WORDS.never_emitted)] = -torch.inf
    values = logits.log_softmax(0)
    if not config.repeat_trigrams:
        trigrams = set(zip(said, said[1:], said[2:], strict=False))
        repeating = [word for word in range(len(WORDS)) if len(said) > 2 and (*said[-2:], word) in trigrams]
        values[repeating] = -torch.inf
    return values


def plain_beam(decoder: Decoder, photo: torch.Tensor, config: DecodingConfig, width: int) -> list[Ended]:
    beam: list[Ended] = [((), 0.0)]
    for _ in range(config.maximum_length):
        candidates: list[Ended] = []
        for said, total in beam:
            if said[-1:] == (EOS,):
                candidates.append((said, total))
            else:
                values = log_probabilities(decoder, photo, said, config).tolist()
                candidates += [((*said, word), total + value) for word, value in enumerate(values)]
        candidates.sort(key=lambda one: one[1] / len(one[0]) ** config.length_penalty, reverse=True)
        beam = [one for one in candidates[:width] if one[1] > -np.inf]
    return beam


def plain_samples(decoder: Decoder, photo: torch.Tensor, config: DecodingConfig, count: int) -> list[Ended]:
    generator = np.random.default_rng([config.seed, zlib.crc32(photo.numpy().tobytes())])
    samples: list[Ended] = []
    for numbers in 1 - generator.random((count, config.maximum_length)):
        said: Tokens = ()
        total = 0.0
        for number in numbers:
            values = log_probabilities(decoder, photo, said, config)
            probabilities = (values / config.temperature).softmax(0).tolist()
            kept: list[int] = []
            for word in sorted(range(len(WORDS)), key=lambda word: -probabilities[word]):
                if sum(probabilities[one] for one in kept) < config.top_p:
                    kept.append(word)
            left = number * sum(probabilities[word] for word in kept)
            for word in kept:
                left -= probabilities[word]
                if left <= 0:
                    break
            said, total = (*said, word), total + float(values[word])
            if word == EOS:
                break
        samples.append((said, total))
    return samples


def words_of(said: Tokens) -> Tokens:
    return said[:-1] if said[-1] == EOS else said


def plain(decoder: Decoder, photo: torch.Tensor, config: DecodingConfig) -> list[Ended]:
    if config.method == "sample":
        return plain_samples(decoder, photo, config, 1)
    beam = plain_beam(decoder, photo, config, 1 if config.method == "greedy" else config.beam_width)
    if config.method != "consensus":
        return beam
    candidates = [words_of(said) for said, _ in beam]
    samples = [words_of(said) for said, _ in plain_samples(decoder, photo, config, config.samples)]
    (similarity,) = agreement([candidates], [candidates + samples])
    score = similarity + config.likelihood_weight * np.array([total for _, total in beam])
    return [beam[i] for i in np.argsort(-score, kind="stable")]


@pytest.mark.parametrize(("kind", "way"), combined(["attention", "merge", "ensemble"], list(CONFIGS)))
def test_captions_are_those_of_the_plain_way(kind: str, way: str) -> None:
    config = CONFIGS[way]
    decoder, positions = decoder_of(kind)
    features = 5 * torch.randn(5, positions, 5, generator=torch.Generator().manual_seed(4))
    found = decode(decoder, features, WORDS, config)
    assert len({hypotheses[0].tokens for hypotheses in found}) > 1
    for photo, hypotheses in zip(features, found, strict=True):
        expected = plain(decoder, photo, config)
        assert [hypothesis.tokens for hypothesis in hypotheses] == [words_of(said) for said, _ in expected]
        totals = [total for _, total in expected]
        assert [hypothesis.log_probability for hypothesis in hypotheses] == pytest.approx(totals, abs=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("kind", ["merge", "attention", "ensemble"])
def test_a_gpu_gives_the_same_captions(kind: str, config: DecodingConfig) -> None:
    decoder, positions = decoder_of(kind)
    features = 5 * torch.randn(20, positions, 5, generator=torch.Generator().manual_seed(4))
    expected = decode(decoder, features, WORDS, config)
    found = decode(decoder.cuda(), features.cuda(), WORDS, config)
    assert [[h.tokens for h in one] for one in found] == [[h.tokens for h in one] for one in expected]
