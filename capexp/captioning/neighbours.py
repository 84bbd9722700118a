"""The train photos that are similar to a photo, and their captions (Devlin et al., 2015).

Shapes: N train photos, B photos, P positions, F feature, D dimension of the whitened features, K neighbours of a
photo, R captions of all of them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from capexp.captioning.consensus import Tokens
from capexp.data.captions import Split
from capexp.data.features import Features
from capexp.data.vocabulary import EOS, Vocabulary
from capexp.metrics.cider import DocumentFrequencies, count_ngrams

DIMENSIONS = 512
"""The most dimensions that whitened features have."""
_PART = 512  # photos whose features are in memory at once
_LEAST_VARIANCE = 1e-3  # that is added to each, as a part of the largest

NeighbourCaptions = tuple[list[Tokens], NDArray[np.float64]]
"""The captions of a photo's neighbours, and their weights ``(R,)``, which add up to 1."""


@dataclass(frozen=True, eq=False)
class Neighbours:
    """The pooled features and the captions of all train photos, among which a photo's neighbours are found."""

    pooled: NDArray[np.float16]
    """``(N, F)``, as :func:`pool` returns them."""
    captions: tuple[tuple[Tokens, ...], ...]
    """The captions of each photo, as entries of the captioner's vocabulary without BOS and EOS."""
    whitening: NDArray[np.float32] | None = None
    """``(F, D)``, as :func:`whiten` returns it; None if photos are compared by their pooled features as they are."""

    @classmethod
    def of(cls, split: Split, features: Features, vocabulary: Vocabulary) -> "Neighbours":
        """Encode the captions of a split, and pool and whiten its photos' features."""
        pooled = np.concatenate([pool(part) for part in features.parts(_PART)])
        captions = (tuple(tuple(vocabulary.encode(text)) for text in texts) for texts in split.references)
        return cls(pooled, tuple(captions), whiten(pooled))

    def captions_near(self, features: NDArray[np.float32], count: int) -> list[NeighbourCaptions]:
        """Return the captions of the ``count`` train photos that are most similar to each photo ``(B, P, F)``.

        The similarity is the cosine of the whitened features. A train photo's weight is proportional to its squared
        similarity, and its captions share it. A train photo with the same pooled features as the photo is left out: it
        is the photo itself, whose captions may be the references of a score.
        """
        found = []
        # One photo at a time: the products of a batch would be rounded differently in batches of other sizes.
        for pooled in pool(features):
            similarity = self._train_directions @ self._directions(pooled[None])[0]  # (N,)
            order = np.argsort(-similarity, kind="stable")  # (N,)
            first = order[similarity[order] > similarity[order[0]] - 1e-3]  # the photo itself is among these
            is_itself = (self.pooled[first] == pooled).all(1)
            nearest = np.append(first[~is_itself], order[len(first) :])[:count]  # (K,)
            found.append(self._weighted(nearest, similarity[nearest].clip(0).astype(np.float64) ** 2))
        return found

    def _weighted(self, photos: NDArray[np.int64], weights: NDArray[np.float64]) -> NeighbourCaptions:
        """Return the captions of train photos with these weights, which need not add up to 1."""
        if not weights.any():  # none is similar
            weights = np.ones(len(photos))
        captions = [self.captions[photo] for photo in photos]
        counts = np.array([len(texts) for texts in captions], np.int64)
        return list(chain.from_iterable(captions)), np.repeat(weights / weights.sum() / counts, counts)

    def arrays(self) -> dict[str, NDArray[np.float16] | NDArray[np.float32] | NDArray[np.int32]]:
        """Return the arrays that a file holds, by name; :meth:`of_arrays` reads them."""
        captions = list(chain.from_iterable(self.captions))
        return {
            **({} if self.whitening is None else {"whitening": self.whitening}),
            "pooled": self.pooled,
            "tokens": np.fromiter(chain.from_iterable(captions), np.int32),
            "lengths": np.array([len(caption) for caption in captions], np.int32),
            "captions": np.array([len(texts) for texts in self.captions], np.int32),
        }

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, NDArray[Any]], size: int, entries: int) -> "Neighbours":
        """Return the train photos of a file's arrays.

        ``size`` is F, ``entries`` the size of the vocabulary. Raises ValueError if the arrays do not fit together, and
        KeyError if one is missing. Files from before features were whitened have no ``whitening``.
        """
        pooled, tokens, lengths, counts = (arrays[name] for name in ("pooled", "tokens", "lengths", "captions"))
        whitening = arrays.get("whitening")
        is_valid = (
            [array.dtype for array in (pooled, tokens, lengths, counts)] == [np.float16, np.int32, np.int32, np.int32]
            and tokens.ndim == lengths.ndim == counts.ndim == 1
            and pooled.shape == (len(counts), size)
            and len(counts) > 0
            and np.isfinite(pooled).all()
            and min(lengths.min(initial=0), tokens.min(initial=0)) >= 0
            and counts.min() > 0
            and counts.sum(dtype=np.int64) == len(lengths)
            and lengths.sum(dtype=np.int64) == len(tokens)
            and tokens.max(initial=0) < entries
            and (whitening is None or _is_whitening(whitening, size))
        )
        if not is_valid:
            raise ValueError("the arrays do not fit together")
        flat = iter([tuple(caption.tolist()) for caption in np.split(tokens, lengths.cumsum()[:-1])])
        return cls(pooled, tuple(tuple(islice(flat, count)) for count in counts), whitening)

    @cached_property
    def frequencies(self) -> DocumentFrequencies:
        """The document frequencies of n-grams, EOS included, in the train captions."""
        captions = [(*caption, EOS) for caption in chain.from_iterable(self.captions)]
        owners = np.repeat(np.arange(len(self.captions)), [len(texts) for texts in self.captions])
        tokens = 1 + max(map(max, captions))
        return DocumentFrequencies(count_ngrams(captions, tokens), owners, len(self.captions), tokens)

    @cached_property
    def _mean(self) -> NDArray[np.float32]:
        mean: NDArray[np.float32] = self.pooled.mean(0, dtype=np.float32)
        return mean

    @cached_property
    def _train_directions(self) -> NDArray[np.float32]:
        return self._directions(self.pooled)

    def _directions(self, pooled: NDArray[np.float16]) -> NDArray[np.float32]:
        """Return the unit vectors ``(B, D)`` of pooled features ``(B, F)``, less the mean of the train photos."""
        centred = pooled.astype(np.float32) - self._mean
        whitened = centred if self.whitening is None else centred @ self.whitening
        directions: NDArray[np.float32] = whitened / np.maximum(np.linalg.norm(whitened, axis=1, keepdims=True), 1e-6)
        return directions


