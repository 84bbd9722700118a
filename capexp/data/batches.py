"""Teacher-forced batches: captions in random order, with their photos' features.

Shapes: B batch (captions), N photos, M words, T steps, P grid positions, F feature.
"""

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from capexp.data.captions import Split
from capexp.data.features import Features
from capexp.data.prefetch import prefetch
from capexp.data.vocabulary import BOS, EOS, Vocabulary
from capexp.distributed import ALONE, World
from capexp.settings import Order

_AHEAD = 2  # batches that are read before they are asked for
_READ_AT_ONCE = 1024  # captions of a batch that a GPU does not learn from, at most,
_READ_BYTES = 2**26  # and bytes of its features
_HELD_AT_ONCE = 1000  # photos whose features are moved to a device together
T = TypeVar("T")


@dataclass(frozen=True)
class Batch:
    """Some captions, packed as decoders read them: the longest first, the first word of each, then the second ones.

    Each word that is read has one target, the word that comes next; there is no padding.
    """

    features: Tensor  # (N, P, F), float16 until they are on a device
    photos: Tensor  # (B,): the row of each caption's photo in the features
    words: Tensor  # (M,): BOS and each caption's words
    targets: Tensor  # (M,): the words and EOS
    counts: tuple[int, ...]  # captions that have a word at each step
    share: float = 1.0  # of the targets of the whole batch, where several processes share it

    def to(self, device: torch.device) -> "Batch":
        """The batch on a device."""
        features = on_device(self.features, device).float()  # half as much to move
        photos, words, targets = (on_device(value, device) for value in (self.photos, self.words, self.targets))
        return Batch(features, photos, words, targets, self.counts, self.share)


