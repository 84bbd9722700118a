"""Decoding: from a decoder's next-word logits to captions, over a batch of photos at once.

Shapes: B photos, K hypotheses of each, N = B * K, M unfinished hypotheses, D distinct ones among them, V vocabulary,
T words so far.
"""

import zlib
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from capexp.captioning.consensus import Tokens, agreement
from capexp.captioning.decoder import Decoder
from capexp.captioning.neighbours import Neighbours
from capexp.data.batches import on_device
from capexp.data.vocabulary import BOS, EOS, PAD, Vocabulary
from capexp.errors import InputError
from capexp.settings import DecodingConfig

_LOGITS = 2**21
"""The limit of logits per step (8 MiB in float32) in consensus; 64 times as many on a GPU.

It decides how many photos are decoded at a time. Sampling allocates about ten tensors of this size.
"""

_COMPARED = 64  # photos whose captions are compared with those of neighbours at a time


@dataclass(frozen=True)
class Hypothesis:
    """A caption as entries of the vocabulary, without BOS and EOS."""

    tokens: tuple[int, ...]
    log_probability: float
    """The natural logarithm of the caption's probability, including EOS where the decoder emitted it."""


def decode(
    decoder: Decoder,
    features: Tensor,
    vocabulary: Vocabulary,
    config: DecodingConfig,
    neighbours: Neighbours | None = None,
) -> list[tuple[Hypothesis, ...]]:
    """Return the hypotheses of each photo, the best first, from features ``(B, P, F)``.

    Beam search and consensus give all hypotheses of the beam; greedy and sampling give one. PAD, BOS and UNK are never
    emitted, and probabilities are normalised over the other entries. A caption ends with EOS or at ``maximum_length``
    words. ``neighbours`` must be given if ``config`` takes captions of train photos into account.
    """
    check_beam_width(config, vocabulary)
    decoder.eval()
    if config.method == "sample":
        return _sample(decoder, features, vocabulary, config, 1)
    if config.method == "consensus":
        return _consensus(decoder, features, vocabulary, config, neighbours)
    width = config.beam_width if config.method == "beam" else 1
    return _beam(decoder, features, vocabulary, config, width)


def check_beam_width(config: DecodingConfig, vocabulary: Vocabulary) -> None:
    """Raise InputError if the beam is wider than the number of entries that may be emitted."""
    entries = len(vocabulary) - len(vocabulary.never_emitted)
    if config.method in ("beam", "consensus") and config.beam_width > entries:
        raise InputError(
            f"decoding.beam_width = {config.beam_width}: only {entries} entries of the vocabulary can be emitted; "
            "lower it"
        )


@torch.inference_mode()
def _beam(
    decoder: Decoder, features: Tensor, vocabulary: Vocabulary, config: DecodingConfig, width: int
) -> list[tuple[Hypothesis, ...]]:
    """Run beam search; width 1 is greedy. A finished hypothesis stays in the beam until better ones push it out.

    The decoder runs only on the M unfinished hypotheses. Before the first word there is one per photo.
    """
    photos, device = len(features), features.device
    first_rows = torch.arange(photos, device=device).unsqueeze(1) * width  # (B, 1): each photo's first row among N
    state = decoder.start(features)
    active = first_rows.flatten()  # (M,): the rows among N that the state holds
    forbidden = torch.tensor(vocabulary.never_emitted, device=device)
    sequences = torch.empty(photos, width, 0, dtype=torch.long, device=device)  # (B, K, T)
    words = torch.full((photos, width), BOS, device=device)
    # Before the first word all hypotheses of a photo are the same: only the first one counts.
    total = torch.full((photos, width), -torch.inf, device=device)
    total[:, 0] = 0
    lengths = torch.zeros(photos, width, device=device)
    ended = torch.zeros(photos, width, dtype=torch.bool, device=device)
    # A finished hypothesis has one continuation, itself, with log-probability 0.
    unchanged = torch.full((width,), -torch.inf, device=device)
    unchanged[0] = 0
    for _ in range(config.maximum_length):
        # The K best continuations of each hypothesis. More are not needed: a photo keeps only K in all.
        logits, state = decoder.step(state, words.flatten()[active])  # (M, V)
        log_probabilities = _log_probabilities(logits, forbidden, sequences.flatten(0, 1)[active], config)
        active_best, active_entries = log_probabilities.topk(width)  # (M, K)
        best = unchanged.repeat(photos * width, 1).index_copy(0, active, active_best)  # (N, K)
        entries = torch.full_like(best, EOS, dtype=torch.long).index_copy(0, active, active_entries)
        # The K best of all continuations of each photo.
        candidates = total.unsqueeze(2) + best.view(photos, width, width)  # (B, K, K)
        lengths = lengths + ~ended
        scores = candidates / lengths.unsqueeze(2) ** config.length_penalty
        chosen = scores.flatten(1).topk(width).indices  # (B, K), the best first
        origin = chosen // width  # (B, K): the hypothesis that each chosen one continues
        words = entries.view(photos, -1).gather(1, chosen)
        total = candidates.flatten(1).gather(1, chosen)
        lengths = lengths.gather(1, origin)
        ended = ended.gather(1, origin) | (words == EOS)
        earlier = sequences.gather(1, origin.unsqueeze(2).expand(-1, -1, sequences.shape[2]))
        sequences = torch.cat([earlier, words.unsqueeze(2)], 2)
        # Select the state of the hypotheses that are not finished. ``state_rows`` ``(N,)`` is the row in the state of
        # each active hypothesis.
        state_rows = torch.empty(photos * width, dtype=torch.long, device=device)
        state_rows[active] = torch.arange(len(active), device=device)
        active = (~ended).flatten().nonzero().squeeze(1)
        if len(active) == 0:
            break
        state = state.select(state_rows[(first_rows + origin).flatten()[active]])
    return _hypotheses(sequences, total)


