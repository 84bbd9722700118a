"""BLEU, ROUGE-L and CIDEr of captions against reference captions, with bootstrap intervals and paired tests.

The n-grams of each photo are counted once, into ``PhotoScores``. Corpus scores, their bootstrap intervals and paired
comparisons are computed from weighted sums of these counts. ``bleu_1`` to ``bleu_4``, ``rouge_l`` and ``cider`` equal
the COCO scorer's values (pycocoevalcap) on the same tokens. Its conventions are followed; a comment names each one.

Shapes: N photos, S resamples.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from capexp.data import vocabulary
from capexp.data.tokenizer import split_words
from capexp.errors import InputError
from capexp.metrics.cider import ORDERS, CiderReferences, Tokens, ngrams
from capexp.settings import TokenRule

Scores = dict[str, NDArray[np.float64]]

_ROUGE_BETA = 1.2
_TUTORIAL_WEIGHTS = ((1.0, 0.0, 0.0, 0.0), (0.5, 0.5, 0.0, 0.0), (0.3, 0.3, 0.3, 0.0), (0.25, 0.25, 0.25, 0.25))
_PLAIN = re.compile("[a-z0-9]+(?:-[a-z0-9]+)*")
_BLOCK = 2**20  # photos drawn at a time for resamples: bounds the memory, 8 MB per array


def tokenize(caption: str, rule: TokenRule = "words") -> Tokens:
    """Return the tokens of a caption for scoring, not limited to a captioner's vocabulary.

    Rule ``words`` gives exactly the tokens of COCO's scorer, brackets and signs included.
    """
    return tuple(split_words(caption) if rule == "words" else vocabulary.tokenize(caption, "standard", rule))


def is_split_alone(word: str, rule: TokenRule) -> bool:
    """Return whether a word of a vocabulary surely has the same tokens in every caption.

    The caption's other words must be such words too. By rule ``words``, the tokens of words with dots or apostrophes
    may depend on the words beside them.
    """
    if rule == "characters":
        return tokenize(word, rule) == tuple(word)
    return rule == "whitespace" or _PLAIN.fullmatch(word) is not None


def tokenized(
    hypotheses: Sequence[str], references: Sequence[Sequence[str]], rule: TokenRule | Literal["tutorial"] = "words"
) -> list[tuple[Tokens, list[Tokens]]]:
    """Return each photo's hypothesis and references as tokens; every photo must have a reference.

    Rule ``tutorial`` cleans them as the tutorial does.
    """

    def split(caption: str) -> Tokens:
        return tuple(vocabulary.tokenize(caption, rule, "words")) if rule == "tutorial" else tokenize(caption, rule)

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
        (split(hypothesis), [split(reference) for reference in captions])
        for hypothesis, captions in zip(hypotheses, references, strict=True)
    ]


@dataclass(frozen=True, eq=False)
class PhotoScores:
    """The counts and scores of each photo, from which corpus scores are computed."""

    matches: NDArray[np.int64]
    """(N, 4): for each order, the hypothesis's n-grams that match, clipped at their highest count in one reference."""
    guesses: NDArray[np.int64]
    """(N, 4): for each order, the number of n-grams of the hypothesis."""
    lengths: NDArray[np.int64]
    """(N,): the number of tokens of the hypothesis."""
    closest_lengths: NDArray[np.int64]
    """(N,): the length of the reference closest in length to the hypothesis; of equally close ones, the shorter."""
    rouge_l: NDArray[np.float64]
    """(N,): ROUGE-L."""
    cider: NDArray[np.float64]
    """(N,): CIDEr-D, which papers report as CIDEr."""
    cider_plain: NDArray[np.float64]
    """(N,): the original CIDEr, without clipping and length penalty."""

    def corpus(self) -> dict[str, float]:
        """Return ``bleu_1`` to ``bleu_4``, ``rouge_l``, ``cider`` and ``cider_plain`` over all photos."""
        weights = np.ones((1, len(self.lengths)))
        return {key: float(values[0]) for key, values in self._weighted(weights).items()}

    def resampled(self, samples: int, seed: int) -> Scores:
        """Return each corpus score for S bootstrap resamples of the photos, ``(S,)`` per key.

        The resamples depend only on the seed and the number of photos, so that two captioners can be compared on the
        same ones. CIDEr's document frequencies are always counted over all photos: a resample changes only the weights
        of the photos.
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
        """Return 95% bootstrap percentile intervals: how much the scores vary with the choice of photos alone."""
        bounds = {key: np.quantile(values, [0.025, 0.975]) for key, values in self.resampled(samples, seed).items()}
        return {key: (float(low), float(high)) for key, (low, high) in bounds.items()}

    def _weighted(self, weights: NDArray[np.float64]) -> Scores:
        """Return the corpus scores ``(S,)`` per key for S weightings of the photos, ``(S, N)``."""
        matches, guesses = weights @ self.matches, weights @ self.guesses  # (S, 4)
        # The COCO scorer's constants instead of zeros: captions of three words, which have no 4-grams, get the
        # precision 1e-15 / 1e-9 and BLEU-4 > 0.
        precisions = (matches + 1e-15) / (guesses + 1e-9)
        means = np.cumprod(precisions, axis=1) ** (1 / np.arange(1, ORDERS + 1))
        ratio = (weights @ self.lengths + 1e-15) / (weights @ self.closest_lengths + 1e-9)  # (S,)
        bleu = means * np.exp(np.minimum(0, 1 - 1 / ratio))[:, None]
        scores: Scores = {f"bleu_{order + 1}": bleu[:, order] for order in range(ORDERS)}
        photos = weights.sum(axis=1)
        for key in ("rouge_l", "cider", "cider_plain"):
            scores[key] = weights @ getattr(self, key) / photos
        return scores


def score(hypotheses: Sequence[str], references: Sequence[Sequence[str]], rule: TokenRule = "words") -> PhotoScores:
    """Count the n-grams that each photo's caption shares with its references, and score each photo.

    * BLEU: Papineni et al., ACL 2002, at corpus level, with the closest reference length.
    * ROUGE-L: Lin, 2004, with beta 1.2, from the best precision and the best recall over the references.
    * CIDEr and CIDEr-D: Vedantam et al., CVPR 2015, times ten, without stemming. Document frequencies are counted in
      ``references``, so a score depends on which photos are scored together. For a single photo it is 0, because every
      n-gram occurs in all documents.

    Conventions of the COCO scorer: an empty caption has ROUGE-L 1 against an empty reference, and an n-gram that
    occurs in the references of every photo does not count in CIDEr. If no reference has a token,
    the COCO scorer crashes; this function returns CIDEr 0.
    """
    photos = tokenized(hypotheses, references, rule)
    bleu = [_bleu_counts(*photo) for photo in photos]
    cider_references = CiderReferences([captions for _, captions in photos])
    cider = cider_references.score(  # (N, 2)
        range(len(photos)), [cider_references.token_ids(hypothesis) for hypothesis, _ in photos]
    )
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
    """The score of one captioner minus that of another on the same photos."""

    value: float
    low: float
    high: float
    """The bounds of the 95% bootstrap percentile interval are ``low`` and ``high``."""
    p: float
    """The two-sided p-value: never 0, and 1 where the captioners do not differ."""


def paired_difference(a: PhotoScores, b: PhotoScores, samples: int = 10_000, seed: int = 1) -> dict[str, Difference]:
    """Return each score of ``a`` minus ``b``'s on the same photos, by a paired bootstrap (Koehn, EMNLP 2004).

    Both are scored on the same resamples. With d the difference in a resample, the p-value is
    ``min(1, 2 (1 + min(#(d <= 0), #(d >= 0))) / (S + 1))``: twice the share of resamples on the rarer side of zero,
    where a tie counts for both sides, and one resample is added so that p is never 0.

    It tests whether the difference would hold for other photos of the same kind, not for another training seed. It
    needs tens of photos: with a single one all resamples are alike, and p is the smallest possible value.
    """
    assert len(a.lengths) == len(b.lengths), (len(a.lengths), len(b.lengths))
    values_a, values_b = a.corpus(), b.corpus()
    resampled_a, resampled_b = a.resampled(samples, seed), b.resampled(samples, seed)
    differences = {}
    for key in values_a:
        resampled = resampled_a[key] - resampled_b[key]  # (S,)
        low, high = np.quantile(resampled, [0.025, 0.975])
        rarer = int(min((resampled <= 0).sum(), (resampled >= 0).sum()))
        p = min(1.0, 2 * (1 + rarer) / (samples + 1))
        differences[key] = Difference(values_a[key] - values_b[key], float(low), float(high), p)
    return differences


def tutorial_bleu(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return ``tutorial_bleu_1`` to ``tutorial_bleu_4``, by the protocol of the well-known Flickr8k tutorial.

    They are not comparable with BLEU: every hypothesis and reference has a start and an end word, so that two words of
    each caption always match; references are cleaned as the tutorial cleans its train captions; and the weights of
    BLEU-3 sum to 0.9. Hypotheses are cleaned in the same way, which does not change the captions of the tutorial's own
    captioner. The values equal those of NLTK's ``corpus_bleu``: a caption without n-grams of an order counts as having
    one, and without any match the precision is the smallest positive float.
    """
    framed = [
        (("startseq", *hypothesis, "endseq"), [("startseq", *reference, "endseq") for reference in captions])
        for hypothesis, captions in tokenized(hypotheses, references, "tutorial")
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
    """Return the numbers of clipped matches and of n-grams for each order, and the closest reference length."""
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
    """Return the F-measure of the longest common subsequence; an empty caption counts as one empty token."""
    tokens = hypothesis or ("",)
    precision, recall = 0.0, 0.0
    for reference in references:
        reference_tokens = reference or ("",)
        common = _common_subsequence(tokens, reference_tokens)
        precision, recall = max(precision, common / len(tokens)), max(recall, common / len(reference_tokens))
    if not precision:
        return 0.0
    return (1 + _ROUGE_BETA**2) * precision * recall / (recall + _ROUGE_BETA**2 * precision)


def _common_subsequence(first: Tokens, second: Tokens) -> int:
    """Return the length of the longest common subsequence, by dynamic programming row by row."""
    above = [0] * (len(second) + 1)
    for token in first:
        row = [0]
        for column, other in enumerate(second):
            row.append(above[column] + 1 if token == other else max(above[column + 1], row[column]))
        above = row
    return above[-1]
