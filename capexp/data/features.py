"""Photos' features by position in a list of photos, read from the memory-mapped cache file on demand.

A view of a photo is the photo itself, its mirror image or a crop. Of N photos, view i is photo i; with other views,
view N + i is the first other view of photo i, view 2N + i the second, and so on.

Shapes: B views, P grid positions, F feature.
"""

import mmap
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

_VIEWS = 7  # makes this draw independent of the shuffling of captions with the same seed and epoch


class Features:
    """The features of a list of photos, and of other views of them if there are any."""

    def __init__(
        self,
        records: NDArray[np.float16],
        rows: NDArray[np.int64],
        mapping: mmap.mmap | None = None,
        others: "tuple[Features, ...]" = (),
    ) -> None:
        """``records`` are the cache's features, ``rows`` the row of each photo, ``mapping`` their memory map if any."""
        self._records = records
        self._rows = rows
        self._mapping = mapping
        self._others = others

    def with_view(self, view: "Features") -> "Features":
        """Return the features with another view of each photo added."""
        assert len(view) == len(self) and view.shape == self.shape
        return Features(self._records, self._rows, self._mapping, (*self._others, view))

    def draw_views(self, seed: int, epoch: int) -> NDArray[np.int64]:
        """Return the view of each photo in an epoch: one of its views by chance."""
        photos = np.arange(len(self))
        if not self._others:
            return photos
        drawn = np.random.default_rng([seed, epoch, _VIEWS]).random(len(self)) * self.views
        return photos + len(self) * (self.views - 1 - drawn.astype(np.int64))

    def __len__(self) -> int:
        """Return the number of photos."""
        return len(self._rows)

    @property
    def shape(self) -> tuple[int, int]:
        """(P, F) of one view."""
        _, positions, size = self._records.shape
        return positions, size

    @property
    def views(self) -> int:
        """The number of views of each photo, itself included."""
        return 1 + len(self._others)

    def slice(self, start: int, stop: int) -> "Features":
        """Return the features of the photos from ``start`` to ``stop``, without other views."""
        return Features(self._records, self._rows[start:stop], self._mapping)

    def gather(self, views: NDArray[np.int64]) -> NDArray[np.float16]:
        """Return the features of some views, (B, P, F)."""
        kinds, photos = np.divmod(views, len(self)) if self._others else (np.zeros_like(views), views)
        if not kinds.any():
            gathered: NDArray[np.float16] = self._records[self._rows[photos]]
            release_pages(self._mapping)
            return gathered
        mixed = np.empty((len(views), *self.shape), np.float16)
        for kind in np.unique(kinds):
            chosen = kinds == kind
            source = self if kind == 0 else self._others[kind - 1]
            mixed[chosen] = source.gather(photos[chosen])
        return mixed

    def parts(self, size: int) -> Iterator[NDArray[np.float16]]:
        """Yield the features of all photos, ``size`` at a time, (B, P, F)."""
        for start in range(0, len(self), size):
            yield self.gather(np.arange(start, min(start + size, len(self))))

    def parts_of_views(self, size: int) -> Iterator[NDArray[np.float16]]:
        """Yield the features of all views, ``size`` at a time, (B, P, F)."""
        yield from self.parts(size)
        for view in self._others:
            yield from view.parts(size)


def release_pages(mapping: mmap.mmap | None) -> None:
    """Release the pages of a memory map that were read; the system still caches them while memory is free.

    Otherwise the resident memory of the process grows to the size of the file, and counts against a memory limit.
    """
    if mapping is not None and hasattr(mmap, "MADV_DONTNEED"):  # not on Windows
        mapping.madvise(mmap.MADV_DONTNEED)