@torch.inference_mode()
def _sample(
    decoder: Decoder, features: Tensor, vocabulary: Vocabulary, config: DecodingConfig, count: int
) -> list[tuple[Hypothesis, ...]]:
    """Sample ``count`` captions of each photo (top-p: Holtzman et al., ICLR 2020).

    Each photo has a random generator of its own, so that its captions do not depend on the batch. The decoder runs only
    on captions that are not finished, and once for those captions of a photo that are the same so far.
    """
    photos, device = len(features), features.device
    uniform = torch.tensor(_uniform(features, config, count), dtype=torch.float32, device=device)  # (N, T)
    state = decoder.start(features)
    forbidden = torch.tensor(vocabulary.never_emitted, device=device)
    active = torch.arange(photos * count, device=device)  # (M,): the rows among N of the unfinished captions
    rows = active // count  # (M,): the row of each in the state
    examples = active[::count]  # (D,): for each row of the state, one of its captions
    words = torch.full((photos,), BOS, device=device)  # (D,)
    sequences = torch.full((photos * count, config.maximum_length), EOS, device=device)  # (N, T)
    total = torch.zeros(photos * count, device=device)
    for step in range(config.maximum_length):
        logits, state = decoder.step(state, words)  # (D, V)
        log_probabilities = _log_probabilities(logits, forbidden, sequences[examples, :step], config)
        probabilities = (log_probabilities / config.temperature).softmax(1)
        drawn = _draw(probabilities, rows, uniform[active, step], config.top_p)  # (M,)
        total[active] += log_probabilities[rows, drawn]
        sequences[active, step] = drawn
        # Go on with the captions that are not finished.
        unfinished = drawn != EOS
        active, rows, drawn = active[unfinished], rows[unfinished], drawn[unfinished]
        if len(active) == 0:
            break
        pairs, places = torch.unique(rows * len(vocabulary) + drawn, return_inverse=True)
        state, words = state.select(pairs // len(vocabulary)), pairs % len(vocabulary)
        examples, rows = torch.empty_like(pairs).scatter_(0, places, active), places
    return _hypotheses(sequences.view(photos, count, -1), total.view(photos, count))


def _draw(probabilities: Tensor, rows: Tensor, uniform: Tensor, top_p: float) -> Tensor:
    """Draw a word from each of the given rows ``(M,)`` of probabilities ``(D, V)``.

    A row's words are put in order, the most probable first. Kept are the first words, up to the one with which their
    cumulative probability reaches ``top_p``. Their cumulative distribution is inverted at ``uniform`` ``(M,)``.
    """
    ordered, entries = _most_probable_first(probabilities)  # (D, V)
    cumulative = ordered.cumsum(1)
    kept = (cumulative - ordered < top_p).sum(1, keepdim=True)  # (D, 1)
    total = cumulative.gather(1, kept.clamp(min=1) - 1)  # (D, 1): the probability of all kept words
    places = torch.searchsorted(cumulative[rows], uniform.unsqueeze(1) * total[rows]).squeeze(1)
    return entries[rows, places.clamp(max=probabilities.shape[1] - 1)]


def _most_probable_first(probabilities: Tensor) -> tuple[Tensor, Tensor]:
    """Return each row's probabilities ``(D, V)`` in descending order, and their entries; equal ones stay in order."""
    if probabilities.is_cuda:
        ordered, entries = probabilities.sort(dim=1, descending=True, stable=True)
        return ordered, entries
    # NumPy sorts integers in a fifth of the time in which torch sorts floats. The upper half of each is minus the bits
    # of a probability, which order as the probability does because it is not negative; the lower half is the entry.
    keys = probabilities.view(torch.int32).long().neg_().bitwise_left_shift_(32)
    keys += torch.arange(probabilities.shape[1])
    keys.numpy().sort(1)
    return (keys >> 32).neg_().int().view(torch.float32), keys.bitwise_and_(2**32 - 1)


def _consensus(
    decoder: Decoder, features: Tensor, vocabulary: Vocabulary, config: DecodingConfig, neighbours: Neighbours | None
) -> list[tuple[Hypothesis, ...]]:
    """Rank the beam by minimum Bayes risk (Kumar and Byrne, 2004): by the mean similarity to other likely captions.

    The most probable caption is often an unusual one. This function compares with the beam's hypotheses and with
    captions sampled from the decoder. With ``config.neighbours`` it also compares with the reference captions of
    similar train photos, as Devlin et al. (2015) do; in this comparison n-grams have CIDEr-D's weights. With
    ``config.copy_neighbours`` these captions are ranked too, and the best of all take the place of the beam. At the end
    the beam is put in order by similarity and log-probability, as ``config.likelihood_weight`` says.
    """

    def parts(captions: int) -> tuple[Tensor, ...]:
        """Divide the photos so that ``captions`` of each do not have too many logits."""
        limit = 64 * _LOGITS if features.is_cuda else _LOGITS
        return torch.split(features, max(limit // len(vocabulary) // captions, 1))

    def tokens_of(captions: list[tuple[Hypothesis, ...]]) -> list[list[Tokens]]:
        return [[hypothesis.tokens for hypothesis in photo] for photo in captions]

    beams = [
        beam
        for part in parts(config.beam_width)
        for beam in _beam(decoder, part, vocabulary, config, config.beam_width)
    ]
    candidates = tokens_of(beams)
    others = candidates
    if config.samples:
        samples = [
            sampled
            for part in parts(config.samples)
            for sampled in _sample(decoder, part, vocabulary, config, config.samples)
        ]
        others = [beam + sampled for beam, sampled in zip(candidates, tokens_of(samples), strict=True)]
    similarities = agreement(candidates, others)
    if config.neighbours:
        assert neighbours is not None
        for start in range(0, len(beams), _COMPARED):
            part = slice(start, start + _COMPARED)
            near = neighbours.captions_near(features[part].cpu().numpy(), config.neighbours)
            captions, weights = [texts for texts, _ in near], [of_texts for _, of_texts in near]
            if config.copy_neighbours:
                candidates[part] = [
                    [*own, *_new_captions(theirs, own, vocabulary, config)]
                    for own, theirs in zip(candidates[part], captions, strict=True)
                ]
                similarities[part] = agreement(candidates[part], others[part])
            sums = agreement(candidates[part], captions, weights, neighbours.frequencies)
            similarities[part] = [
                (own + config.neighbour_weight * of_photo).round(12)  # the last digits depend on the other photos
                for own, of_photo in zip(similarities[part], sums, strict=True)
            ]
    ranks = [
        np.argsort(-similarity, kind="stable")[: len(beam)]
        for beam, similarity in zip(beams, similarities, strict=True)
    ]
    if config.copy_neighbours:
        best = _with_probabilities(decoder, features, vocabulary, config, beams, candidates, ranks)
    else:
        best = [tuple(beam[i] for i in rank) for beam, rank in zip(beams, ranks, strict=True)]
    return [
        _by_likelihood(hypotheses, similarity[rank], config.likelihood_weight)
        for hypotheses, similarity, rank in zip(best, similarities, ranks, strict=True)
    ]


def _new_captions(
    captions: list[Tokens], known: list[Tokens], vocabulary: Vocabulary, config: DecodingConfig
) -> list[Tokens]:
    """Return those captions, each once, that are not known and that the decoder might have emitted."""
    forbidden = set(vocabulary.never_emitted)

    def is_possible(caption: Tokens) -> bool:
        trigrams = list(zip(caption, caption[1:], caption[2:], strict=False))
        return (
            0 < len(caption) <= config.maximum_length
            and forbidden.isdisjoint(caption)
            and (config.repeat_trigrams or len(set(trigrams)) == len(trigrams))
        )

    already = set(known)
    return [caption for caption in dict.fromkeys(captions) if caption not in already and is_possible(caption)]


def _with_probabilities(
    decoder: Decoder,
    features: Tensor,
    vocabulary: Vocabulary,
    config: DecodingConfig,
    beams: list[tuple[Hypothesis, ...]],
    candidates: list[list[Tokens]],
    ranks: list[NDArray[np.int64]],
) -> list[tuple[Hypothesis, ...]]:
    """Return the candidates of each photo that are given by ``ranks``, with their log-probabilities.

    The candidates of a photo are its beam and then other captions, whose log-probabilities are computed here.
    """
    others = [(photo, candidates[photo][i]) for photo, rank in enumerate(ranks) for i in rank if i >= len(beams[photo])]
    values = iter(_caption_probabilities(decoder, features, vocabulary, config, others))
    return [
        tuple(beam[i] if i < len(beam) else Hypothesis(own[i], next(values)) for i in rank)
        for beam, own, rank in zip(beams, candidates, ranks, strict=True)
    ]


def _by_likelihood(
    hypotheses: tuple[Hypothesis, ...], similarity: NDArray[np.float64], weight: float
) -> tuple[Hypothesis, ...]:
    """Return hypotheses ordered by their similarities plus ``weight`` times their log-probabilities, the best first."""
    if not weight:
        return hypotheses
    scores = similarity + weight * np.array([hypothesis.log_probability for hypothesis in hypotheses])
    return tuple(hypotheses[i] for i in np.argsort(-scores, kind="stable"))


@torch.inference_mode()
def _caption_probabilities(
    decoder: Decoder,
    features: Tensor,
    vocabulary: Vocabulary,
    config: DecodingConfig,
    captions: list[tuple[int, Tokens]],
) -> list[float]:
    """Return the log-probability of each caption, of the photo at its position in ``features``.

    It includes EOS, but not after ``maximum_length`` words.
    """
    found: list[float] = []
    forbidden = torch.tensor(vocabulary.never_emitted, device=features.device)
    size = max((64 if features.is_cuda else 1) * _LOGITS // len(vocabulary), 1)
    for start in range(0, len(captions), size):
        part = captions[start : start + size]  # N
        photos = torch.tensor([photo for photo, _ in part], device=features.device)
        ended = [torch.tensor([*tokens, EOS][: config.maximum_length]) for _, tokens in part]
        targets = nn.utils.rnn.pad_sequence(ended, batch_first=True, padding_value=PAD).to(features.device)  # (N, T)
        words, total = torch.full_like(photos, BOS), torch.zeros(len(part), device=features.device)
        state = decoder.start(features).select(photos)
        for step in range(targets.shape[1]):
            logits, state = decoder.step(state, words)
            log_probabilities = _log_probabilities(logits, forbidden, targets[:, :step], config)  # (N, V)
            words = targets[:, step]
            total += torch.where(words == PAD, 0.0, log_probabilities.gather(1, words.unsqueeze(1)).squeeze(1))
        found += total.tolist()
    return found


def sample_captions(
    decoder: Decoder,
    features: Tensor,
    vocabulary: Vocabulary,
    count: int,
    maximum_length: int,
    fixed: bool | None = None,
) -> Tensor:
    """Sample ``count`` captions of each photo with torch's global random generator, as targets for training.

    Return ``(B * count, T)`` from features ``(B, P, F)``: the words, EOS, then PAD. The captions of a photo are
    adjacent rows. Raises FloatingPointError if the decoder's logits are not finite.

    ``fixed`` is as in :func:`sample_by_step`; by default it is true on a GPU, so that nothing waits before the end.
    """
    device = features.device
    fixed = device.type != "cpu" if fixed is None else fixed
    forbidden = on_device(torch.tensor(vocabulary.never_emitted), device)
    return finished_samples(*sample_by_step(decoder, features, forbidden, count, maximum_length, fixed))


def finished_samples(samples: Tensor, is_finite: Tensor) -> Tensor:
    """Return sampled captions ``(B * count, T)`` from the words by step ``(maximum_length, B * count)``.

    T is the length of the longest caption. Raises FloatingPointError if ``is_finite`` is false.
    """
    if not is_finite:
        raise FloatingPointError("logits are not finite")
    longest = int((samples != PAD).any(1).sum())
    return samples[:longest].t().contiguous()


@torch.no_grad()
def sample_by_step(
    decoder: Decoder, features: Tensor, forbidden: Tensor, count: int, maximum_length: int, fixed: bool
) -> tuple[Tensor, Tensor]:
    """Sample captions as :func:`sample_captions`; return them by step, and whether all logits were finite.

    They are ``(maximum_length, B * count)``. ``forbidden`` are the entries that are never emitted.

    The decoder runs only on captions that are not finished. If ``fixed``, it runs on all of them for ``maximum_length``
    steps: all shapes are known beforehand, nothing waits for a GPU, and a CUDA graph can capture it. Random numbers are
    drawn for all captions in both cases, so both draw the same ones.
    """
    rows, device = len(features) * count, features.device
    samples = torch.full((maximum_length, rows), PAD, device=device)
    active = torch.arange(rows, device=device)  # (M,): the captions that the state holds
    ended = torch.zeros(rows, dtype=torch.bool, device=device)
    is_finite = torch.ones((), dtype=torch.bool, device=device)
    # Before the first word all captions of a photo are the same.
    logits, state = decoder.step(decoder.start(features), torch.full((len(features),), BOS, device=device))
    logits, state = logits.repeat_interleave(count, 0), state.repeat(count)  # (M, V)
    for step in range(maximum_length):
        is_finite &= logits.isfinite().all()
        # Of exponential random numbers, each divided by its word's probability, the least is that of a word drawn with
        # that probability. Torch's own multinomial draws so too, but for all rows that it is given.
        times = torch.empty(rows, logits.shape[1], device=device).exponential_()
        probabilities = logits.float().index_fill(1, forbidden, -torch.inf).softmax(1)
        words = probabilities.div_(times if fixed else times[active]).argmax(1)
        if fixed:
            words = words.masked_fill(ended, PAD)
            ended |= words == EOS
            samples[step] = words
        else:
            samples[step, active] = words
            unfinished = (words != EOS).nonzero().squeeze(1)
            if len(unfinished) == 0 or not is_finite:
                break
            if len(unfinished) < len(words):
                state, words, active = state.select(unfinished), words[unfinished], active[unfinished]
        if step < maximum_length - 1:
            logits, state = decoder.step(state, words)
    return samples, is_finite


def _uniform(features: Tensor, config: DecodingConfig, count: int) -> np.ndarray:
    """Return uniform random numbers in (0, 1], ``count`` rows per photo and one column per step.

    A photo's numbers depend only on the seed and on its features.
    """
    checksums = [zlib.crc32(row.tobytes()) for row in features.float().cpu().numpy()]
    shape = (count, config.maximum_length)
    return np.concatenate([1 - np.random.default_rng([config.seed, checksum]).random(shape) for checksum in checksums])


def _log_probabilities(logits: Tensor, forbidden: Tensor, sequences: Tensor, config: DecodingConfig) -> Tensor:
    """Return the log-probabilities ``(M, V)`` of the next word after the words so far, ``(M, T)``.

    Forbidden entries have probability zero. If ``repeat_trigrams`` is false, a word that would repeat a trigram also
    has probability zero.
    """
    values = logits.float().index_fill_(1, forbidden, -torch.inf).log_softmax(1)
    if config.repeat_trigrams or sequences.shape[1] < 3:
        return values
    # Where the last two words occur earlier in the caption, forbid the word that followed them there.
    repeated = (sequences[:, :-2] == sequences[:, -2:-1]) & (sequences[:, 1:-1] == sequences[:, -1:])  # (M, T - 2)
    repeated &= sequences[:, 2:] != EOS
    return values.scatter_add(1, sequences[:, 2:], torch.where(repeated, -torch.inf, 0.0))


def _hypotheses(sequences: Tensor, total: Tensor) -> list[tuple[Hypothesis, ...]]:
    """Return each photo's hypotheses of non-zero probability, from entries ``(B, K, T)`` and log-probabilities."""

    def until_end(entries: list[int]) -> tuple[int, ...]:
        return tuple(entries[: entries.index(EOS)] if EOS in entries else entries)

    return [
        tuple(Hypothesis(until_end(row), value) for row, value in zip(rows, values, strict=True) if value > -np.inf)
        for rows, values in zip(sequences.tolist(), total.tolist(), strict=True)
    ]
