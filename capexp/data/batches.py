"""Teacher-forced batches: captions in random order, with the features of their photos.

Packed batches have no padding. Padded batches all have the same number of captions and are gathered on a device that
holds all captions and features. Both can be sharded across ranks. A view is a photo, its mirror image or a
crop (:mod:`capexp.data.features`).

Shapes: B captions, N photos, K captions of a photo, M targets, T steps, S batches of an epoch, P grid positions,
F feature.
"""

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

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

_PREFETCHED = 2  # batches that are prepared ahead while the model trains on one
_PRELOADED_PHOTOS = 1000  # photos whose features are moved to the device at a time
# Limits of an evaluation batch on a GPU, unless training batches are larger:
_EVALUATED_CAPTIONS = 1024
_EVALUATED_BYTES = 2**26  # of float32 features
T = TypeVar("T")


@dataclass(frozen=True)
class Batch:
    """A packed batch: the first words of all captions, then the second words, and so on; the longest caption first.

    Each input word has one target, the word after it. There is no padding.
    """

    features: Tensor  # (N, P, F), float16 until they are on a device
    photos: Tensor  # (B,): the row in features of each caption's photo
    words: Tensor  # (M,): the inputs, BOS and the words of each caption
    targets: Tensor  # (M,): the words of each caption, and EOS
    counts: tuple[int, ...]  # (T,): how many captions have an input at each step, as batch_sizes of a PackedSequence
    share: float = 1.0  # this rank's targets divided by the targets of all ranks; 0 if the shard does not count

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on a device, the features in float32."""
        features = on_device(self.features, device).float()  # moved as float16, half the bytes
        photos, words, targets = (on_device(value, device) for value in (self.photos, self.words, self.targets))
        return Batch(features, photos, words, targets, self.counts, self.share)


class PhotoBatch(NamedTuple):
    """Some photos of a split, without captions."""

    photos: NDArray[np.int64]  # (N,): positions in the split
    features: Tensor  # (N, P, F)
    is_own: bool  # False if another rank has the same photo: this rank's work on it does not count


def on_device(value: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device, without waiting for the copy."""
    if device.type == "cuda" and value.device.type == "cpu":
        value = value.pin_memory()  # a copy from pageable memory would block
    return value.to(device, non_blocking=True)


