"""Photos' features by position in a list of photos, read from the cache's file as they are asked for.

Shapes: B photos, P grid positions, F feature.
"""

import mmap
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

_MIRROR = 7  # tells this draw of a seed and an epoch from the order of the captions


class Features:
    """Photos' features by position in a list of photos, read from the memory map as they are asked for.

    Behind the last photo's position, those of the mirrored photos may follow, in the same order.
    """

    def __init__(
        self,
        records: NDArray[np.float16],
        rows: NDArray[np.int64],
        mapping: mmap.mmap | None = None,
        mirrored: "Features | None" = None,
    ) -> None:
        self._records = records
        self._rows = rows
        self._mapping = mapping
        self._mirrored = mirrored

    def with_mirrored(self, mirrored: "Features") -> "Features":
        """These and those of the mirrored photos."""
        assert len(mirrored) == len(self) and mirrored.shape == self.shape
        return Features(self._records, self._rows, self._mapping, mirrored)

    def seen_in(self, seed: int, epoch: int) -> NDArray[np.int64]:
        """The position of what an epoch sees of each photo: the photo, or by chance the mirrored one where there is."""
        photos = np.arange(len(self))
        if self._mirrored is None:
            return photos
        is_mirrored = np.random.default_rng([seed, epoch, _MIRROR]).random(len(self)) < 0.5
        return photos + len(self) * is_mirrored

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def shape(self) -> tuple[int, int]:
        """(P, F) of one photo."""
        _, positions, size = self._records.shape
        return positions, size

    @property
    def views(self) -> int:
        """What there is of each photo: itself, and the mirrored one."""
        return 1 if self._mirrored is None else 2

    def part(self, start: int, stop: int) -> "Features":
        """The features of a slice of the photos."""
        return Features(self._records, self._rows[start:stop], self._mapping)

    def gather(self, positions: NDArray[np.int64]) -> NDArray[np.float16]:
        """The features of some photos: (B, P, F)."""
        if self._mirrored is None or (plain := positions < len(self)).all():
            found: NDArray[np.float16] = self._records[self._rows[positions]]
            release(self._mapping)
            return found
        both = np.empty((len(positions), *self.shape), np.float16)
        both[plain] = self.gather(positions[plain])
        both[~plain] = self._mirrored.gather(positions[~plain] - len(self))
        return both

    def parts(self, size: int) -> Iterator[NDArray[np.float16]]:
        """The features of all photos, of so many at a time: (B, P, F)."""
        for start in range(0, len(self), size):
            yield self.gather(np.arange(start, min(start + size, len(self))))

    def all_parts(self, size: int) -> Iterator[NDArray[np.float16]]:
        """The features at all positions, those of mirrored photos too: (B, P, F)."""
        yield from self.parts(size)
        if self._mirrored is not None:
            yield from self._mirrored.parts(size)


def release(mapping: mmap.mmap | None) -> None:
    """Lets go of the pages that were read, which the system keeps as long as nobody else wants the memory.

    Otherwise a process comes to hold the whole file, and where memory is limited that counts as its own.
    """
    if mapping is not None and hasattr(mmap, "MADV_DONTNEED"):  # not on Windows
        mapping.madvise(mmap.MADV_DONTNEED)
