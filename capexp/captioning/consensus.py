"""Which of several captions of a photo the others agree with most.

Shapes: C candidates, R others, G n-grams that they hold.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from capexp.data.vocabulary import EOS

Tokens = tuple[int, ...]

_ORDERS = 4  # n-grams of 1 to 4 words
_SIGMA = 6.0  # words by which lengths may differ


def agreement(candidates: Sequence[Tokens], others: Sequence[Tokens]) -> NDArray[np.float64]:
    """The mean likeness of each candidate to the others, 0 to 1: ``(C,)``.

    Likeness is CIDEr-D's (Vedantam et al., CVPR 2015) with all n-grams alike, rare or not: of each order the cosine of
    the counts, clipped at the other's, less where the lengths differ. The end counts as a word. The mean is over those
    orders alone that the longer of the two has, so that captions of a word or two are wholly like themselves.
    """
    lengths = [
        np.array([len(tokens) + 1 for tokens in captions], dtype=np.float64) for captions in (candidates, others)
    ]
    likeness = np.zeros((len(candidates), len(others)))
    for order in range(1, _ORDERS + 1):
        own, theirs = _counted(candidates, others, order)  # (C, G), (R, G)
        norms = np.linalg.norm(own, axis=1)[:, None] * np.linalg.norm(theirs, axis=1)  # (C, R)
        clipped = np.stack([(np.minimum(one, theirs) * theirs).sum(1) for one in own])  # (C, R)
        likeness += np.divide(clipped, norms, out=np.zeros_like(norms), where=norms > 0)
    likeness /= np.minimum(np.maximum(lengths[0][:, None], lengths[1]), _ORDERS)
    apart = lengths[0][:, None] - lengths[1]
    mean: NDArray[np.float64] = (likeness * np.exp(-(apart**2) / (2 * _SIGMA**2))).mean(1)
    return mean


def _counted(candidates: Sequence[Tokens], others: Sequence[Tokens], order: int) -> list[NDArray[np.float64]]:
    """How often each caption holds each n-gram of one order that any of them holds."""
    counts = [[_ngrams((*tokens, EOS), order) for tokens in captions] for captions in (candidates, others)]
    columns = {ngram: i for i, ngram in enumerate(dict.fromkeys(n for some in counts for one in some for n in one))}
    tables = []
    for some in counts:
        table = np.zeros((len(some), len(columns)))
        for row, one in zip(table, some, strict=True):
            row[[columns[ngram] for ngram in one]] = list(one.values())
        tables.append(table)
    return tables


def _ngrams(tokens: Tokens, order: int) -> Counter[Tokens]:
    return Counter(tokens[i : i + order] for i in range(len(tokens) - order + 1))
