"""Photos' features by position in a list of photos, read from the memory-mapped cache file on demand.

A view of a photo is the photo itself or its mirror image. Of N photos, view i is photo i; with mirror images, view
N + i is the mirror image of photo i.

Shapes: B views, P grid positions, F feature.
"""

import mmap
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

_MIRROR = 7  # makes this draw independent of the shuffling of captions with the same seed and epoch


class Features:
    """The features of a list of photos, and of their mirror images if there are any."""

    def __init__(
        self,
        records: NDArray[np.float16],
        rows: NDArray[np.int64],
        mapping: mmap.mmap | None = None,
        mirrored: "Features | None" = None,
    ) -> None:
        """``records`` are the cache's features, ``rows`` the row of each photo, ``mapping`` their memory map if any."""
        self._records = records
        self._rows = rows
        self._mapping = mapping
        self._mirrored = mirrored

    def with_mirrored(self, mirrored: "Features") -> "Features":
        """Return these features with the mirror images' features added."""
        assert len(mirrored) == len(self) and mirrored.shape == self.shape
        return Features(self._records, self._rows, self._mapping, mirrored)

    def draw_views(self, seed: int, epoch: int) -> NDArray[np.int64]:
        """Return the view of each photo in an epoch: the photo, or by chance its mirror image if there is one."""
        photos = np.arange(len(self))
        if self._mirrored is None:
            return photos
        is_mirrored = np.random.default_rng([seed, epoch, _MIRROR]).random(len(self)) < 0.5
        return photos + len(self) * is_mirrored

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
        """The number of views of each photo: 1, or 2 with mirror images."""
        return 1 if self._mirrored is None else 2

    def slice(self, start: int, stop: int) -> "Features":
        """Return the features of the photos from ``start`` to ``stop``, without mirror images."""
        return Features(self._records, self._rows[start:stop], self._mapping)

    def gather(self, views: NDArray[np.int64]) -> NDArray[np.float16]:
        """Return the features of some views, (B, P, F)."""
        if self._mirrored is None or (is_photo := views < len(self)).all():
            gathered: NDArray[np.float16] = self._records[self._rows[views]]
            release_pages(self._mapping)
            return gathered
        both = np.empty((len(views), *self.shape), np.float16)
        both[is_photo] = self.gather(views[is_photo])
        both[~is_photo] = self._mirrored.gather(views[~is_photo] - len(self))
        return both

    def parts(self, size: int) -> Iterator[NDArray[np.float16]]:
        """Yield the features of all photos, ``size`` at a time, (B, P, F)."""
        for start in range(0, len(self), size):
            yield self.gather(np.arange(start, min(start + size, len(self))))

    def parts_of_views(self, size: int) -> Iterator[NDArray[np.float16]]:
        """Yield the features of all views, ``size`` at a time, (B, P, F)."""
        yield from self.parts(size)
        if self._mirrored is not None:
            yield from self._mirrored.parts(size)


def release_pages(mapping: mmap.mmap | None) -> None:
    """Release the pages of a memory map that were read; the system still caches them while memory is free.

    Otherwise the resident memory of the process grows to the size of the file, and counts against a memory limit.
    """
    if mapping is not None and hasattr(mmap, "MADV_DONTNEED"):  # not on Windows
        mapping.madvise(mmap.MADV_DONTNEED)
