"""CIDEr and CIDEr-D (Vedantam et al., CVPR 2015). N-grams are numbered, and counted and compared by array operations.

Shapes: N photos, B hypotheses, T tokens of all captions, D distinct n-grams of one order, summed over the captions.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

Word = TypeVar("Word", str, int)

Tokens = tuple[str, ...]

ORDERS = 4  # n-grams of 1 to 4 words

_SIGMA = 6.0  # the standard deviation of the Gaussian length penalty


class Counts(NamedTuple):
    """The n-grams of one order in some captions; an n-gram's code is that of its first n - 1 tokens, and a token."""

    codes: NDArray[np.int64]
    """The code of each different n-gram, ascending; the position in this array is the n-gram's number."""
    captions: NDArray[np.int64]  # (D,), ascending
    numbers: NDArray[np.int64]  # (D,): the n-gram
    counts: NDArray[np.int64]  # (D,): how often the caption has the n-gram


class DocumentFrequencies:
    """The inverse document frequency (IDF) of each n-gram: log(photos / photos that have it in their captions)."""

    def __init__(self, counts: Sequence[Counts], owners: NDArray[np.int64], photos: int, tokens: int) -> None:
        """Count the photos of n-grams.

        ``counts`` are the n-grams of each order in captions of ids below ``tokens``; ``owners`` are the captions'
        photos, from 0 to ``photos`` - 1.
        """
        self._tokens = tokens
        self._codes = [order.codes for order in counts]
        self.idf = [self._idf(order, owners, photos) for order in counts]
        """For each order, the IDF of each n-gram, and last that of an n-gram that no photo has: log(photos)."""

    @staticmethod
    def _idf(counts: Counts, owners: NDArray[np.int64], photos: int) -> NDArray[np.float64]:
        ngrams = len(counts.codes)
        keys = np.unique(owners[counts.captions] * ngrams + counts.numbers)
        idf: NDArray[np.float64] = np.log(photos / np.bincount(keys % max(ngrams, 1), minlength=ngrams))
        return np.append(idf, math.log(photos))

    def find(self, counts: Sequence[Counts], tokens: int) -> Iterator[NDArray[np.int64]]:
        """Yield for each order the number of each n-gram that is counted, its position in ``idf``; -1 if unknown.

        ``tokens`` is the number of ids that the n-grams were counted with.
        """
        numbers = np.zeros(1, np.int64)  # of the n-grams of the order before
        for (counted, *_), known in zip(counts, self._codes, strict=True):
            prefixes, last = np.divmod(counted, max(tokens, 1))
            wanted = numbers[prefixes] * self._tokens + last
            found = known.searchsorted(wanted)
            is_known = (numbers[prefixes] >= 0) & (last < self._tokens)
            is_known &= np.append(known, -1)[found] == wanted
            numbers = np.where(is_known, found, -1)
            yield numbers


@dataclass(frozen=True)
class _Order:
    """The TF-IDF weights of the references' n-grams of one order, sorted by photo and n-gram."""

    ngrams: int
    """The number of different n-grams."""
    keys: NDArray[np.int64]  # (D,): photo and n-gram in one number, ascending
    captions: NDArray[np.int64]  # (D,): the reference
    weights: NDArray[np.float64]  # (D,): the weight of the n-gram in the reference
    norms: NDArray[np.float64]
    """The Euclidean norm of each reference's weights."""


