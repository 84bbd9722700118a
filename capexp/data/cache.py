"""Features computed once: a memory-mapped file for each encoder, with a record for each photo.

The file is a header of 4096 bytes (magic, JSON identity, zeros), then the records: SHA-256 of the photo's bytes, CRC-32
of the features, features in float16. Records are appended under a lock; only ``recompute`` writes a new file. So a
killed extraction leaves whole records and at most one incomplete record, which the next extraction overwrites. A
changed photo has another digest, and so gets a record of its own.
"""

import json
import logging
import mmap
import os
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from io import FileIO
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from capexp.data.extraction import compute_features
from capexp.data.feature_files import FileIdentity
from capexp.data.features import Features, release_pages
from capexp.data.photos import digest_photos
from capexp.data.pixels import decoding_processes
from capexp.data.prefetch import prefetch
from capexp.data.progress import progress_bar
from capexp.data.vgg16 import Encoder, EncoderIdentity
from capexp.errors import InputError, Outage
from capexp.files import listed_or_filed, writing

log = logging.getLogger(__name__)

_MAGIC = b"capexp features 1\n"
_HEADER = 4096  # bytes
_COPIED = 256  # records that are copied at a time
_BEHIND = 4  # batches that are computed and not yet written, at most
_BLOCK = 2**23  # bytes of records that a thread checks at a time
_BLOCKS = 8  # checked in parallel, at most, before their pages are released

Identity = EncoderIdentity | FileIdentity
"""What features depend on: the encoder that computes them, or the file that they are from."""
_Batch = dict[bytes, NDArray[np.float16]]
"""Features (P, F) by the photo's digest."""


