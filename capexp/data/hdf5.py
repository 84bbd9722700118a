"""Reads arrays and texts from untrusted HDF5 files, such as Keras's: no other file is opened, no claim is believed.

Only hard links are followed, because soft and external ones may lead anywhere. Arrays must lie in the file as they are:
virtual arrays and external storage name other files, and a filter may swell what it reads. The library loops for ever
on a damaged heap, so heaps are checked before it opens a file.
"""

import io
import mmap
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from capexp.errors import InputError

if TYPE_CHECKING:
    from h5py import Dataset, File, Group

_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_MATLAB_HEADER = 512  # bytes before an HDF5 file, in MATLAB's
_HEAP = b"GCOL\x01"  # begins a global heap: its signature and version
_LENGTH = struct.Struct("<Q")
_OBJECT = struct.Struct("<HHIQ")  # the head of an object in it: index, references, nothing, size
_ENTRIES = 8  # looked at in each group by :func:`arrays`, at most
_CHUNK = 2**20  # values of a chunk that need not be fewer than those of the whole


def is_hdf5(path: Path) -> bool:
    """Return whether a file is HDF5, maybe behind MATLAB's header."""
    with path.open("rb") as file:
        head = file.read(_MATLAB_HEADER + len(_SIGNATURE))
    return head.startswith(_SIGNATURE) or head[_MATLAB_HEADER:] == _SIGNATURE


@contextmanager
def opened(path: Path, content: bytes | None = None) -> Iterator["File"]:
    """Open an HDF5 file to read; any damage found while it is open becomes an error that names ``path``.

    ``content`` is the file's content, if it is not at the path but in an archive there.
    """
    try:
        import h5py
    except ModuleNotFoundError as error:
        if error.name != "h5py":
            raise
        raise InputError(f"{path}: an HDF5 file, which h5py reads: pip install h5py") from None
    try:
        check_heaps(path, content)
        with h5py.File(path if content is None else io.BytesIO(content), "r", locking=False) as file:
            yield file
    except (InputError, MemoryError):
        raise
    except Exception as error:  # h5py raises OSError, KeyError, RuntimeError, ValueError, ... depending on the damage
        raise InputError(f"{path}: a damaged HDF5 file ({type(error).__name__}); get the file again") from None


def check_heaps(path: Path, content: bytes | None = None) -> None:
    """Raise InputError if a global heap, which holds texts, is damaged: the library loops on an object of no size.

    Call it before the library opens a file. ``content`` is as in :func:`opened`.
    """
    if content is not None:
        _check_heaps_of(path, content)
        return
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        _check_heaps_of(path, mapped)


def _check_heaps_of(path: Path, data: bytes | mmap.mmap) -> None:
    base = 0 if data[: len(_SIGNATURE)] == _SIGNATURE else _MATLAB_HEADER
    is_first_version = data[base + 8 : base + 9] in (b"\0", b"\1")
    length = base + (14 if is_first_version else 10)  # where the file says how many bytes a length has
    is_sound = data[base : base + len(_SIGNATURE)] == _SIGNATURE and data[length : length + 1] == b"\x08"
    start = data.find(_HEAP)
    while start >= 0 and is_sound:
        (size,) = _LENGTH.unpack_from(data, start + 8) if start + 16 <= len(data) else (0,)
        end = start + size
        if end <= len(data):  # else the library refuses the heap
            is_sound = _is_heap(data, start + 16, end)
        start = data.find(_HEAP, start + 1)
    if not is_sound:
        raise InputError(f"{path}: a damaged HDF5 file (heap); get the file again")


def _is_heap(data: bytes | mmap.mmap, at: int, end: int) -> bool:
    """Return whether the objects of a heap follow one another up to its end."""
    while at + _OBJECT.size <= end:
        index, _, _, size = _OBJECT.unpack_from(data, at)
        taken = _OBJECT.size + -(-size // 8) * 8 if index else size  # object 0 is the free space, header included
        if not _OBJECT.size <= taken <= end - at:
            return False
        at += taken
    return True


def group_in(parent: "Group", name: str) -> "Group | None":
    """Return a group in a group, reached by a hard link; None if there is none."""
    from h5py import Group
    from h5py.h5l import TYPE_HARD

    links, key = parent.id.links, name.encode()
    if not name or "/" in name or name in (".", "..") or "\0" in name:
        return None
    if not links.exists(key) or links.get_info(key).type != TYPE_HARD:
        return None
    found = parent[name]
    return found if isinstance(found, Group) else None


def text_of(file: "File", name: str) -> str | None:
    """Return a text that is an attribute of the file; None if there is none."""
    if name not in file.attrs:
        return None
    attribute = file.attrs.get_id(name)
    if attribute.shape != () or attribute.get_storage_size() > file.id.get_filesize():
        return None
    value = file.attrs[name]
    return value.decode() if isinstance(value, bytes) else value if isinstance(value, str) else None


def arrays(path: Path, group: "Group", depth: int) -> Iterator["Dataset"]:
    """Yield the arrays of floating-point numbers in a group and in its groups, ``depth`` levels deep.

    In each group only the first few entries are looked at.
    """
    from h5py import Dataset, Group

    for name in _hard_links(group):
        found = group[name]
        if isinstance(found, Group) and depth > 1:
            yield from arrays(path, found, depth - 1)
        elif isinstance(found, Dataset):
            _require_plain(path, found)
            if found.dtype.kind == "f" and found.dtype.itemsize in (2, 4, 8):
                yield found


def values_of(path: Path, dataset: "Dataset") -> NDArray[np.float32]:
    """Return the values of an array from :func:`arrays`; check its shape before."""
    chunk = int(np.prod(dataset.chunks, dtype=np.float64)) if dataset.chunks else 0
    size = dataset.size * dataset.dtype.itemsize
    is_whole = dataset.id.get_storage_size() >= size and size <= dataset.file.id.get_filesize()
    if not is_whole or chunk > max(_CHUNK, dataset.size):
        raise InputError(f"{path}: not all values of {dataset.name} are there; get the file again")
    values = np.empty(dataset.shape, np.float32)
    dataset.read_direct(values)
    return values


def _hard_links(group: "Group") -> Iterator[bytes]:
    """Yield the first names in a group that are hard links."""
    from h5py.h5l import TYPE_HARD

    names: list[bytes] = []

    def collect(name: bytes) -> bool | None:
        names.append(name)
        return True if len(names) == _ENTRIES else None  # True ends the iteration

    group.id.links.iterate(collect)
    for name in names:
        if b"/" not in name and name not in (b".", b"..") and group.id.links.get_info(name).type == TYPE_HARD:
            yield name


def _require_plain(path: Path, dataset: "Dataset") -> None:
    """Raise InputError if an array's values are not all in the file as they are."""
    from h5py.h5d import CHUNKED, COMPACT, CONTIGUOUS

    made = dataset.id.get_create_plist()
    # The layout first: even the shape of a virtual array may depend on other files.
    is_plain = made.get_layout() in (COMPACT, CONTIGUOUS, CHUNKED) and not made.get_nfilters()
    if not is_plain or made.get_external_count():
        raise InputError(
            f"{path}: {dataset.name} is compressed, virtual or in another file, which is not read; save it again as "
            "plain arrays"
        )