def on_device(value: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device, without waiting for it."""
    if device.type == "cuda" and value.device.type == "cpu":
        value = value.pin_memory()  # of other memory the processor would wait for the copy
    return value.to(device, non_blocking=True)


class CaptionBatches:
    """All captions of a split as batches, in a new random order for each epoch.

    In the order ``captions`` each stands for itself, with its own copy of its photo's features; in the order
    ``photos`` those of a photo stay together, so that its features are read and projected once. The tokens are held
    as one flat array (four bytes a token), the features are read from their file for the photos of a batch, by a
    thread that is a few batches ahead.
    """

    def __init__(
        self, split: Split, vocabulary: Vocabulary, features: Features, batch_size: int, order: Order = "captions"
    ) -> None:
        assert len(features) == len(split.photos)
        encoded = [vocabulary.encode(caption) for captions in split.references for caption in captions]
        counts = np.array([len(captions) for captions in split.references], dtype=np.int64)
        assert counts.all(), "a photo without a caption"
        self.split = split
        self.features = features
        self.order = order
        self._lengths = np.array([len(tokens) for tokens in encoded], dtype=np.int64)
        # Each caption with BOS and EOS; its words to read begin where it does, their targets one further.
        self._starts = np.concatenate(([0], np.cumsum(self._lengths + 2)))
        self._tokens = np.fromiter((token for tokens in encoded for token in (BOS, *tokens, EOS)), np.int32)
        self._reads = np.append(self._lengths + 1, 0)  # words to read of each, and of what stands for no caption
        self._photos = np.repeat(np.arange(len(split.photos)), counts)
        # What stays together: the captions of a unit are those from its bound to the next.
        units = counts if order == "photos" else np.ones_like(self._lengths)
        self._bounds = np.concatenate(([0], np.cumsum(units)))
        a_unit = len(self._lengths) / len(units)  # captions
        self._units = min(max(1, round(batch_size / a_unit)), len(units))  # in a batch
        positions, size = features.shape
        self._units_read = max(self._units, min(round(_READ_AT_ONCE / a_unit), _READ_BYTES // (4 * positions * size)))
        self._held: Tensor | None = None  # the features of all photos, where a device has room for them

    def hold(self, device: torch.device) -> bool:
        """Holds the features of all photos on a device, unless they would take more than a quarter of its free memory.

        Batches are then put together there. Tells whether they are held.
        """
        positions, size = self.features.shape
        room = _room(device)
        if self._held is None and 4 * 2 * len(self.features) * self.features.views * positions * size <= room:
            parts = [torch.from_numpy(part).to(device) for part in self.features.parts_of_views(_HELD_AT_ONCE)]
            self._held = torch.cat(parts)
        return self._held is not None and self._held.device.type == device.type

    def padding(self) -> float:
        """How many times as many words as there are the rectangles of an epoch's batches have."""
        _, captions, reads = self.table(0, 0)
        return float((captions[0].size * reads.max((1, 2))).sum() / self.targets)

    def rectangles(self, device: torch.device) -> "Rectangles":
        """The batches for a device that is to put them together itself, and holds the features."""
        is_held = self.hold(device)
        assert is_held and self._held is not None
        return Rectangles(
            self._held,
            torch.from_numpy(self._tokens).to(device),
            torch.from_numpy(self._starts).to(device),
            torch.from_numpy(self._reads).to(device),
            self,
        )

    def table(self, seed: int, number: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """The batches of :meth:`epoch` as numbers.

        Where the features of their photos stand, ``(S, N)``; their captions, ``(S, N, K)``, K the most that a photo has
        in a batch and behind the last caption a number that stands for none; and the words to read of each caption.
        """
        order = self._order(seed, number)
        units = np.pad(order, (0, -len(order) % self._units)).reshape(-1, self._units)
        counts = np.diff(self._bounds)
        there = np.arange(units.size).reshape(units.shape) < len(order)
        nth = np.arange(counts.max())
        captions = self._bounds[units][..., None] + nth
        captions = np.where(there[..., None] & (nth < counts[units][..., None]), captions, len(self._lengths))
        photos = self.features.draw_views(seed, number)[self._photos[self._bounds[units]]]
        return photos, captions, self._reads[captions]

    def __len__(self) -> int:
        """Batches in an epoch."""
        return -(-(len(self._bounds) - 1) // self._units)

    @property
    def targets(self) -> int:
        """Targets in an epoch: each caption's known words, and EOS."""
        return int(self._lengths.sum()) + len(self._lengths)

    @property
    def longest(self) -> int:
        """Tokens of the longest caption, BOS and EOS counted."""
        return int(self._lengths.max()) + 2

    def epoch(self, seed: int, number: int, world: World = ALONE, done: int = 0) -> Iterator[Batch]:
        """Every caption but those of batches done, once, in an order that depends on seed and epoch number only.

        Of several processes each gets its share of every batch, and there are as many batches as for one. In a batch
        too small for all, those left over get a part of it with a share of 0.
        """

        def make(some: NDArray[np.int64]) -> Batch:
            units, is_own = _shard(some, world)
            share = float(targets[units].sum() / targets[some].sum()) if is_own else 0.0
            return self._batch(self._captions(units), seen, share)

        targets = np.add.reduceat(self._lengths + 1, self._bounds[:-1])  # of each unit
        seen = self.features.draw_views(seed, number)
        return _ahead(make, self._order(seed, number)[done * self._units :], self._units)

    def in_order(self, photos: NDArray[np.int64] | None = None, world: World = ALONE) -> Iterator[Batch]:
        """Every caption once, sorted by length; with ``photos``, caption of photo i sees photo ``photos[i]``.

        Of several processes each gets captions of its own.
        """
        seen = np.arange(len(self.features)) if photos is None else photos
        longest = np.maximum.reduceat(self._lengths, self._bounds[:-1])
        units = world.shard(np.argsort(longest, kind="stable"))
        size = self._units if self._held is None else self._units_read
        return _ahead(lambda some: self._batch(self._captions(some), seen), units, size)

    def of_photos(self, photos: NDArray[np.int64], seen: NDArray[np.int64]) -> Batch:
        """All captions of some photos, by the position of what is seen of each photo of the split."""
        first, last = (np.searchsorted(self._photos, photos, side) for side in ("left", "right"))
        captions = np.concatenate([np.arange(*bounds) for bounds in zip(first, last, strict=True)])
        return self._batch(captions, seen)

    def _order(self, seed: int, number: int) -> NDArray[np.int64]:
        """The units of an epoch, in its order."""
        # Batches of like length would need less padding, but they learn worse: 0.05 nats a token on Flickr8k.
        return np.random.default_rng([seed, number]).permutation(len(self._bounds) - 1)

    def _captions(self, units: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.concatenate([np.arange(self._bounds[unit], self._bounds[unit + 1]) for unit in units])

    def _batch(self, captions: NDArray[np.int64], views: NDArray[np.int64], share: float = 1.0) -> Batch:
        captions = captions[np.argsort(-self._lengths[captions], kind="stable")]
        read = self._lengths[captions] + 1  # words of each
        steps = np.arange(read[0])[:, None]  # (T, 1)
        there = steps < read  # (T, B)
        places = (self._starts[captions] + steps)[there]  # (M,)
        seen, rows = views[self._photos[captions]], np.arange(len(captions))
        if self.order == "photos":
            seen, rows = np.unique(seen, return_inverse=True)
        if self._held is not None:
            features = self._held[on_device(torch.from_numpy(seen), self._held.device)]
        else:
            features = torch.from_numpy(self.features.gather(seen))
        return Batch(
            features,
            torch.from_numpy(rows),
            torch.from_numpy(self._tokens[places].astype(np.int64)),
            torch.from_numpy(self._tokens[places + 1].astype(np.int64)),
            tuple(there.sum(1).tolist()),
            share,
        )


def _room(device: torch.device) -> float:
    """Bytes that can still be had of a device's memory."""
    if device.type != "cuda":
        return math.inf
    own = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return float(torch.cuda.mem_get_info(device)[0] + own)


@dataclass(frozen=True)
class Table:
    """The batches of an epoch, on a device."""

    photos: Tensor  # (S, N): where the features stand
    captions: Tensor  # (S, N * K)
    longest: list[int]  # words to read of the longest caption of each
    targets: list[int]  # in each


@dataclass(frozen=True)
class Rectangles:
    """All captions of a split on a device, which puts batches together there without waiting for it.

    A batch is a rectangle: of as many captions a photo, and words a caption.
    """

    features: Tensor  # of all photos, float16
    tokens: Tensor  # of all captions, with BOS and EOS
    starts: Tensor  # of each caption in the tokens
    reads: Tensor  # words to read of each caption, and 0 of one that is none
    batches: CaptionBatches

    @property
    def longest(self) -> int:
        """Words to read of the longest caption of all."""
        return self.batches.longest - 1

    def epoch(self, seed: int, number: int) -> Table:
        """The batches of an epoch, the same as those of :meth:`CaptionBatches.epoch`."""
        photos, captions, reads = self.batches.table(seed, number)
        flat = captions.reshape(len(captions), -1)
        device = self.features.device
        seen, said = (on_device(torch.from_numpy(value), device) for value in (photos, flat))
        return Table(seen, said, reads.max((1, 2)).tolist(), reads.sum((1, 2)).tolist())

    def batch(self, photos: Tensor, captions: Tensor, length: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The features of photos, ``(N, P, F)``, and words, targets, and which of them are real, ``(length * B,)``.

        First the first words of all captions, then the second ones.
        """
        steps = torch.arange(length, device=captions.device).unsqueeze(1)
        real = steps < self.reads[captions]  # (length, B)
        places = (self.starts[captions] + steps) * real
        words, targets = (self.tokens[places + ahead].long() * real for ahead in (0, 1))
        return self.features[photos].float(), words.flatten(), targets.flatten(), real.flatten()


def photo_batches(
    features: Features, size: int, seed: int, number: int, world: World = ALONE, done: int = 0
) -> Iterator[tuple[NDArray[np.int64], Tensor, bool]]:
    """All photos once, so many at a time: where they stand in the split, and their features ``(N, P, F)``.

    Those of the batches done are left out.

    The order depends on seed and epoch number only. Of several processes each gets its share of every batch; in a batch
    too small for all, those left over get a photo of it that is another's, and are told so.
    """

    def make(some: NDArray[np.int64]) -> tuple[NDArray[np.int64], Tensor, bool]:
        photos, is_own = _shard(some, world)
        return photos, torch.from_numpy(features.gather(seen[photos]).astype(np.float32)), is_own

    seen = features.draw_views(seed, number)
    return _ahead(make, np.random.default_rng([seed, number]).permutation(len(features))[done * size :], size)


def _shard(batch: NDArray[np.int64], world: World) -> tuple[NDArray[np.int64], bool]:
    """Return what one of several ranks does of a batch, and whether it counts: each rank must do some work."""
    shard = world.shard(batch)
    return (shard, True) if len(shard) else (batch[:1], False)


def _ahead(make: Callable[[NDArray[np.int64]], T], order: NDArray[np.int64], size: int) -> Iterator[T]:
    """What is made of each part of an order, by a thread that is a few parts ahead."""
    with ThreadPoolExecutor(1) as pool:
        parts = (order[start : start + size] for start in range(0, len(order), size))
        yield from prefetch(pool, make, parts, 1 + _AHEAD)