class CiderReferences:
    """The references of all photos that are scored together, from which the document frequencies are counted."""

    def __init__(self, references: Sequence[Sequence[Tokens]]) -> None:
        self._ids: dict[str, int] = {}
        captions = [self.token_ids(tokens) for photo in references for tokens in photo]
        self._tokens = len(self._ids)  # the ids of tokens that are in no reference are not below this
        self._photos = len(references)
        self._references = np.array([len(photo) for photo in references])  # (N,): the references of each photo
        self._lengths = _lengths(captions)
        photos, counts = np.repeat(np.arange(self._photos), self._references), count_ngrams(captions, self._tokens)
        self._frequencies = DocumentFrequencies(counts, photos, self._photos, self._tokens)
        self._orders = [_weigh(*order, photos) for order in zip(counts, self._frequencies.idf, strict=True)]

    def token_ids(self, tokens: Sequence[str]) -> list[int]:
        """Return the ids of a caption's tokens, by which :meth:`score` knows them."""
        return [self._ids.setdefault(token, len(self._ids)) for token in tokens]

    def score(self, photos: Sequence[int], hypotheses: Sequence[Sequence[int]]) -> NDArray[np.float64]:
        """Return CIDEr-D and CIDEr ``(B, 2)``, both from 0 to 10, of captions given as :meth:`token_ids`.

        ``photos`` are the positions of their photos. As in the COCO scorer, the term frequency is the count of an
        n-gram, not its share of the caption: this makes no difference to a cosine, but it does to CIDEr-D's clipping.
        The length penalty compares numbers of bigrams.
        """
        own_photos, lengths = np.asarray(photos, np.int64), _lengths(hypotheses)
        scores = np.zeros((2, len(hypotheses)))
        all_counts = count_ngrams(hypotheses, len(self._ids))
        found = self._frequencies.find(all_counts, len(self._ids))
        for counts, numbers, idf, order in zip(all_counts, found, self._frequencies.idf, self._orders, strict=True):
            # The hypotheses' weights. An n-gram in no reference gets the IDF of one in a single photo's references.
            captions, weights = counts.captions, counts.counts * idf[numbers[counts.numbers]]
            norms = np.sqrt(np.bincount(captions, weights**2, len(hypotheses)))
            # Where references of the photo have the n-gram: one row for each of them.
            known = (numbers[counts.numbers] >= 0).nonzero()[0]
            keys = own_photos[captions[known]] * order.ngrams + numbers[counts.numbers[known]]
            first = order.keys.searchsorted(keys)
            repeats = order.keys.searchsorted(keys, "right") - first
            rows = np.repeat(known, repeats)
            matches = np.arange(len(rows)) + np.repeat(first - (repeats.cumsum() - repeats), repeats)
            # The products of the weights, divided by the norms: what the n-gram adds to the cosine.
            captions, weights = captions[rows], weights[rows]
            references, reference_weights = order.captions[matches], order.weights[matches]
            norm = norms[captions] * order.norms[references]
            share = np.divide(reference_weights, norm, out=np.zeros_like(norm), where=norm > 0)
            penalty = np.exp(-((lengths[captions] - self._lengths[references]) ** 2) / (2 * _SIGMA**2))
            clipped = penalty * np.minimum(weights, reference_weights) * share
            scores += [np.bincount(captions, values, len(hypotheses)) for values in (clipped, weights * share)]
        return (scores * (10 / (ORDERS * self._references[own_photos]))).T


def _weigh(counts: Counts, idf: NDArray[np.float64], photos: NDArray[np.int64]) -> _Order:
    """Return the weights of an order of the references; ``photos`` is the photo of each reference."""
    keys = photos[counts.captions] * len(counts.codes) + counts.numbers
    weights = counts.counts * idf[counts.numbers]
    norms = np.sqrt(np.bincount(counts.captions, weights**2, len(photos)))
    order = np.argsort(keys, kind="stable")
    return _Order(len(counts.codes), keys[order], counts.captions[order], weights[order], norms)


def count_ngrams(captions: Sequence[Sequence[int]], tokens: int) -> list[Counts]:
    """Count the n-grams of each order in captions of ids below ``tokens``.

    The code of an n-gram is ``tokens`` times the number of its first n - 1 tokens, plus the id of its last one.
    """
    lengths = np.array([len(caption) for caption in captions], np.int64)
    ids = np.fromiter(chain.from_iterable(captions), np.int64, lengths.sum())  # (T,)
    owners = np.repeat(np.arange(len(captions)), lengths)  # (T,)
    left = np.repeat(lengths.cumsum(), lengths) - np.arange(len(ids))  # (T,): tokens from here to the caption's end
    starts, numbers = np.arange(len(ids)), np.zeros(len(ids), np.int64)
    orders = []
    for order in range(1, ORDERS + 1):
        has_ngram = left[starts] >= order
        starts = starts[has_ngram]
        codes, numbers = np.unique(numbers[has_ngram] * tokens + ids[starts + order - 1], return_inverse=True)
        keys, counts = np.unique(owners[starts] * len(codes) + numbers, return_counts=True)
        orders.append(Counts(codes, *np.divmod(keys, max(len(codes), 1)), counts))
    return orders


def _lengths(captions: Sequence[Sequence[int]]) -> NDArray[np.int64]:
    """Return the number of bigrams plus 1 of each caption: the COCO scorer's penalty compares numbers of bigrams."""
    return np.array([max(1, len(tokens)) for tokens in captions], np.int64)


def ngrams(tokens: tuple[Word, ...]) -> Counter[tuple[Word, ...]]:
    """Return the counts of the n-grams of all orders of a caption, given as words or as word ids."""
    return Counter(tokens[i : i + n] for n in range(1, ORDERS + 1) for i in range(len(tokens) - n + 1))
