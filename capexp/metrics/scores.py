"""How captions compare with people's: BLEU, ROUGE-L and CIDEr over photos, and how sure these numbers are.

Each photo is counted once, into ``PhotoScores``; a corpus score, its bootstrap interval and a paired comparison
are sums over these counts. ``bleu_1`` to ``bleu_4``, ``rouge_l`` and ``cider`` are the numbers of the COCO
scorer (pycocoevalcap) on the same tokens, its conventions included; each is named where it is followed.

Shapes: N photos, S resamples.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from capexp.data import vocabulary
from capexp.errors import InputError
from capexp.metrics.cider import ORDERS, CiderReferences, Tokens, ngrams
from capexp.settings import Cleaning

Scores = dict[str, NDArray[np.float64]]

_ROUGE_BETA = 1.2
_TUTORIAL_WEIGHTS = ((1.0, 0.0, 0.0, 0.0), (0.5, 0.5, 0.0, 0.0), (0.3, 0.3, 0.3, 0.0), (0.25, 0.25, 0.25, 0.25))
_BLOCK = 2**20  # photos drawn at once: bounds memory, 8 MB an array


def tokenize(caption: str) -> Tokens:
    """The tokens that are scored: cleaning ``standard``, whatever words the captioner itself knows."""
    return tuple(vocabulary.tokenize(caption, "standard"))


def tokenized(
    hypotheses: Sequence[str], references: Sequence[Sequence[str]], cleaning: Cleaning = "standard"
) -> list[tuple[Tokens, list[Tokens]]]:
    """Each photo's hypothesis and references as tokens.

    Raises:
        InputError: no photos, or a photo without references.
    """
    assert len(hypotheses) == len(references), (len(hypotheses), len(references))
    if not hypotheses:
        raise InputError("scores: there are 0 photos to score; give at least one")
    for position, captions in enumerate(references):
        if not captions:
            raise InputError(
                f"scores: photo {position} (counted from 0) of {len(references)} has no reference captions; "
                "give it one or leave it out"
            )
    return [
        (tuple(vocabulary.tokenize(caption, cleaning)), [tuple(vocabulary.tokenize(one, cleaning)) for one in captions])
        for caption, captions in zip(hypotheses, references, strict=True)
    ]


@dataclass(frozen=True, eq=False)
class PhotoScores:
    """What each photo adds to the corpus scores."""

    matches: NDArray[np.int64]
    """(N, 4) n-grams of the hypothesis that are in a reference, each counted as often as there at most."""
    guesses: NDArray[np.int64]
    """(N, 4) n-grams of the hypothesis."""
    lengths: NDArray[np.int64]
    """(N,) tokens of the hypothesis."""
    closest_lengths: NDArray[np.int64]
    """(N,) tokens of the reference closest in length to the hypothesis, the shorter of two as close."""
    rouge_l: NDArray[np.float64]
    """(N,)"""
    cider: NDArray[np.float64]
    """(N,) CIDEr-D: what papers report as CIDEr."""
    cider_plain: NDArray[np.float64]
    """(N,) CIDEr without clipping and length penalty."""

    def corpus(self) -> dict[str, float]:
        """``bleu_1`` to ``bleu_4``, ``rouge_l``, ``cider`` and ``cider_plain`` over all photos."""
        once = np.ones((1, len(self.lengths)))
        return {key: float(values[0]) for key, values in self._weighted(once).items()}

    def resampled(self, samples: int, seed: int) -> Scores:
        """Each corpus score over bootstrap resamples of the photos, (S,) a key.

        The same seed draws the same photos from any scores of as many photos. CIDEr's document frequencies stay
        those of the photos scored: a resample weighs the photos anew, it does not count their words anew.
        """
        assert samples > 0, samples
        random, photos = np.random.default_rng(seed), len(self.lengths)
        rows = max(1, _BLOCK // photos)
        blocks = []
        for start in range(0, samples, rows):
            size = min(rows, samples - start)
            drawn = random.integers(photos, size=(size, photos)) + photos * np.arange(size)[:, None]
            weights = np.bincount(drawn.ravel(), minlength=size * photos).reshape(size, photos)  # (S, N)
            blocks.append(self._weighted(weights.astype(np.float64)))
        return {key: np.concatenate([block[key] for block in blocks]) for key in blocks[0]}

    def intervals(self, samples: int = 1000, seed: int = 1) -> dict[str, tuple[float, float]]:
        """95% bootstrap percentile intervals: how far the scores move with the choice of photos, nothing else."""
        ends = {key: np.quantile(values, [0.025, 0.975]) for key, values in self.resampled(samples, seed).items()}
        return {key: (float(low), float(high)) for key, (low, high) in ends.items()}

    def _weighted(self, weights: NDArray[np.float64]) -> Scores:
        """The corpus scores for each row of how often each photo counts, (S, N) to (S,) a key."""
        matches, guesses = weights @ self.matches, weights @ self.guesses  # (S, 4)
        # The COCO scorer's constants in place of a zero: captions of three words have BLEU-4 > 0 through 1e-15 / 1e-9.
        precisions = (matches + 1e-15) / (guesses + 1e-9)
        means = np.cumprod(precisions, axis=1) ** (1 / np.arange(1, ORDERS + 1))
        ratio = (weights @ self.lengths + 1e-15) / (weights @ self.closest_lengths + 1e-9)  # (S,)
        bleu = means * np.exp(np.minimum(0, 1 - 1 / ratio))[:, None]
        scores: Scores = {f"bleu_{order + 1}": bleu[:, order] for order in range(ORDERS)}
        photos = weights.sum(axis=1)
        for key in ("rouge_l", "cider", "cider_plain"):
            scores[key] = weights @ getattr(self, key) / photos
        return scores


def score(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> PhotoScores:
    """Counts what each photo's caption shares with its references.

    BLEU: Papineni et al., ACL 2002, corpus level, closest reference length. ROUGE-L: Lin, 2004, beta 1.2, the best
    precision and the best recall over the references. CIDEr and CIDEr-D: Vedantam et al., CVPR 2015, times ten,
    without stemming; document frequencies come from the references given here, so a score depends on which photos
    are scored together, and that of a single photo is 0 (no word tells it from others). Where the COCO scorer
    crashes, all references without a token, CIDEr is 0. Its other conventions stay: an empty caption has ROUGE-L 1
    against an empty reference, and a word that every photo's references hold is worth nothing in CIDEr.

    Raises:
        InputError: no photos, or a photo without references.
    """
    photos = tokenized(hypotheses, references)
    bleu = [_bleu_counts(*photo) for photo in photos]
    people = CiderReferences([captions for _, captions in photos])
    cider = np.array([people.score(photo, hypothesis) for photo, (hypothesis, _) in enumerate(photos)])  # (N, 2)
    return PhotoScores(
        matches=np.array([matches for matches, _, _ in bleu], dtype=np.int64),
        guesses=np.array([guesses for _, guesses, _ in bleu], dtype=np.int64),
        lengths=np.array([len(hypothesis) for hypothesis, _ in photos], dtype=np.int64),
        closest_lengths=np.array([closest for _, _, closest in bleu], dtype=np.int64),
        rouge_l=np.array([_rouge_l(*photo) for photo in photos]),
        cider=cider[:, 0],
        cider_plain=cider[:, 1],
    )


@dataclass(frozen=True)
class Difference:
    """How much better the first of two captioners scores on the same photos."""

    value: float
    low: float
    high: float
    """Ends of the 95% bootstrap percentile interval."""
    p: float
    """Two-sided; never 0, and 1 where nothing differs."""


def paired_difference(a: PhotoScores, b: PhotoScores, samples: int = 10_000, seed: int = 1) -> dict[str, Difference]:
    """The paired bootstrap (Koehn, EMNLP 2004): each score of ``a`` minus that of ``b``, for the same photos.

    Both are scored on the same resamples. p is twice the share of resamples on the rarer side of zero, a tie
    counting for both sides and one more resample for each: ``min(1, 2 (1 + min(#(d <= 0), #(d >= 0))) / (S + 1))``.
    It speaks of other photos of the same kind, not of another seed of training, and needs tens of photos: all resamples
    of a single one are that photo, and p is as small as it gets.
    """
    assert len(a.lengths) == len(b.lengths), (len(a.lengths), len(b.lengths))
    values_a, values_b = a.corpus(), b.corpus()
    resampled_a, resampled_b = a.resampled(samples, seed), b.resampled(samples, seed)
    differences = {}
    for key in values_a:
        moved = resampled_a[key] - resampled_b[key]  # (S,)
        low, high = np.quantile(moved, [0.025, 0.975])
        rarer = int(min((moved <= 0).sum(), (moved >= 0).sum()))
        p = min(1.0, 2 * (1 + rarer) / (samples + 1))
        differences[key] = Difference(values_a[key] - values_b[key], float(low), float(high), p)
    return differences


def tutorial_bleu(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """``tutorial_bleu_1`` to ``tutorial_bleu_4``, by the protocol of the well-known Flickr8k tutorial.

    Not comparable with BLEU: a start and an end word stand in every caption on both sides (two words and a short
    caption's ends are always right), references are cleaned as its train captions are, and the weights of BLEU-3
    sum to 0.9. Hypotheses get the same cleaning, which changes nothing that its own captioner says. Equal to NLTK's
    ``corpus_bleu``: a caption with no n-grams counts one guess, and no match is a precision of the smallest float.

    Raises:
        InputError: no photos, or a photo without references.
    """
    framed = [
        (("startseq", *hypothesis, "endseq"), [("startseq", *one, "endseq") for one in captions])
        for hypothesis, captions in tokenized(hypotheses, references, cleaning="tutorial")
    ]
    counts = [_bleu_counts(*photo) for photo in framed]
    length, closest = sum(len(hypothesis) for hypothesis, _ in framed), sum(closest for *_, closest in counts)
    logs = []
    for order in range(ORDERS):
        matched = sum(matches[order] for matches, *_ in counts)
        guessed = sum(max(1, guesses[order]) for _, guesses, _ in counts)
        logs.append(math.log(matched / guessed if matched else np.finfo(np.float64).tiny))
    brevity = min(0.0, 1 - closest / length)
    return {
        f"tutorial_bleu_{order}": math.exp(brevity + sum(w * log for w, log in zip(weights, logs, strict=True)))
        for order, weights in enumerate(_TUTORIAL_WEIGHTS, start=1)
    }


def _bleu_counts(hypothesis: Tokens, references: list[Tokens]) -> tuple[list[int], list[int], int]:
    """Matches and guesses of each order, and the closest reference length."""
    allowed: Counter[Tokens] = Counter()
    for reference in references:
        allowed |= ngrams(reference)
    matches = [0] * ORDERS
    for ngram, count in (ngrams(hypothesis) & allowed).items():
        matches[len(ngram) - 1] += count
    guesses = [max(0, len(hypothesis) - order) for order in range(ORDERS)]
    closest = min((len(reference) for reference in references), key=lambda r: (abs(r - len(hypothesis)), r))
    return matches, guesses, closest


def _rouge_l(hypothesis: Tokens, references: list[Tokens]) -> float:
    """F-measure of the longest common subsequence; an empty caption counts as one empty token."""
    said = hypothesis or ("",)
    precision, recall = 0.0, 0.0
    for reference in references:
        wanted = reference or ("",)
        common = _common_subsequence(said, wanted)
        precision, recall = max(precision, common / len(said)), max(recall, common / len(wanted))
    if not precision:
        return 0.0
    return (1 + _ROUGE_BETA**2) * precision * recall / (recall + _ROUGE_BETA**2 * precision)


def _common_subsequence(first: Tokens, second: Tokens) -> int:
    """The length of the longest common subsequence, row by row of the usual table."""
    above = [0] * (len(second) + 1)
    for token in first:
        row = [0]
        for column, other in enumerate(second):
            row.append(above[column] + 1 if token == other else max(above[column + 1], row[column]))
        above = row
    return above[-1]