def pool(features: NDArray[np.float32] | NDArray[np.float16]) -> NDArray[np.float16]:
    """Return the square root of the mean over the positions ``(B, F)``, from features ``(B, P, F)``.

    The root of a negative mean, which VGG16's own features do not have, is minus that of its absolute value.
    """
    mean = features.mean(1, dtype=np.float32)
    pooled: NDArray[np.float16] = (np.sign(mean) * np.sqrt(np.abs(mean))).astype(np.float16)
    return pooled


def whiten(pooled: NDArray[np.float16]) -> NDArray[np.float32]:
    """Return the projection ``(F, D)`` of pooled features ``(N, F)`` on the D directions in which they vary most.

    Each direction is divided by the fourth root of its variance. Directions in which all photos vary, and which
    therefore decide the cosine of the features as they are, count less after it, and finer ones more.
    """
    centred = pooled.astype(np.float32)
    centred -= centred.mean(0)
    variances, axes = np.linalg.eigh(centred.T @ centred / len(centred))  # (F,) ascending, (F, F)
    variances, axes = variances[-DIMENSIONS:].clip(0), axes[:, -DIMENSIONS:]
    divisors = (variances + _LEAST_VARIANCE * variances[-1]) ** 0.25
    whitening: NDArray[np.float32] = np.ascontiguousarray(axes / np.maximum(divisors, 1e-6))
    return whitening


def _is_whitening(array: NDArray[Any], size: int) -> bool:
    return array.dtype == np.float32 and array.ndim == 2 and len(array) == size and bool(np.isfinite(array).all())
