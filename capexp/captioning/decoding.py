"""From a decoder's next-word logits to captions, over a batch of photos at once.

Shapes: B photos, K hypotheses of each, N = B * K, M of them not ended, V vocabulary, T words so far.
"""

import zlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from capexp.captioning.consensus import agreement
from capexp.captioning.decoder import Decoder
from capexp.data.vocabulary import BOS, EOS, PAD, Vocabulary
from capexp.errors import InputError
from capexp.settings import DecodingConfig

_DRAWN = 2**21
"""Logits of the captions that consensus draws at a time (8 MiB), of which sampling makes ten tables as large."""


@dataclass(frozen=True)
class Hypothesis:
    """A caption as entries of the vocabulary, without BOS and EOS."""

    tokens: tuple[int, ...]
    log_probability: float
    """Natural logarithm of the caption's probability, EOS included where the decoder chose to end."""


def decode(
    decoder: Decoder, features: Tensor, vocabulary: Vocabulary, config: DecodingConfig
) -> list[tuple[Hypothesis, ...]]:
    """Hypotheses of each photo, the best first, from features ``(B, P, F)``: as many as beam search keeps, or one.

    PAD, BOS and UNK are never emitted, and probabilities are those among the entries that may be; a caption
    ends with EOS or at ``maximum_length`` words.

    Raises:
        InputError: a beam wider than the vocabulary.
    """
    refuse_wide(config, vocabulary)
    decoder.eval()
    if config.method == "sample":
        return _sample(decoder, features, vocabulary, config, 1)
    if config.method == "consensus":
        return _consensus(decoder, features, vocabulary, config)
    width = config.beam_width if config.method == "beam" else 1
    return _beam(decoder, features, vocabulary, config, width)


def refuse_wide(config: DecodingConfig, vocabulary: Vocabulary) -> None:
    """Refuses a beam that no vocabulary of this size can fill.

    Raises:
        InputError: it is wider than there are words.
    """
    words = len(vocabulary) - len(vocabulary.never_emitted)
    if config.method in ("beam", "consensus") and config.beam_width > words:
        raise InputError(f"decoding.beam_width = {config.beam_width}: only {words} words may follow; lower it")


@torch.inference_mode()
def _beam(
    decoder: Decoder, features: Tensor, vocabulary: Vocabulary, config: DecodingConfig, width: int
) -> list[tuple[Hypothesis, ...]]:
    """Beam search; of width 1 it is greedy. A hypothesis that has ended keeps its place until better ones take it.

    Only the M hypotheses that go on pass the decoder: before the first word one of each photo, then those not ended.
    """
    photos, device = len(features), features.device
    first = torch.arange(photos, device=device).unsqueeze(1) * width  # (B, 1) each photo's first row among N
    state = decoder.start(features)
    going = first.flatten()  # (M,) the rows among N that the state holds
    forbidden = torch.tensor(vocabulary.never_emitted, device=device)
    sequences = torch.empty(photos, width, 0, dtype=torch.long, device=device)  # (B, K, T)
    words = torch.full((photos, width), BOS, device=device)
    # Before the first word the hypotheses of a photo are one.
    total = torch.full((photos, width), -torch.inf, device=device)
    total[:, 0] = 0
    lengths = torch.zeros(photos, width, device=device)
    ended = torch.zeros(photos, width, dtype=torch.bool, device=device)
    stay = torch.full((width,), -torch.inf, device=device)
    stay[0] = 0
    for _ in range(config.maximum_length):
        logits, state = decoder.step(state, words.flatten()[going])  # (M, V)
        following = _log_probabilities(logits, forbidden, sequences.flatten(0, 1)[going], config)
        likely, their_entries = following.topk(width)  # (M, K): no photo takes more of one hypothesis
        best = stay.repeat(photos * width, 1).index_copy(0, going, likely)  # (N, K): an ended one stays as it is, once
        entries = torch.full_like(best, EOS, dtype=torch.long).index_copy(0, going, their_entries)
        candidates = total.unsqueeze(2) + best.view(photos, width, width)  # (B, K, K)
        lengths = lengths + ~ended
        ranks = candidates / lengths.unsqueeze(2) ** config.length_penalty
        chosen = ranks.flatten(1).topk(width).indices  # (B, K), the best first
        origin = chosen // width
        words = entries.view(photos, -1).gather(1, chosen)
        total = candidates.flatten(1).gather(1, chosen)
        lengths = lengths.gather(1, origin)
        ended = ended.gather(1, origin) | (words == EOS)
        earlier = sequences.gather(1, origin.unsqueeze(2).expand(-1, -1, sequences.shape[2]))
        sequences = torch.cat([earlier, words.unsqueeze(2)], 2)
        place = torch.empty(photos * width, dtype=torch.long, device=device)
        place[going] = torch.arange(len(going), device=device)  # where the state holds them
        going = (~ended).flatten().nonzero().squeeze(1)
        if len(going) == 0:
            break
        state = state.select(place[(first + origin).flatten()[going]])
    return _hypotheses(sequences, total)


