"""Teacher-forced batches: captions in random order, with their photos' features.

Shapes: B batch (captions), T steps, P grid positions, F feature.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from capexp.data.cache import Features
from capexp.data.captions import Split
from capexp.data.vocabulary import BOS, EOS, PAD, Vocabulary


@dataclass(frozen=True)
class Batch:
    """Some captions: what the decoder reads, and the word that comes next at each step."""

    features: Tensor  # (B, P, F)
    inputs: Tensor  # (B, T): BOS and the caption's words, then PAD
    targets: Tensor  # (B, T): the words and EOS, then PAD

    def to(self, device: torch.device) -> "Batch":
        """The batch on a device."""
        return Batch(self.features.to(device), self.inputs.to(device), self.targets.to(device))


class CaptionBatches:
    """All captions of a split as batches, in a new random order for each epoch.

    The tokens are held as one flat array (four bytes a token), the features stay in their memory map and are
    read for the photos of a batch when it is made.
    """

    def __init__(self, split: Split, vocabulary: Vocabulary, features: Features, batch_size: int) -> None:
        assert len(features) == len(split.photos)
        encoded = [vocabulary.encode(caption) for captions in split.references for caption in captions]
        self.batch_size = batch_size
        self._features = features
        self._lengths = np.array([len(tokens) for tokens in encoded], dtype=np.int64)
        self._starts = np.concatenate(([0], np.cumsum(self._lengths)))
        self._tokens = np.fromiter((token for tokens in encoded for token in tokens), np.int32)
        self._photos = np.repeat(np.arange(len(split.photos)), [len(texts) for texts in split.references])

    def __len__(self) -> int:
        """Batches in an epoch."""
        return -(-len(self._lengths) // self.batch_size)

    @property
    def targets(self) -> int:
        """Targets in an epoch: each caption's known words, and EOS."""
        return int(self._lengths.sum()) + len(self._lengths)

    @property
    def longest(self) -> int:
        """Tokens of the longest caption, BOS and EOS counted."""
        return int(self._lengths.max()) + 2

    def epoch(self, seed: int, number: int) -> Iterator[Batch]:
        """Every caption once, in an order that depends on seed and epoch number only."""
        # Batches of like length would need less padding, but they learn worse: 0.05 nats a token on Flickr8k.
        order = np.random.default_rng([seed, number]).permutation(len(self._lengths))
        for start in range(0, len(order), self.batch_size):
            yield self._batch(order[start : start + self.batch_size], self._photos)

    def in_order(self, photos: NDArray[np.int64] | None = None) -> Iterator[Batch]:
        """Every caption once, sorted by length; with ``photos``, caption of photo i sees photo ``photos[i]``."""
        seen = self._photos if photos is None else photos[self._photos]
        order = np.argsort(self._lengths, kind="stable")
        for start in range(0, len(order), self.batch_size):
            yield self._batch(order[start : start + self.batch_size], seen)

    def _batch(self, captions: NDArray[np.int64], photos: NDArray[np.int64]) -> Batch:
        lengths = self._lengths[captions]
        steps = int(lengths.max()) + 1
        inputs = np.full((len(captions), steps), PAD, dtype=np.int64)
        targets = np.full((len(captions), steps), PAD, dtype=np.int64)
        words = np.arange(steps - 1) < lengths[:, None]  # (B, T-1): where a word stands
        tokens = self._tokens[(self._starts[captions][:, None] + np.arange(steps - 1))[words]]
        inputs[:, 0] = BOS
        inputs[:, 1:][words] = tokens
        targets[:, :-1][words] = tokens
        targets[np.arange(len(captions)), lengths] = EOS
        features = torch.from_numpy(self._features.gather(photos[captions])).float()
        return Batch(features, torch.from_numpy(inputs), torch.from_numpy(targets))