class CaptionBatches:
    """All captions of a split as batches, in a new random order each epoch.

    With the order ``captions`` single captions are shuffled, each with its own copy of its photo's features. With the
    order ``photos`` the captions of a photo stay together, so that its features are read and projected once.

    The tokens are in memory as one flat array (four bytes a token). Features are read from their file for each batch,
    by a thread that is a few batches ahead. After :meth:`preload` they are gathered on the device instead.
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
        self._tokens = np.fromiter((token for words in encoded for token in (BOS, *words, EOS)), np.int32)
        # For each caption: the number of inputs (equal to the number of targets), the position of its first token, and
        # its photo.
        self._lengths = np.array([len(words) + 1 for words in encoded], dtype=np.int64)
        self._starts = np.concatenate(([0], np.cumsum(self._lengths + 1)))
        self._photos = np.repeat(np.arange(len(split.photos)), counts)
        # Unit i is captions bounds[i]:bounds[i+1] (one caption, or all of a photo); units are shuffled as a whole.
        self._photo_bounds = np.concatenate(([0], np.cumsum(counts)))
        self._bounds = self._photo_bounds if order == "photos" else np.arange(len(encoded) + 1)
        units = len(self._bounds) - 1
        unit_size = len(encoded) / units  # captions
        self._batch_units = min(max(1, round(batch_size / unit_size)), units)
        positions, size = features.shape
        evaluated = min(round(_EVALUATED_CAPTIONS / unit_size), _EVALUATED_BYTES // (4 * positions * size))
        self._evaluated_units = max(self._batch_units, evaluated)
        self._preloaded: Tensor | None = None  # the features of all views, on a device

    def __len__(self) -> int:
        """Return the number of batches in an epoch."""
        return -(-(len(self._bounds) - 1) // self._batch_units)

    @property
    def targets(self) -> int:
        """The number of targets in an epoch: the encoded words of each caption, and EOS."""
        return int(self._lengths.sum())

    @property
    def longest(self) -> int:
        """The number of tokens of the longest caption, BOS and EOS included."""
        return int(self._lengths.max()) + 1

    def epoch(self, seed: int, number: int, world: World = ALONE, done: int = 0) -> Iterator[Batch]:
        """Yield the packed batches of an epoch, without the first ``done``; their order follows from seed and number.

        Each rank gets its shard of every batch. If a batch has fewer units (captions, or photos with all their
        captions) than there are ranks, each rank left over repeats the first unit with share 0.
        """
        targets = np.add.reduceat(self._lengths, self._bounds[:-1])  # the number of targets of each unit
        views = self.features.draw_views(seed, number)

        def pack(units: NDArray[np.int64]) -> Batch:
            shard, is_own = _shard(units, world)
            share = float(targets[shard].sum() / targets[units].sum()) if is_own else 0.0
            return self._pack(_concatenate_ranges(self._bounds, shard), views, share)

        return _prefetched(pack, self._order(seed, number)[done * self._batch_units :], self._batch_units)

    def in_order(self, photos: NDArray[np.int64] | None = None, world: World = ALONE) -> Iterator[Batch]:
        """Yield every caption once, in packed batches sorted by length, for evaluation; each rank gets its shard.

        With ``photos``, the captions of photo i get the features of photo ``photos[i]``.
        """
        views = np.arange(len(self.features)) if photos is None else photos
        longest = np.maximum.reduceat(self._lengths, self._bounds[:-1])  # the inputs of each unit's longest caption
        units = world.shard(np.argsort(longest, kind="stable"))
        size = self._batch_units if self._preloaded is None else self._evaluated_units
        return _prefetched(lambda part: self._pack(_concatenate_ranges(self._bounds, part), views), units, size)

    def captions_of(self, photos: NDArray[np.int64], seed: int, number: int) -> Batch:
        """Return all captions of some photos as a packed batch, with the views that are drawn for epoch ``number``."""
        return self._pack(_concatenate_ranges(self._photo_bounds, photos), self.features.draw_views(seed, number))

    def photo_batches(
        self, size: int, seed: int, number: int, world: World = ALONE, done: int = 0
    ) -> Iterator[PhotoBatch]:
        """Yield all photos of an epoch, ``size`` at a time, without the first ``done`` batches.

        The order follows from seed and number. Each rank gets its shard of every batch. If a batch has fewer photos
        than there are ranks, each rank left over repeats the first photo, with ``is_own`` False.
        """
        views = self.features.draw_views(seed, number)

        def gather(batch: NDArray[np.int64]) -> PhotoBatch:
            photos, is_own = _shard(batch, world)
            features = torch.from_numpy(self.features.gather(views[photos]).astype(np.float32))
            return PhotoBatch(photos, features, is_own)

        return _prefetched(gather, _permutation(len(self.features), seed, number)[done * size :], size)

    def preload(self, device: torch.device) -> bool:
        """Load the features of all views onto a device, if they take at most a quarter of its free memory.

        Batches are then gathered there. Returns whether the features are on the device.
        """
        positions, size = self.features.shape
        needed = 2 * len(self.features) * self.features.views * positions * size  # bytes in float16
        if self._preloaded is None and 4 * needed <= _free_memory(device):
            parts = self.features.parts_of_views(_PRELOADED_PHOTOS)
            self._preloaded = torch.cat([torch.from_numpy(part).to(device) for part in parts])
        return self._preloaded is not None and self._preloaded.device.type == device.type

    def padded(self, device: torch.device) -> "PaddedBatches":
        """Return the padded batches on a device that has room for all features."""
        is_preloaded = self.preload(device)
        assert is_preloaded and self._preloaded is not None
        lengths = np.append(self._lengths, 0)  # the last entry is for "no caption"
        return PaddedBatches(
            self,
            self._preloaded,
            torch.from_numpy(self._tokens).to(device),
            torch.from_numpy(self._starts).to(device),
            torch.from_numpy(lengths).to(device),
        )

    def padding(self, photos: int | None = None) -> float:
        """Return how many inputs padded batches have, padding included, per real input.

        With ``photos`` it is about batches of so many photos, as :meth:`photo_batches` has them.
        """
        indices = self.padded_indices(0, 0, photos=photos)
        return float((indices.captions[0].size * indices.lengths.max((1, 2))).sum() / self.targets)

    def padded_indices(
        self, seed: int, number: int, world: World = ALONE, photos: int | None = None
    ) -> "PaddedIndices":
        """Return the batches of :meth:`epoch` as indices, padded; N is a multiple of the number of ranks.

        With ``photos`` they are the batches of :meth:`photo_batches`, so many photos each, with all their captions.
        """
        bounds, size = (self._bounds, self._batch_units) if photos is None else (self._photo_bounds, photos)
        order = _permutation(len(bounds) - 1, seed, number)
        size = min(size, len(order))
        units = np.pad(order, (0, -len(order) % size)).reshape(-1, size)  # (S, N)
        is_unit = np.arange(units.size).reshape(units.shape) < len(order)
        columns = ((0, 0), (0, -size % world.size))
        units, is_unit = np.pad(units, columns), np.pad(is_unit, columns)
        counts = np.diff(bounds)
        nth = np.arange(counts.max())  # (K,)
        is_caption = is_unit[..., None] & (nth < counts[units][..., None])
        no_caption = len(self._lengths)
        captions = np.where(is_caption, bounds[units][..., None] + nth, no_caption)
        seen = self._photos[bounds[units]]
        views = self.features.draw_views(seed, number)[seen]
        return PaddedIndices(seen, views, captions, np.append(self._lengths, 0)[captions])

    def _order(self, seed: int, number: int) -> NDArray[np.int64]:
        """Return the units of an epoch in their random order."""
        # Grouping captions of similar length needs less padding, but gives a loss 0.05 nats per token worse on Flickr8k
        # (BENCHMARKS.md).
        return _permutation(len(self._bounds) - 1, seed, number)

    def _pack(self, captions: NDArray[np.int64], views: NDArray[np.int64], share: float = 1.0) -> Batch:
        """Return captions as a packed batch; ``views`` is the view of each photo of the split."""
        captions = captions[np.argsort(-self._lengths[captions], kind="stable")]
        lengths = self._lengths[captions]
        steps = np.arange(lengths[0])[:, None]  # (T, 1)
        has_input = steps < lengths  # (T, B)
        inputs = (self._starts[captions] + steps)[has_input]  # (M,): positions in the tokens
        seen, rows = views[self._photos[captions]], np.arange(len(captions))
        if self.order == "photos":
            seen, rows = np.unique(seen, return_inverse=True)
        if self._preloaded is not None:
            features = self._preloaded[on_device(torch.from_numpy(seen), self._preloaded.device)]
        else:
            features = torch.from_numpy(self.features.gather(seen))
        return Batch(
            features,
            torch.from_numpy(rows),
            torch.from_numpy(self._tokens[inputs].astype(np.int64)),
            torch.from_numpy(self._tokens[inputs + 1].astype(np.int64)),
            tuple(has_input.sum(1).tolist()),
            share,
        )


class PaddedIndices(NamedTuple):
    """The padded batches of an epoch as indices, of all ranks; K is the largest number of captions in a unit.

    A unit is a caption, or a photo with all its captions.
    """

    photos: NDArray[np.int64]  # (S, N): positions in the split
    views: NDArray[np.int64]  # (S, N): rows in the features
    captions: NDArray[np.int64]  # (S, N, K); the index after the last caption means "no caption"
    lengths: NDArray[np.int64]  # (S, N, K): the numbers of inputs


@dataclass(frozen=True)
class PaddedEpoch:
    """A rank's shards of the padded batches of an epoch, as indices on a device."""

    photos: list[list[int]]  # (S, up to N): positions in the split, without padding
    views: Tensor  # (S, N): rows in the features
    captions: Tensor  # (S, N * K)
    shares: Tensor  # (S,): this rank's targets divided by the targets of all ranks
    targets: list[int]  # (S,): the number of this rank's targets; 0 if the shard does not count
    lengths: list[int]  # (S,): the number of inputs of the longest caption of all ranks


