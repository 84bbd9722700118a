"""Features computed once: one memory-mapped file an encoder, keyed by the photos' digests.

The file is a header of 4096 bytes (magic, JSON identity, zeros) and then one record a photo: SHA-256 of the
photo's bytes, CRC-32 of the features, features in float16. Records are only appended, under a lock, so a
killed extraction leaves whole records and at most one cut short, which the next one overwrites. A changed
photo has another digest and so a record of its own.
"""

import json
import logging
import mmap
import os
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing, contextmanager
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from tqdm import tqdm

from capexp.data.extraction import compute_features
from capexp.data.features import Features, release
from capexp.data.photos import digest_photos
from capexp.data.pixels import decoding_processes
from capexp.data.prefetch import prefetch
from capexp.data.vgg16 import Encoder, EncoderIdentity
from capexp.errors import InputError, Outage, listed
from capexp.files import writing

log = logging.getLogger(__name__)

_MAGIC = b"capexp features 1\n"
_HEADER = 4096
_COPIED = 256  # records at a time
_BEHIND = 4  # batches that are being written, at most
_BLOCK = 2**23  # bytes that a thread checks at a time
_CHECKED = 8  # of these at most before their pages are let go


class FeatureCache:
    """The features of photos for one encoder, in ``folder``."""

    def __init__(self, folder: Path, identity: EncoderIdentity) -> None:
        self.identity = identity
        self.path = folder / f"{identity.layer}-{identity.pool}-{identity.key()}.features"
        # Little-endian and unpadded: the file means the same on every machine.
        self._record = np.dtype([("photo", "S32"), ("check", "<u4"), ("features", "<f2", identity.shape)])

    def lookup(self, digests: list[bytes]) -> NDArray[np.int64]:
        """The record of each photo, -1 where there is none or a damaged one; reads the file once, in blocks.

        Raises:
            InputError: the file belongs to another encoder, or is no feature cache.
        """
        return self._rows(*self._records(), digests)

    def _rows(self, records: NDArray[Any], mapping: mmap.mmap | None, digests: list[bytes]) -> NDArray[np.int64]:
        wanted = set(digests)

        def check(start: int) -> dict[bytes, int]:
            block, found = records[start : start + size], {}
            for row, photo in enumerate(block["photo"], start):
                # NumPy strips zero bytes from the end of a byte string.
                key = bytes(photo).ljust(32, b"\0")
                if key in wanted:  # the last record of a photo counts: it mends a damaged one
                    whole = zlib.crc32(block["features"][row - start]) == block["check"][row - start]
                    found[key] = row if whole else -1
            return found

        rows: dict[bytes, int] = {}
        size = max(1, _BLOCK // self._record.itemsize)
        with ThreadPoolExecutor() as pool:
            for found in prefetch(pool, check, range(0, len(records), size), _CHECKED):
                rows |= found
                release(mapping)
        damaged = sum(row < 0 for row in rows.values())
        if damaged:
            log.warning("%s: %d damaged records; these photos are computed again", self.path, damaged)
        return np.array([rows.get(digest, -1) for digest in digests], dtype=np.int64)

    def find(self, digests: list[bytes]) -> Features | None:
        """The features of photos, or None where the cache lacks some."""
        records, mapping = self._records()
        rows = self._rows(records, mapping, digests)
        return Features(records["features"], rows, mapping) if (rows >= 0).all() else None

    def open(self, digests: list[bytes]) -> Features:
        """The features of photos that are all in the cache."""
        features = self.find(digests)
        assert features is not None, f"{self.path}: photos are not in the cache"
        return features

    def extend(
        self, photos: list[Path], digests: list[bytes], encoder: Encoder, batch_size: int, anew: bool = False
    ) -> int:
        """Computes the features of the photos that the cache lacks, and returns how many these were.

        A second process that wants the same waits, and then finds them. Memory holds a few batches, whatever
        the number of photos. ``anew`` computes those of all these photos, and the file stays as it was until they
        are whole; those of other photos stay.

        Raises:
            InputError: pictures that cannot be read; all are counted and the first few named, the others are kept.
        """
        assert encoder.identity.key() == self.identity.key()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self.path.with_suffix(".lock")):
            absent = set(digests)
            if not anew:
                absent -= {digest for digest, row in zip(digests, self.lookup(digests), strict=True) if row >= 0}
            # Equal files under several names have one digest and are computed once.
            todo: dict[bytes, list[Path]] = {}
            for path, digest in zip(photos, digests, strict=True):
                if digest in absent:
                    todo.setdefault(digest, []).append(path)
            if not todo:
                return 0
            bad: list[Path] = []
            faults: list[InputError] = []
            opened = self._renewing(absent) if anew else self._appending()
            processes = decoding_processes(len(todo), encoder.identity.size) if encoder.device.type == "cuda" else 0
            computed = compute_features((paths[0] for paths in todo.values()), encoder, batch_size, processes)
            with (
                opened as file,
                tqdm(total=len(todo), unit="photo", desc="features") as progress,
                closing(computed) as results,
                self._writing(file) as write,
            ):
                rest = iter(todo)
                for batch in results:
                    of_batch = dict(zip(islice(rest, len(batch)), batch, strict=True))
                    whole = {key: value for key, value in of_batch.items() if not isinstance(value, InputError)}
                    for digest, result in of_batch.items():
                        if isinstance(result, InputError):
                            bad += todo[digest]
                            faults.append(result)
                    write(whole)
                    progress.update(len(batch))
                if len(bad) == 1:
                    raise faults[0]
                if bad:
                    names = listed([str(path) for path in bad])
                    raise InputError(f"{len(bad)} photos cannot be read as pictures: {names}; replace them")
            return len(todo)

    def of_rank(self, rank: int) -> "FeatureCache":
        """Where one of several processes puts what it computes, until it is absorbed."""
        own = FeatureCache(self.path.parent, self.identity)
        own.path = self.path.with_stem(f"{self.path.stem}-rank{rank}")
        return own

    def absorb(self, wait: bool = True) -> None:
        """Takes over what processes have put into caches of their own, killed ones too, and deletes those.

        Those at work are waited for, or passed over.
        """
        for path in sorted(self.path.parent.glob(f"{self.path.stem}-rank*{self.path.suffix}")):
            part = FeatureCache(self.path.parent, self.identity)
            part.path = path
            try:
                with FileLock(path.with_suffix(".lock"), blocking=wait), FileLock(self.path.with_suffix(".lock")):
                    self._append(part)
                    path.unlink(missing_ok=True)
            except Timeout:
                continue

    def _append(self, part: "FeatureCache") -> None:
        records, mapping = part._records()
        with self._appending() as file:
            for start in range(0, len(records), _COPIED):
                self._write(file, records[start : start + _COPIED].tobytes())
                release(mapping)
            with writing(self.path):
                os.fsync(file.fileno())

    def tidy(self) -> None:
        """Clears up what killed processes have left."""
        if self._beside.exists():
            with FileLock(self.path.with_suffix(".lock")):
                self._beside.unlink(missing_ok=True)
        self.absorb(wait=False)

    def _write(self, file: Any, content: bytes | memoryview) -> None:
        try:
            rest = memoryview(content)
            while rest:
                rest = rest[file.write(rest) :]
        except OSError as error:
            raise Outage(
                f"{self.path}: {error.strerror}; make room or set features.cache to another folder, then start again: "
                "what is there is kept"
            ) from None

    @contextmanager
    def _writing(self, file: Any) -> Iterator[Callable[[dict[bytes, NDArray[np.float16]]], None]]:
        """What writes features of photos by their digests, in order, behind the back of whoever computes more of them.

        All that was given to it is in the file after the block, however that ends, unless the file cannot take it, of
        which the block is told where it has not ended otherwise.
        """

        def record(features: dict[bytes, NDArray[np.float16]]) -> NDArray[Any]:
            records = np.empty(len(features), self._record)
            for row, (digest, one) in enumerate(features.items()):
                records[row] = digest, 0, one
                records["check"][row] = zlib.crc32(records["features"][row])
            return records

        begun: deque[Future[None]] = deque()
        is_whole = True  # behind a record that was cut short, none would be found

        def write(made: Future[NDArray[Any]]) -> None:
            nonlocal is_whole
            if is_whole:
                is_whole = False
                self._write(file, made.result().view(np.uint8).data)
                is_whole = True

        def add(features: dict[bytes, NDArray[np.float16]]) -> None:
            begun.append(writer.submit(write, makers.submit(record, features)))
            while len(begun) > _BEHIND:
                begun[0].result()
                begun.popleft()

        def finish() -> None:
            """Waits for all, an interrupt meanwhile too: the file and its lock are let go of next."""
            interrupt: KeyboardInterrupt | None = None
            while not all(one.done() for one in begun):
                try:
                    wait(begun)
                except KeyboardInterrupt as error:
                    interrupt = error
            if interrupt is not None:
                raise interrupt

        with ThreadPoolExecutor(_BEHIND) as makers, ThreadPoolExecutor(1) as writer:
            try:
                yield add
            except BaseException:
                finish()
                raise
            finish()
            for one in begun:
                one.result()

    def _records(self) -> tuple[NDArray[Any], mmap.mmap | None]:
        """The whole records of the file, and the memory map that holds them."""
        if self.path.parent.exists() and not self.path.parent.is_dir():
            raise InputError(f"features.cache = '{self.path.parent}': a file; name a folder")
        if not self.path.is_file() or self.path.stat().st_size == 0:
            return np.empty(0, self._record), None
        with self.path.open("rb") as file:
            header = file.read(_HEADER)
        if len(header) < _HEADER or not header.startswith(_MAGIC):
            raise InputError(f"{self.path}: not a feature cache, or its header is cut short; delete it")
        if header != self._header():
            raise InputError(f"{self.path}: features of another encoder than {self.identity}; delete it")
        count = (self.path.stat().st_size - _HEADER) // self._record.itemsize
        if count == 0:
            return np.empty(0, self._record), None
        with self.path.open("rb") as file:
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return np.frombuffer(mapping, self._record, count, _HEADER), mapping

    @property
    def _beside(self) -> Path:
        return self.path.with_suffix(".part")

    @contextmanager
    def _renewing(self, photos: set[bytes]) -> Iterator[Any]:
        """A file with the records of all but some photos, which takes the place of the old one after the block."""
        records, mapping = self._records()
        try:
            with self._beside.open("wb", buffering=0) as file:
                self._write(file, self._header())
                for start in range(0, len(records), _COPIED):
                    part = records[start : start + _COPIED]
                    kept = [bytes(photo).ljust(32, b"\0") not in photos for photo in part["photo"]]
                    self._write(file, part[kept].tobytes())
                    release(mapping)
                yield file
                with writing(self.path):
                    os.fsync(file.fileno())
            self._beside.replace(self.path)
        finally:
            self._beside.unlink(missing_ok=True)

    def _appending(self) -> Any:
        """The file, open at the end of its last whole record."""
        count = len(self._records()[0])
        if not self.path.is_file() or self.path.stat().st_size == 0:
            try:
                with writing(self.path):
                    self._beside.write_bytes(self._header())
                    self._beside.replace(self.path)
            finally:
                self._beside.unlink(missing_ok=True)
        file = self.path.open("r+b", buffering=0)  # what does not fit on the disk is told when it is written
        file.truncate(_HEADER + count * self._record.itemsize)
        file.seek(0, 2)
        return file

    def _header(self) -> bytes:
        record = asdict(self.identity)
        del record["weights"]  # a hint where to get the weights, not part of the identity
        return (_MAGIC + json.dumps(record, sort_keys=True).encode()).ljust(_HEADER, b"\0")


def cache_features(
    photos: list[Path], cache: FeatureCache, encoder: Callable[[], Encoder], batch_size: int, anew: bool = False
) -> Features:
    """The features of photos, those that the cache lacks computed first, or all of them ``anew``.

    The encoder is only loaded if it is needed.

    Raises:
        InputError: as :meth:`FeatureCache.extend`, or the encoder's weights cannot be had.
    """
    digests = digest_photos(photos)
    cache.tidy()
    found = None if anew else cache.find(digests)
    if found is None:
        cache.extend(photos, digests, encoder(), batch_size, anew)
        found = cache.open(digests)
    return found