@torch.inference_mode()
def _sample(
    decoder: Decoder, features: Tensor, vocabulary: Vocabulary, config: DecodingConfig, count: int
) -> list[tuple[Hypothesis, ...]]:
    """Words drawn at random (top-p: Holtzman et al., ICLR 2020), for each photo by a generator of its own.

    ``count`` captions of each photo; only those that have not ended pass the decoder.
    """
    photos, device = len(features), features.device
    drawn = torch.tensor(_uniform(features, config, count), dtype=torch.float32, device=device)  # (N, T)
    state = decoder.start(features)
    if count > 1:
        state = state.repeat(count)
    forbidden = torch.tensor(vocabulary.never_emitted, device=device)
    going = torch.arange(photos * count, device=device)  # (M,) the rows among N that the state holds
    sequences = torch.empty(photos * count, 0, dtype=torch.long, device=device)  # (N, T)
    words = torch.full_like(going, BOS)
    total = torch.zeros(photos * count, device=device)
    for step in range(config.maximum_length):
        logits, state = decoder.step(state, words)  # (M, V)
        following = _log_probabilities(logits, forbidden, sequences[going], config)
        probable, entries = (following / config.temperature).softmax(1).sort(1, descending=True)
        mass = probable.cumsum(1)
        kept = probable.where(mass - probable < config.top_p, 0.0)  # the most probable one always
        mass = kept.cumsum(1)
        place = (mass < drawn[going, step : step + 1] * mass[:, -1:]).sum(1, keepdim=True)
        words = entries.gather(1, place.clamp(max=len(vocabulary) - 1))  # (M, 1)
        total[going] += following.gather(1, words).squeeze(1)
        words = words.squeeze(1)
        said = torch.full((len(sequences), 1), EOS, device=device).index_copy(0, going, words.unsqueeze(1))
        sequences = torch.cat([sequences, said], 1)
        on = (words != EOS).nonzero().squeeze(1)
        if len(on) == 0:
            break
        if len(on) < len(words):
            state, words, going = state.select(on), words[on], going[on]
    return _hypotheses(sequences.view(photos, count, -1), total.view(photos, count))


def _consensus(
    decoder: Decoder, features: Tensor, vocabulary: Vocabulary, config: DecodingConfig
) -> list[tuple[Hypothesis, ...]]:
    """Minimum Bayes risk (Kumar and Byrne, 2004): the hypothesis that is most like what else may be said.

    The most probable caption is often an odd one; Devlin et al. (2015) took people's captions of like photos to choose
    by, here the decoder's own stand for them.
    """
    chosen = []
    photos = max(_DRAWN // len(vocabulary) // max(config.samples, 1), 1)
    for part in torch.split(features, photos):
        beams = _beam(decoder, part, vocabulary, config, config.beam_width)
        drawn = _sample(decoder, part, vocabulary, config, config.samples) if config.samples else [()] * len(part)
        for beam, others in zip(beams, drawn, strict=True):
            candidates = [hypothesis.tokens for hypothesis in beam]
            liked = agreement(candidates, candidates + [hypothesis.tokens for hypothesis in others])
            chosen.append(tuple(beam[i] for i in np.argsort(-liked, kind="stable")))
    return chosen


@torch.no_grad()
def draw(decoder: Decoder, features: Tensor, vocabulary: Vocabulary, count: int, maximum_length: int) -> Tensor:
    """Captions drawn from the decoder's probabilities by torch's generator, as targets of training.

    From features ``(N, P, F)`` so many of each photo, those of a photo together: ``(N * count, T)``, words and EOS,
    then PAD.

    Raises:
        FloatingPointError: the decoder gives logits that are not finite.
    """
    state = decoder.start(features)
    state = state.repeat(count)
    forbidden = torch.tensor(vocabulary.never_emitted, device=features.device)
    words = torch.full((len(features) * count,), BOS, device=features.device)
    drawn: list[Tensor] = []
    for _ in range(maximum_length):
        logits, state = decoder.step(state, words)  # (B, V)
        if not logits.isfinite().all():
            raise FloatingPointError("logits are not finite")
        following = logits.float().index_fill(1, forbidden, -torch.inf).softmax(1).multinomial(1).squeeze(1)
        following = following.where((words != EOS) & (words != PAD), PAD)
        drawn.append(following)
        words = following
        if bool(((words == EOS) | (words == PAD)).all()):
            break
    return torch.stack(drawn, 1)


def _uniform(features: Tensor, config: DecodingConfig, count: int) -> np.ndarray:
    """Numbers in (0, 1], ``count`` rows a photo, one a step, that follow from the seed and the photo."""
    contents = [zlib.crc32(row.tobytes()) for row in features.float().cpu().numpy()]
    shape = (count, config.maximum_length)
    return np.concatenate([1 - np.random.default_rng([config.seed, one]).random(shape) for one in contents])


def _log_probabilities(logits: Tensor, forbidden: Tensor, sequences: Tensor, config: DecodingConfig) -> Tensor:
    """Of the next word, among those that may follow the words so far ``(M, T)``: ``(M, V)``."""
    values = logits.float().index_fill(1, forbidden, -torch.inf).log_softmax(1)
    if config.repeat_trigrams or sequences.shape[1] < 3:
        return values
    # Where the last two words stood before, what followed them then.
    again = (sequences[:, :-2] == sequences[:, -2:-1]) & (sequences[:, 1:-1] == sequences[:, -1:])  # (M, T - 2)
    again &= sequences[:, 2:] != EOS
    return values.scatter_add(1, sequences[:, 2:], torch.where(again, -torch.inf, 0.0))


def _hypotheses(sequences: Tensor, total: Tensor) -> list[tuple[Hypothesis, ...]]:
    """Each photo's hypotheses that are possible at all, from entries ``(B, K, T)`` up to the first EOS."""

    def until_end(entries: list[int]) -> tuple[int, ...]:
        return tuple(entries[: entries.index(EOS)] if EOS in entries else entries)

    return [
        tuple(Hypothesis(until_end(row), value) for row, value in zip(rows, values, strict=True) if value > -np.inf)
        for rows, values in zip(sequences.tolist(), total.tolist(), strict=True)
    ]