class PaddedBatch(NamedTuple):
    """A padded batch: the first words of all captions, then the second words, and so on; B is N * K."""

    features: Tensor  # (N, P, F)
    words: Tensor  # (T * B,): the inputs
    targets: Tensor  # (T * B,)
    real: Tensor  # (T * B,): False where there is padding


@dataclass(frozen=True)
class PaddedBatches:
    """All captions and features of a split on a device; batches are gathered there and the host does not wait.

    All batches have the same shape (N, K), on each rank: padding fills up the captions of a photo, and the photos of a
    shard or of the last batch.
    """

    batches: CaptionBatches
    features: Tensor  # the features of all views, float16
    tokens: Tensor  # the tokens of all captions, with BOS and EOS
    starts: Tensor  # the position of each caption's first token
    lengths: Tensor  # the number of inputs of each caption; last, 0 for "no caption"

    @property
    def longest(self) -> int:
        """The number of inputs of the longest caption of the split."""
        return self.batches.longest - 1

    def epoch(self, seed: int, number: int, world: World = ALONE, photos: int | None = None) -> PaddedEpoch:
        """Return the same batches of an epoch as :meth:`CaptionBatches.epoch`, padded; each rank gets its shards.

        With ``photos`` they are the batches of :meth:`CaptionBatches.photo_batches` with all captions of their photos.
        An empty shard is replaced by the first unit of its batch too, with share 0.
        """
        whole = self.batches.padded_indices(seed, number, world, photos)
        own = [value[:, world.rank :: world.size].copy() for value in whole]
        targets = own[-1].sum((1, 2))  # (S,)
        is_empty = targets == 0
        for value, all_of_them in zip(own, whole, strict=True):
            value[is_empty, 0] = all_of_them[is_empty, 0]
        seen, views, captions, lengths = own
        shares = (targets / whole.lengths.sum((1, 2))).astype(np.float32)
        views_on_device, captions_on_device, shares_on_device = (
            on_device(torch.from_numpy(value), self.features.device)
            for value in (views, captions.reshape(len(captions), -1), shares)
        )
        return PaddedEpoch(
            [row[of_row.any(1)].tolist() for row, of_row in zip(seen, lengths, strict=True)],
            views_on_device,
            captions_on_device,
            shares_on_device,
            targets.tolist(),
            whole.lengths.max((1, 2)).tolist(),
        )

    def gather(self, views: Tensor, captions: Tensor, length: int) -> PaddedBatch:
        """Return a batch of views ``(N,)`` and captions ``(B,)``, padded to ``length`` steps."""
        steps = torch.arange(length, device=captions.device).unsqueeze(1)
        real = steps < self.lengths[captions]  # (T, B)
        inputs = (self.starts[captions] + steps) * real  # positions in the tokens
        words, targets = (self.tokens[inputs + shift].long() * real for shift in (0, 1))
        return PaddedBatch(self.features[views].float(), words.flatten(), targets.flatten(), real.flatten())


