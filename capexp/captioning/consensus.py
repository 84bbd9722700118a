"""The agreement of several captions of one photo: how similar each is to the others.

Shapes: B photos, C candidates of each, R other captions of each, S captions in all, G distinct n-grams of each caption
in all, M n-grams in all, U columns.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from capexp.data.vocabulary import EOS
from capexp.metrics.cider import ORDERS, DocumentFrequencies, count_ngrams

Tokens = tuple[int, ...]
Integers = NDArray[np.int64]

_SIGMA = 6.0  # the standard deviation, in words, of the Gaussian penalty on differences in length


def agreement(
    candidates: Sequence[Sequence[Tokens]],
    others: Sequence[Sequence[Tokens]],
    weights: Sequence[NDArray[np.float64]] | None = None,
    frequencies: DocumentFrequencies | None = None,
) -> list[NDArray[np.float64]]:
    """Return for each photo the similarities ``(C,)`` of each candidate to the other captions, from 0 to 1 each.

    They are summed with the ``weights`` ``(R,)`` of the photo's other captions; by default their mean is taken.

    A similarity is CIDEr-D (Vedantam et al., CVPR 2015): for each order, the cosine of the n-gram counts, with the
    candidate's counts clipped at the other caption's, and reduced if the lengths differ. EOS counts as a word. The mean
    is taken only over the orders for which the longer of the two captions has n-grams, so that a caption of one or two
    words has similarity 1 to itself.

    With ``frequencies`` each count is multiplied by the n-gram's inverse document frequency, as in CIDEr-D; otherwise
    rare and frequent n-grams count alike.
    """
    photos = len(candidates)
    groups = [*candidates, *others]
    sizes = np.array([len(group) for group in groups])
    most_own, most_theirs = sizes[:photos].max(), sizes[photos:].max()  # C, R
    of_group, slots = np.repeat(np.arange(2 * photos), sizes), _count_up(sizes)  # (S,): a caption's group, place in it
    captions = [(*tokens, EOS) for group in groups for tokens in group]
    lengths = np.array([len(caption) for caption in captions])
    tokens = 1 + max(map(max, captions))
    counts = count_ngrams(captions, tokens)
    ngram_weights = [np.ones(len(order.codes)) for order in counts]
    if frequencies is not None:
        found = frequencies.find(counts, tokens)
        ngram_weights = [idf[numbers] for idf, numbers in zip(frequencies.idf, found, strict=True)]

    def by_photo(values: NDArray[Any], fill: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Arrange a value of each caption ``(S,)`` in tables ``(B, C, 1)`` and ``(B, 1, R)``."""
        table = np.full((2 * photos, sizes.max()), fill, np.float64)
        table[of_group, slots] = values
        return table[:photos, :most_own, None], table[photos:, None, :most_theirs]

    own_lengths, their_lengths = by_photo(lengths, fill=1)
    similarity = np.zeros((photos, most_own, most_theirs))
    for (codes, caption, number, count), weight in zip(counts, ngram_weights, strict=True):
        squares = weight[number] ** 2  # (G,)
        own_norms, their_norms = by_photo(np.sqrt(np.bincount(caption, count**2 * squares, len(captions))), fill=0)
        norms = own_norms * their_norms
        # The sum of min(a, b) b over the n-grams with counts a and b, as a product of matrices: the k-th occurrence of
        # an n-gram in a photo's caption has a column of its own. Two captions share the columns up to k = min(a, b).
        ngram = of_group[caption] % photos * len(codes) + number  # (G,): numbered in order of photos
        column = np.repeat(ngram, count) * count.max(initial=0) + _count_up(count)  # (M,)
        values, caption = np.repeat(count * squares, count), np.repeat(caption, count)  # (M,)
        group, slot, is_own = of_group[caption], slots[caption], of_group[caption] < photos  # (M,)
        columns, first = np.unique(column[is_own], return_index=True)  # (U,): those of candidates, in order of photos
        per_photo = np.bincount(group[is_own][first], minlength=photos)  # (B,)
        at = np.searchsorted(columns, column)  # (M,)
        is_shared = np.searchsorted(columns, column, side="right") > at
        own_table = np.zeros((photos, most_own, per_photo.max()))
        their_table = np.zeros((photos, most_theirs, per_photo.max()))
        place = _count_up(per_photo)  # (U,): a column's place among those of its photo
        own_table[group[is_own], slot[is_own], place[at[is_own]]] = 1
        shared = is_shared & ~is_own
        their_table[group[shared] - photos, slot[shared], place[at[shared]]] = values[shared]
        similarity += np.divide(
            own_table @ their_table.transpose(0, 2, 1), norms, out=np.zeros_like(norms), where=norms > 0
        )
    similarity /= np.minimum(np.maximum(own_lengths, their_lengths), ORDERS)
    similarity *= np.exp(-((own_lengths - their_lengths) ** 2) / (2 * _SIGMA**2))
    tables = [one[: len(own), : len(theirs)] for one, own, theirs in zip(similarity, candidates, others, strict=True)]
    if weights is None:
        return [table.mean(1) for table in tables]
    return [table @ of_others for table, of_others in zip(tables, weights, strict=True)]


def _count_up(counts: Integers) -> Integers:
    """Return 0, 1, ..., count - 1 for each of some counts, one after another."""
    numbers: Integers = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)
    return numbers
