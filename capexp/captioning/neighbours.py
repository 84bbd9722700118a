"""Train photos and their captions, with which captions of similar photos are compared (Devlin et al., 2015).

Shapes: N train photos, B photos, P positions, F feature, K neighbours of each, R captions of all neighbours of a photo.
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

_PART = 512  # photos whose features are in memory at once

Voices = tuple[list[Tokens], NDArray[np.float64]]
"""The captions of a photo's neighbours, and their weights ``(R,)``, which add up to 1."""


@dataclass(frozen=True, eq=False)
class Neighbours:
    """The pooled features and the captions of the train photos."""

    pooled: NDArray[np.float16]
    """``(N, F)``, as :func:`pool` returns them."""
    captions: tuple[tuple[Tokens, ...], ...]
    """The captions of each photo, as entries of the captioner's vocabulary without BOS and EOS."""

    @classmethod
    def of(cls, split: Split, features: Features, vocabulary: Vocabulary) -> "Neighbours":
        """Return those of a split, from its photos' features."""
        pooled = np.concatenate([pool(part) for part in features.parts(_PART)])
        return cls(pooled, tuple(tuple(tuple(vocabulary.encode(one)) for one in all_) for all_ in split.references))

    def voices(self, features: NDArray[np.float32], count: int) -> list[Voices]:
        """Return the captions of the ``count`` train photos that are most similar to each photo ``(B, P, F)``.

        The similarity is the cosine of the pooled features, less their mean over the train photos. A train photo's
        weight is proportional to its squared similarity, and its captions share it.
        """
        directions = self._directions(pool(features))
        # One photo at a time: the products of a batch would be rounded differently in batches of other sizes.
        return [self._voices(self._train_directions @ direction, count) for direction in directions]

    def _voices(self, similarity: NDArray[np.float32], count: int) -> Voices:
        """Return the captions of the train photos whose similarity ``(N,)`` to a photo is highest."""
        nearest = np.argsort(-similarity, kind="stable")[:count]  # (K,)
        weights = similarity[nearest].clip(0).astype(np.float64) ** 2
        if weights.sum() == 0:  # none is similar
            weights[:] = 1
        captions = [self.captions[photo] for photo in nearest]
        counts = np.array([len(of_photo) for of_photo in captions])
        return list(chain.from_iterable(captions)), np.repeat(weights / weights.sum() / counts, counts)

    def arrays(self) -> dict[str, NDArray[np.float16] | NDArray[np.int32]]:
        """Return all as arrays by name, for a file; :meth:`of_arrays` reads them."""
        captions = list(chain.from_iterable(self.captions))
        return {
            "pooled": self.pooled,
            "tokens": np.fromiter(chain.from_iterable(captions), np.int32),
            "lengths": np.array([len(caption) for caption in captions], np.int32),
            "captions": np.array([len(of_photo) for of_photo in self.captions], np.int32),
        }

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, NDArray[Any]], size: int, entries: int) -> "Neighbours":
        """Return those of :meth:`arrays`, of features of this size and a vocabulary of so many entries.

        Raises ValueError if the arrays do not fit together.
        """
        pooled, tokens, lengths, counts = (arrays[name] for name in ("pooled", "tokens", "lengths", "captions"))
        is_valid = (
            [array.dtype for array in (pooled, tokens, lengths, counts)] == [np.float16, np.int32, np.int32, np.int32]
            and pooled.shape == (len(counts), size)
            and tokens.ndim == lengths.ndim == counts.ndim == 1
            and len(counts) > 0
            and np.isfinite(pooled).all()
            and min(lengths.min(initial=0), tokens.min(initial=0)) >= 0
            and counts.min() > 0
            and counts.sum() == len(lengths)
            and lengths.sum() == len(tokens)
            and tokens.max(initial=0) < entries
        )
        if not is_valid:
            raise ValueError("the arrays do not fit together")
        split = np.split(tokens, lengths.cumsum()[:-1])
        captions = iter([tuple(caption.tolist()) for caption in split])
        return cls(pooled, tuple(tuple(islice(captions, count)) for count in counts))

    @cached_property
    def frequencies(self) -> DocumentFrequencies:
        """The document frequencies of n-grams, EOS included, in the train captions."""
        captions = [(*caption, EOS) for caption in chain.from_iterable(self.captions)]
        owners = np.repeat(np.arange(len(self.captions)), [len(of_photo) for of_photo in self.captions])
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
        """Return the unit vectors of pooled features, less the mean of the train photos."""
        centred = pooled.astype(np.float32) - self._mean
        directions: NDArray[np.float32] = centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-6)
        return directions


def pool(features: NDArray[np.float32] | NDArray[np.float16]) -> NDArray[np.float16]:
    """Return the square root of the mean over the positions ``(B, F)``, from features ``(B, P, F)``.

    The root of a negative mean, which VGG16's own features do not have, is minus that of its absolute value.
    """
    mean = features.mean(1, dtype=np.float32)
    pooled: NDArray[np.float16] = (np.sign(mean) * np.sqrt(np.abs(mean))).astype(np.float16)
    return pooled