def _free_memory(device: torch.device) -> float:
    """Return the bytes of a device's memory that are free, those in torch's own cache included."""
    if device.type != "cuda":
        return math.inf
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return float(torch.cuda.mem_get_info(device)[0] + cached)


def _permutation(count: int, seed: int, number: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, number]).permutation(count)


def _concatenate_ranges(bounds: NDArray[np.int64], indices: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the concatenation of ``range(bounds[i], bounds[i + 1])`` for each index i."""
    return np.concatenate([np.arange(bounds[i], bounds[i + 1]) for i in indices])


def _shard(batch: NDArray[np.int64], world: World) -> tuple[NDArray[np.int64], bool]:
    """Return a rank's shard of a batch, and whether it counts.

    An empty shard is replaced by the batch's first item, because every rank must take part in the all-reduce.
    """
    shard = world.shard(batch)
    return (shard, True) if len(shard) else (batch[:1], False)


def _prefetched(make: Callable[[NDArray[np.int64]], T], order: NDArray[np.int64], size: int) -> Iterator[T]:
    """Call ``make`` on every ``size`` consecutive items of ``order`` in a background thread; yield results in order."""
    with ThreadPoolExecutor(1) as pool:
        parts = (order[start : start + size] for start in range(0, len(order), size))
        yield from prefetch(pool, make, parts, 1 + _PREFETCHED)
