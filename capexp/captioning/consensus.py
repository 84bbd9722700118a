"""The agreement of several captions of one photo: how similar each is to the others.

Shapes: C candidates, R other captions, G distinct n-grams of all of them.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from capexp.data.vocabulary import EOS
from capexp.metrics.cider import ORDERS, ngrams

Tokens = tuple[int, ...]

_SIGMA = 6.0  # the standard deviation, in words, of the Gaussian penalty on differences in length


def agreement(candidates: Sequence[Tokens], others: Sequence[Tokens]) -> NDArray[np.float64]:
    """Return the mean similarity ``(C,)`` of each candidate to the other captions, from 0 to 1.

    The similarity is CIDEr-D (Vedantam et al., CVPR 2015) without TF-IDF weights, so that rare and frequent n-grams
    count alike: for each order, the cosine of the n-gram counts, with the candidate's counts clipped at the other
    caption's, and reduced if the lengths differ. EOS counts as a word. The mean is taken only over the orders for which
    the longer of the two captions has n-grams, so that a caption of one or two words has similarity 1 to itself.
    """
    lengths = [
        np.array([len(tokens) + 1 for tokens in captions], dtype=np.float64) for captions in (candidates, others)
    ]
    counts = [[ngrams((*tokens, EOS)) for tokens in captions] for captions in (candidates, others)]
    similarity = np.zeros((len(candidates), len(others)))
    for order in range(1, ORDERS + 1):
        own, theirs = _tables(counts, order)  # (C, G), (R, G)
        norms = np.linalg.norm(own, axis=1)[:, None] * np.linalg.norm(theirs, axis=1)  # (C, R)
        clipped = np.stack([(np.minimum(counts, theirs) * theirs).sum(1) for counts in own])  # (C, R)
        similarity += np.divide(clipped, norms, out=np.zeros_like(norms), where=norms > 0)
    similarity /= np.minimum(np.maximum(lengths[0][:, None], lengths[1]), ORDERS)
    length_difference = lengths[0][:, None] - lengths[1]
    mean: NDArray[np.float64] = (similarity * np.exp(-(length_difference**2) / (2 * _SIGMA**2))).mean(1)
    return mean


def _tables(counts: Sequence[Sequence[Counter[Tokens]]], order: int) -> list[NDArray[np.float64]]:
    """Return the counts of candidates and others, ``(C, G)`` and ``(R, G)``, of the n-grams of one order."""
    distinct = dict.fromkeys(ngram for group in counts for caption in group for ngram in caption if len(ngram) == order)
    columns = {ngram: i for i, ngram in enumerate(distinct)}
    tables = []
    for group in counts:
        table = np.zeros((len(group), len(columns)))
        for row, caption in zip(table, group, strict=True):
            for ngram, count in caption.items():
                if len(ngram) == order:
                    row[columns[ngram]] = count
        tables.append(table)
    return tables
