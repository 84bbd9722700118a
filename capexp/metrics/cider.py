"""CIDEr and CIDEr-D (Vedantam et al., CVPR 2015). The n-grams of the references are counted only once."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

Word = TypeVar("Word", str, int)

Tokens = tuple[str, ...]

ORDERS = 4  # n-grams of 1 to 4 words

_SIGMA = 6.0  # the standard deviation of the Gaussian length penalty


@dataclass(frozen=True)
class _WeightedCaption:
    """A caption as a TF-IDF vector over its n-grams."""

    vector: dict[Tokens, float]
    """The TF-IDF weight of each n-gram."""
    norms: list[float]
    """The Euclidean norm of the weights of each order."""
    length: int
    """The number of bigrams plus 1: the COCO scorer's length penalty compares numbers of bigrams."""


class CiderReferences:
    """The references of all photos that are scored together, from which the document frequencies are counted."""

    def __init__(self, references: Sequence[Sequence[Tokens]]) -> None:
        counts = [[ngrams(reference) for reference in photo] for photo in references]
        frequencies = Counter(ngram for photo in counts for ngram in set().union(*photo))
        self._photos = len(references)
        # An n-gram that is in no reference gets the IDF of one that is in the references of a single photo.
        self._idf = {ngram: math.log(self._photos / count) for ngram, count in frequencies.items()}
        self._references = [
            [self._weighted(tokens, count) for tokens, count in zip(photo, counted, strict=True)]
            for photo, counted in zip(references, counts, strict=True)
        ]

    def score(self, photo: int, hypothesis: Tokens) -> tuple[float, float]:
        """Return CIDEr-D and CIDEr, both from 0 to 10, of a caption of the photo at position ``photo``.

        As in the COCO scorer, the term frequency is the count of an n-gram, not its share of the caption: this makes no
        difference to a cosine, but it does to CIDEr-D's clipping. The length penalty compares numbers of bigrams.
        """
        own = self._weighted(hypothesis, ngrams(hypothesis))
        clipped, plain = 0.0, 0.0
        for reference in self._references[photo]:
            penalty = math.exp(-((own.length - reference.length) ** 2) / (2 * _SIGMA**2))
            for ngram, value in own.vector.items():  # in a fixed order: the sum's rounding depends on it
                norm = own.norms[len(ngram) - 1] * reference.norms[len(ngram) - 1]
                if norm and ngram in reference.vector:
                    clipped += penalty * min(value, reference.vector[ngram]) * reference.vector[ngram] / norm
                    plain += value * reference.vector[ngram] / norm
        scale = 10 / (ORDERS * len(self._references[photo]))
        return scale * clipped, scale * plain

    def _weighted(self, tokens: Tokens, counts: Counter[Tokens]) -> _WeightedCaption:
        squares, unknown = [0.0] * ORDERS, math.log(self._photos)
        vector = {ngram: count * self._idf.get(ngram, unknown) for ngram, count in counts.items()}
        for ngram, value in vector.items():
            squares[len(ngram) - 1] += value * value
        return _WeightedCaption(vector, [math.sqrt(square) for square in squares], max(1, len(tokens)))


def ngrams(tokens: tuple[Word, ...]) -> Counter[tuple[Word, ...]]:
    """Return the counts of the n-grams of all orders of a caption, given as words or as word ids."""
    return Counter(tokens[i : i + n] for n in range(1, ORDERS + 1) for i in range(len(tokens) - n + 1))
