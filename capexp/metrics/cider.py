"""CIDEr and CIDEr-D (Vedantam et al., CVPR 2015) against references whose n-grams are counted once."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

Tokens = tuple[str, ...]

ORDERS = 4  # n-grams of 1 to 4 words

_SIGMA = 6.0


@dataclass(frozen=True)
class _Weighed:
    """A caption as CIDEr sees it."""

    vector: dict[Tokens, float]
    """TF-IDF of each n-gram."""
    norms: list[float]
    """Euclidean, of each order."""
    length: int
    """Number of word pairs, which the COCO scorer's length penalty compares."""


class CiderReferences:
    """The references of all photos that are scored together; document frequencies are theirs."""

    def __init__(self, references: Sequence[Sequence[Tokens]]) -> None:
        counts = [[ngrams(reference) for reference in photo] for photo in references]
        frequencies = Counter(ngram for photo in counts for ngram in set().union(*photo))
        self._photos = len(references)
        # A word that nobody has used weighs as one of a single photo.
        self._rarity = {ngram: math.log(self._photos / count) for ngram, count in frequencies.items()}
        self._references = [
            [self._weigh(tokens, count) for tokens, count in zip(photo, counted, strict=True)]
            for photo, counted in zip(references, counts, strict=True)
        ]

    def score(self, photo: int, hypothesis: Tokens) -> tuple[float, float]:
        """CIDEr-D and CIDEr of a caption of the photo in that place, times ten.

        As in the COCO scorer, a term's frequency is its count, not its share of the caption (a cosine cannot tell,
        CIDEr-D's clipping can), and the lengths that the penalty compares are numbers of word pairs.
        """
        own = self._weigh(hypothesis, ngrams(hypothesis))
        clipped, plain = 0.0, 0.0
        for reference in self._references[photo]:
            penalty = math.exp(-((own.length - reference.length) ** 2) / (2 * _SIGMA**2))
            for ngram, value in own.vector.items():  # in the caption's order: the sum's last digits are always the same
                norm = own.norms[len(ngram) - 1] * reference.norms[len(ngram) - 1]
                if norm and ngram in reference.vector:
                    clipped += penalty * min(value, reference.vector[ngram]) * reference.vector[ngram] / norm
                    plain += value * reference.vector[ngram] / norm
        scale = 10 / (ORDERS * len(self._references[photo]))
        return scale * clipped, scale * plain

    def _weigh(self, tokens: Tokens, counts: Counter[Tokens]) -> _Weighed:
        squares, alone = [0.0] * ORDERS, math.log(self._photos)
        vector = {ngram: count * self._rarity.get(ngram, alone) for ngram, count in counts.items()}
        for ngram, value in vector.items():
            squares[len(ngram) - 1] += value * value
        return _Weighed(vector, [math.sqrt(square) for square in squares], max(1, len(tokens)))


def ngrams(tokens: Tokens) -> Counter[Tokens]:
    """How often a caption holds each n-gram of any order."""
    return Counter(tokens[i : i + n] for n in range(1, ORDERS + 1) for i in range(len(tokens) - n + 1))