class FeatureCache:
    """The features of photos by one encoder, in a file in ``folder``."""

    def __init__(self, folder: Path, identity: Identity) -> None:
        self.identity = identity
        self.path = folder / f"{identity.label}-{identity.key()}.features"
        # Little-endian and unpadded: the file means the same on every machine.
        self._record = np.dtype([("photo", "S32"), ("check", "<u4"), ("features", "<f2", identity.shape)])

    def lookup(self, digests: list[bytes]) -> NDArray[np.int64]:
        """Return the row of each photo's record, -1 where there is none or a damaged one; reads the whole file once."""
        return self._find_rows(*self._map_records(), digests)

    def find(self, digests: list[bytes]) -> Features | None:
        """Return the features of photos, or None if the cache lacks some of them."""
        records, mapping = self._map_records()
        rows = self._find_rows(records, mapping, digests)
        return Features(records["features"], rows, mapping) if (rows >= 0).all() else None

    def open(self, digests: list[bytes]) -> Features:
        """Return the features of photos that are all in the cache."""
        features = self.find(digests)
        assert features is not None, f"{self.path}: photos are not in the cache"
        return features

    def extend(
        self, photos: list[Path], digests: list[bytes], encoder: Encoder, batch_size: int, recompute: bool = False
    ) -> int:
        """Compute the features of the photos that the cache lacks; return the number of distinct photos.

        A second process that wants the same features waits for the lock and then finds them. Memory holds a few
        batches, whatever the number of photos. Raises InputError at the end if photos cannot be read; the
        features of all others are kept.

        ``recompute`` replaces the records of all these photos; those of other photos stay. The old file is kept until
        the new one is complete, and also if a photo cannot be read.
        """
        assert encoder.identity.key() == self.identity.key()
        with self._locked():
            absent = self._absent(digests, recompute)
            # Equal files under several names have one digest and are computed once.
            paths: dict[bytes, list[Path]] = {}
            for path, digest in zip(photos, digests, strict=True):
                if digest in absent:
                    paths.setdefault(digest, []).append(path)
            if paths:
                with self._replacing(absent) if recompute else self._open_to_append() as file:
                    self._compute(paths, encoder, batch_size, file)
            return len(paths)

    def copy(
        self,
        digests: Mapping[str, bytes],
        read: Callable[[set[str]], Iterator[tuple[str, NDArray[np.float16]]]],
        recompute: bool = False,
    ) -> None:
        """Copy the features that the cache lacks, or all of them with ``recompute``, from a file of features.

        ``digests`` holds the digest of each photo by its name, and ``read`` yields names with features (P, F). If a
        photo's features are refused, the cache stays as it was.
        """
        with self._locked():
            absent = self._absent(list(digests.values()), recompute)
            names = {name for name, digest in digests.items() if digest in absent}
            if not names:
                return
            with (
                self._replacing(absent) as file,
                progress_bar(total=len(names), unit="photo", desc="features") as progress,
                self._writer(file) as writer,
            ):
                read_features = read(names)
                while batch := {digests[name]: features for name, features in islice(read_features, _COPIED)}:
                    writer.add(batch)
                    progress.update(len(batch))

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Make the folder where it is missing, and lock the cache."""
        with ExitStack() as stack:
            with self._opening():
                self.path.parent.mkdir(parents=True, exist_ok=True)
                stack.enter_context(self._lock())
            yield

    def _absent(self, digests: list[bytes], recompute: bool) -> set[bytes]:
        """Return the digests of the photos to compute: those that the cache lacks, or all with ``recompute``."""
        found = () if recompute else zip(digests, self.lookup(digests), strict=True)
        return set(digests) - {digest for digest, row in found if row >= 0}

    def shard(self, rank: int) -> "FeatureCache":
        """Return the cache that one rank writes its shard to, until :meth:`merge_shards`."""
        return self._at(self.path.with_stem(f"{self.path.stem}-rank{rank}"))

    def merge_shards(self, blocking: bool = True) -> None:
        """Append the records of all ranks' shards, killed ranks' too, and delete the shards.

        A shard that is being written is waited for; if not ``blocking`` it is left alone.
        """
        for path in sorted(self.path.parent.glob(f"{self.path.stem}-rank*{self.path.suffix}")):
            shard = self._at(path)
            try:
                with shard._lock(blocking), self._lock():
                    self._append(shard)
                    path.unlink(missing_ok=True)
            except Timeout:
                continue

    def clean_up(self) -> None:
        """Delete or merge the files that killed processes have left."""
        if self._part.exists():
            with self._lock():
                self._part.unlink(missing_ok=True)
        self.merge_shards(blocking=False)

    def _at(self, path: Path) -> "FeatureCache":
        cache = FeatureCache(path.parent, self.identity)
        cache.path = path
        return cache

    def _lock(self, blocking: bool = True) -> FileLock:
        # Whoever may write in the folder may lock it: a group may share a cache.
        return FileLock(self.path.with_suffix(".lock"), blocking=blocking, mode=0o666)

    @contextmanager
    def _opening(self) -> Iterator[None]:
        """Convert errors of a folder or file that this user may not write, or that cannot be there."""
        try:
            yield
        except (PermissionError, FileNotFoundError, FileExistsError, NotADirectoryError) as error:
            raise InputError(
                f"features.cache = '{self.path.parent}': cannot be written ({error.strerror}: {error.filename}); give "
                "--features.cache FOLDER, set XDG_CACHE_HOME, or let your group write there (chmod -R g+w)"
            ) from None

    @property
    def _part(self) -> Path:
        """The temporary file that replaces the cache once it is complete."""
        return self.path.with_suffix(".part")

    def _header(self) -> bytes:
        return (_MAGIC + json.dumps(self.identity.record(), sort_keys=True).encode()).ljust(_HEADER, b"\0")

    def _map_records(self) -> tuple[NDArray[Any], mmap.mmap | None]:
        """Return the whole records of the file, memory-mapped, and the memory map, if there is one."""
        if self.path.parent.exists() and not self.path.parent.is_dir():
            raise InputError(f"features.cache = '{self.path.parent}': a file; name a folder")
        if not self.path.is_file() or self.path.stat().st_size == 0:
            return np.empty(0, self._record), None
        with self.path.open("rb") as file:
            header = file.read(_HEADER)
        if len(header) < _HEADER or not header.startswith(_MAGIC):
            raise InputError(f"{self.path}: not a feature cache, or its header is incomplete; delete it")
        if header != self._header():
            raise InputError(f"{self.path}: features of another encoder than {self.identity}; delete it")
        count = (self.path.stat().st_size - _HEADER) // self._record.itemsize
        if count == 0:
            return np.empty(0, self._record), None
        with self.path.open("rb") as file:
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return np.frombuffer(mapping, self._record, count, _HEADER), mapping

    def _find_rows(self, records: NDArray[Any], mapping: mmap.mmap | None, digests: list[bytes]) -> NDArray[np.int64]:
        wanted = set(digests)

        def check(start: int) -> dict[bytes, int]:
            """Return the row of each wanted photo in a block of records, -1 of a damaged record."""
            block, found = records[start : start + size], {}
            for row, photo in enumerate(block["photo"]):
                digest = _full_digest(photo)
                if digest in wanted:
                    is_whole = zlib.crc32(block["features"][row]) == block["check"][row]
                    found[digest] = start + row if is_whole else -1
            return found

        rows: dict[bytes, int] = {}
        size = max(1, _BLOCK // self._record.itemsize)  # records
        with ThreadPoolExecutor() as pool:
            for found in prefetch(pool, check, range(0, len(records), size), _BLOCKS):
                rows |= found  # a photo's last record counts: it was appended because an earlier one is damaged
                release_pages(mapping)
        damaged = sum(row < 0 for row in rows.values())
        if damaged:
            log.warning("%s: %d damaged records; their features must be computed again", self.path, damaged)
        return np.array([rows.get(digest, -1) for digest in digests], dtype=np.int64)

    def _open_to_append(self) -> FileIO:
        """Open the file, created where it is missing, at the end of its last whole record."""
        count = len(self._map_records()[0])
        if not self.path.is_file() or self.path.stat().st_size == 0:
            try:
                with writing(self.path):
                    self._part.write_bytes(self._header())
                    self._part.replace(self.path)
            finally:
                self._part.unlink(missing_ok=True)
        with self._opening():
            file = self.path.open("r+b", buffering=0)  # unbuffered: a write to a full disk fails at once
        file.truncate(_HEADER + count * self._record.itemsize)
        file.seek(0, 2)
        return file

    @contextmanager
    def _replacing(self, photos: set[bytes]) -> Iterator[FileIO]:
        """Open a new file with the records of all other photos; it replaces the cache after the block."""
        records, mapping = self._map_records()
        try:
            with self._part.open("wb", buffering=0) as file:
                self._write(file, self._header())
                for start in range(0, len(records), _COPIED):
                    copied = records[start : start + _COPIED]
                    kept = [_full_digest(photo) not in photos for photo in copied["photo"]]
                    self._write(file, copied[kept].tobytes())
                    release_pages(mapping)
                yield file
                with writing(self.path):
                    os.fsync(file.fileno())
            self._part.replace(self.path)
        finally:
            self._part.unlink(missing_ok=True)

    def _append(self, shard: "FeatureCache") -> None:
        records, mapping = shard._map_records()
        with self._open_to_append() as file:
            for start in range(0, len(records), _COPIED):
                self._write(file, records[start : start + _COPIED].tobytes())
                release_pages(mapping)
            with writing(self.path):
                os.fsync(file.fileno())

    def _compute(self, paths: dict[bytes, list[Path]], encoder: Encoder, batch_size: int, file: FileIO) -> None:
        """Compute and append the features of photos, by digest; raise InputError at the end if some cannot be read."""
        processes = decoding_processes(len(paths), encoder.identity.size) if encoder.device.type == "cuda" else 0
        photos = (equal_files[0] for equal_files in paths.values())
        errors: dict[bytes, InputError] = {}
        with (
            progress_bar(total=len(paths), unit="photo", desc="features") as progress,
            closing(compute_features(photos, encoder, batch_size, processes)) as computed,
            self._writer(file) as writer,
        ):
            digests = iter(paths)
            for results in computed:
                batch: _Batch = {}
                for digest, result in zip(islice(digests, len(results)), results, strict=True):
                    if isinstance(result, InputError):
                        errors[digest] = result
                    else:
                        batch[digest] = result
                writer.add(batch)
                progress.update(len(results))
            unreadable = [str(path) for digest in errors for path in paths[digest]]
            if len(unreadable) == 1:
                raise next(iter(errors.values()))
            if unreadable:
                raise InputError(
                    f"{len(unreadable)} photos cannot be read as pictures: {listed_or_filed(unreadable)}; replace them"
                )

    def _writer(self, file: FileIO) -> "_BackgroundWriter":
        return _BackgroundWriter(self._make_records, partial(self._write, file))

    def _make_records(self, batch: _Batch) -> memoryview:
        """Return the records of a batch as bytes."""
        records = np.empty(len(batch), self._record)
        for row, (digest, features) in enumerate(batch.items()):
            records[row] = digest, 0, features
            records["check"][row] = zlib.crc32(records["features"][row])
        return records.view(np.uint8).data

    def _write(self, file: FileIO, content: bytes | memoryview) -> None:
        try:
            rest = memoryview(content)
            while rest:
                rest = rest[file.write(rest) :]
        except OSError as error:
            raise Outage(
                f"{self.path}: {error.strerror}; free space or set features.cache to another folder, then run the "
                "same command again: the features in the file are kept"
            ) from None


class _BackgroundWriter:
    """Writes batches of features in the background, in order, while the next batches are computed.

    The thread of a batch makes its records with their checksums, waits until the batch before is written, and writes.
    (This cannot deadlock: threads take batches in order, so the earlier batch is already in work.) After a batch that
    failed nothing more is written: records after an incomplete one would not be found.

    When the ``with`` block ends, even by an interrupt, no thread writes any more: the file's lock may be released.
    """

    def __init__(self, make_records: Callable[[_Batch], memoryview], write: Callable[[memoryview], None]) -> None:
        self._make_records, self._write = make_records, write
        self._pool = ThreadPoolExecutor(_BEHIND + 1)
        self._pending: deque[Future[None]] = deque()
        self._is_closed = False

    def add(self, batch: _Batch) -> None:
        """Write a batch in the background; wait while more than ``_BEHIND`` are pending, and raise their errors."""
        before = self._pending[-1] if self._pending else None
        self._pending.append(self._pool.submit(self._append, batch, before))
        while len(self._pending) > _BEHIND:
            self._pending[0].result()  # removed afterwards only: if this is interrupted, __exit__ still waits for it
            self._pending.popleft()

    def _append(self, batch: _Batch, before: Future[None] | None) -> None:
        records = self._make_records(batch)
        if before is not None:
            before.result()
        self._write(records)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        interrupt: KeyboardInterrupt | None = None
        while not self._is_closed:
            try:
                wait(self._pending)  # a thread's join, once interrupted, would return too early (Python 3.11, 3.12)
                self._pool.shutdown()
                self._is_closed = True
            except KeyboardInterrupt as another:
                interrupt = another
        if interrupt is not None:
            raise interrupt
        if error is None:
            for write in self._pending:
                write.result()


def _full_digest(stored: bytes) -> bytes:
    """Return a photo's digest of 32 bytes: NumPy strips zero bytes from the end of a byte string."""
    return bytes(stored).ljust(32, b"\0")


def cache_features(
    photos: list[Path],
    cache: FeatureCache,
    load: Callable[[], Encoder],
    batch_size: int,
    recompute: bool = False,
    digests: list[bytes] | None = None,
) -> Features:
    """Return the features of photos; compute those that the cache lacks, or all of them with ``recompute``.

    ``load`` is called only if features must be computed. ``digests`` are those of the photos, if they are known.
    """
    digests = digest_photos(photos) if digests is None else digests
    cache.clean_up()
    features = None if recompute else cache.find(digests)
    if features is None:
        cache.extend(photos, digests, load(), batch_size, recompute)
        features = cache.open(digests)
    return features
