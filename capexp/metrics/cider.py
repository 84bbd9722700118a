"""CIDEr and CIDEr-D (Vedantam et al., CVPR 2015). N-grams are numbered, and counted and compared by array operations.

Shapes: N photos, B hypotheses, T tokens of all captions, D distinct n-grams of one order, summed over the captions.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

Word = TypeVar("Word", str, int)

Tokens = tuple[str, ...]

ORDERS = 4  # n-grams of 1 to 4 words

_SIGMA = 6.0  # the standard deviation of the Gaussian length penalty


class _Counts(NamedTuple):
    """The n-grams of one order in some captions; an n-gram's code is that of its first n - 1 tokens, and a token."""

    codes: NDArray[np.int64]
    """The code of each different n-gram, ascending; the position in this array is the n-gram's number."""
    captions: NDArray[np.int64]  # (D,), ascending
    numbers: NDArray[np.int64]  # (D,): the n-gram
    counts: NDArray[np.int64]  # (D,): how often the caption has the n-gram


@dataclass(frozen=True)
class _Order:
    """The TF-IDF weights of the references' n-grams of one order, sorted by photo and n-gram."""

    codes: NDArray[np.int64]
    """The code of each n-gram, ascending."""
    idf: NDArray[np.float64]
    """The inverse document frequency of each n-gram."""
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
        photos = np.repeat(np.arange(self._photos), self._references)
        self._orders = [self._weigh(counts, photos) for counts in _count(captions, self._tokens)]

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
        numbers = np.zeros(1, np.int64)  # the references' number of each n-gram of the last order; -1 for none
        for counts, order in zip(_count(hypotheses, len(self._ids)), self._orders, strict=True):
            numbers = self._find(counts.codes, numbers, order)
            # The hypotheses' weights. An n-gram in no reference gets the IDF of one in a single photo's references.
            idf = np.append(order.idf, math.log(self._photos))[numbers]
            captions, weights = counts.captions, counts.counts * idf[counts.numbers]
            norms = np.sqrt(np.bincount(captions, weights**2, len(hypotheses)))
            # Where references of the photo have the n-gram: one row for each of them.
            known = (numbers[counts.numbers] >= 0).nonzero()[0]
            keys = own_photos[captions[known]] * len(order.codes) + numbers[counts.numbers[known]]
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

    def _weigh(self, counts: _Counts, photos: NDArray[np.int64]) -> _Order:
        """Return the weights of an order; ``photos`` is the photo of each reference."""
        keys = photos[counts.captions] * len(counts.codes) + counts.numbers
        frequencies = np.bincount(np.unique(keys) % max(len(counts.codes), 1), minlength=len(counts.codes))
        idf: NDArray[np.float64] = np.log(self._photos / frequencies)
        weights = counts.counts * idf[counts.numbers]
        norms = np.sqrt(np.bincount(counts.captions, weights**2, len(photos)))
        order = np.argsort(keys, kind="stable")
        return _Order(counts.codes, idf, keys[order], counts.captions[order], weights[order], norms)

    def _find(self, codes: NDArray[np.int64], prefixes: NDArray[np.int64], order: _Order) -> NDArray[np.int64]:
        """Return the references' number of each n-gram with a hypothesis's code; -1 for one that no reference has.

        ``prefixes`` are the references' numbers of the hypotheses' n-grams of the order before, -1 included.
        """
        own_prefixes, tokens = np.divmod(codes, max(len(self._ids), 1))
        wanted = prefixes[own_prefixes] * self._tokens + tokens
        found = order.codes.searchsorted(wanted)
        is_known = (prefixes[own_prefixes] >= 0) & (tokens < self._tokens)
        is_known &= np.append(order.codes, -1)[found] == wanted
        return np.where(is_known, found, -1)


def _count(captions: Sequence[Sequence[int]], tokens: int) -> list[_Counts]:
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
        orders.append(_Counts(codes, *np.divmod(keys, max(len(codes), 1)), counts))
    return orders


def _lengths(captions: Sequence[Sequence[int]]) -> NDArray[np.int64]:
    """Return the number of bigrams plus 1 of each caption: the COCO scorer's penalty compares numbers of bigrams."""
    return np.array([max(1, len(tokens)) for tokens in captions], np.int64)


def ngrams(tokens: tuple[Word, ...]) -> Counter[tuple[Word, ...]]:
    """Return the counts of the n-grams of all orders of a caption, given as words or as word ids."""
    return Counter(tokens[i : i + n] for n in range(1, ORDERS + 1) for i in range(len(tokens) - n + 1))
