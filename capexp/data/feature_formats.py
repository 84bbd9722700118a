"""The formats of files of features that were computed elsewhere, recognised by content.

* The tutorial's ``features.pkl``: a pickled dictionary from a photo's name to an array ``(1, 4096)``.
* Karpathy's ``vgg_feats.mat``: MATLAB's variable ``feats`` with a column per photo, in the order of the images in the
  captions file (COCO's or Karpathy's format). MATLAB 5 and the HDF5-based MATLAB 7.3.
* ``.npz``, HDF5 and safetensors: one array per photo under its name, or the array ``features`` with a row per photo and
  its names in ``names``.
* ``.npy``, and ``features`` alone in the others: a row per photo; the names are elsewhere.

The files are untrusted: nothing in them is executed, and no array is read before its size is checked.

Shapes: N photos in the file, F features.
"""

import math
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from capexp.data.hdf5 import is_hdf5, opened
from capexp.data.inert_pickle import read_arrays
from capexp.errors import InputError, listed

if TYPE_CHECKING:
    from h5py import File

MOST_VALUES = 2**22
"""Values of one photo's features, at most: 16 MiB of float32."""
EXAMPLES = "a pickled dictionary, .mat, .npz, .npy, HDF5 (.h5) or safetensors"

_MOST_NAMES = 10_000_000
_TABLE, _NAMES = "features", "names"  # the arrays of a file that has a row per photo
_MATLAB = "feats"
_COMPRESSION: Final = 1032  # bytes of values per byte in a file, at most: deflate cannot do more
_MATLAB_COMPRESSION: Final = 64  # the same for what is read into memory as a whole
_CHUNK: Final = 2**28  # bytes of an HDF5 chunk, which is in memory as a whole
_BLOCK: Final = 2**26  # bytes of an HDF5 table that are read at a time


@dataclass(frozen=True)
class Content:
    """An opened file: N arrays, which are read on demand."""

    names: tuple[str, ...] | None
    """None if the file has no names; then they are elsewhere."""
    count: int
    shape: tuple[int, ...]
    """The shape of a photo's array in the file; each array is checked against it when it is read."""
    read: Callable[[Sequence[int]], Iterator[NDArray[Any]]]
    """Yields the arrays at ascending positions."""
    is_of_images: bool = False
    """Whether the arrays are in the order of the images in the captions file."""


@contextmanager
def faults(path: Path) -> Iterator[None]:
    """Convert the errors by which libraries report a damaged file."""
    try:
        yield
    except (InputError, MemoryError):
        raise
    except Exception as error:  # h5py, SciPy and zipfile raise OSError, ValueError, KeyError, RuntimeError, zlib.error
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path}: cannot be read as features ({reason}); bring the file again") from None


def open_content(path: Path) -> Content:
    """Open a file of features, in the format that its first bytes tell."""
    with path.open("rb") as file:
        head = file.read(20)
    if is_hdf5(path):
        return _open_hdf5(path)
    if head.startswith(b"MATLAB 5.0 MAT-file"):
        return _open_matlab(path)
    if head.startswith(b"\x93NUMPY"):
        return _open_npy(path)
    if head.startswith(b"PK"):
        return _open_npz(path)
    if len(head) > 9 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size:
        return _open_safetensors(path)
    if head[:1] in (b"\x80", b"(", b"}", b"c"):
        return _of_arrays(path, read_arrays(path))
    if head.startswith(b"\x1f\x8b"):
        raise InputError(f"{path}: compressed by gzip; unpack it first (gunzip)")
    raise InputError(f"{path}: begins with {head[:8]!r}, no known format of features; give {EXAMPLES}")


def _of_arrays(path: Path, arrays: Mapping[str, NDArray[Any]]) -> Content:
    """Return the content of a file that is in memory, with an array per photo."""
    if not arrays:
        raise InputError(f"{path}: holds no features")
    names = tuple(arrays)

    def read(positions: Sequence[int]) -> Iterator[NDArray[Any]]:
        for position in positions:
            yield arrays[names[position]]

    return Content(names, len(names), arrays[names[0]].shape, read)


def _of_table(
    path: Path,
    shape: tuple[int, ...],
    names: tuple[str, ...] | None,
    read: Callable[[Sequence[int]], Iterator[NDArray[Any]]],
    is_of_images: bool = False,
) -> Content:
    """Return the content of a file that has a row of features for each photo."""
    if len(shape) < 2 or 0 in shape or math.prod(shape[1:]) > MOST_VALUES:
        raise InputError(f"{path}: an array {shape}; a row of features for each photo is needed")
    return Content(names, shape[0], shape[1:], read, is_of_images)


def _open_npy(path: Path) -> Content:
    size = path.stat().st_size
    with path.open("rb") as file:
        shape, _ = _npy_header(f"{path}", file, size)

    def read(positions: Sequence[int]) -> Iterator[NDArray[Any]]:
        with path.open("rb") as file:  # not memory-mapped: if it were cut meanwhile, the process would be killed
            yield from _npy_arrays(f"{path}", file, size, positions)

    return _of_table(path, shape, None, read)


def _open_npz(path: Path) -> Content:
    """Open a NumPy archive, of which one array, or one row of ``features``, is in memory at a time."""
    with zipfile.ZipFile(path) as archive:
        listing = archive.infolist()
        entries = {entry.filename.removesuffix(".npy"): entry for entry in listing}
        if not entries:
            raise InputError(f"{path}: holds no features")
        if not all(entry.filename.endswith(".npy") for entry in listing):
            raise InputError(f"{path}: an archive, but not one of NumPy's (.npz); give {EXAMPLES}")
        if len(entries) < len(listing):
            raise InputError(f"{path}: an array is there twice; save it again with numpy.savez")
        names: tuple[str, ...] | None = tuple(entries)
        is_table = entries.keys() in ({_TABLE}, {_TABLE, _NAMES})
        first = entries[_TABLE if is_table else next(iter(entries))]
        with archive.open(first) as file:
            shape, _ = _npy_header(f"{path}: {first.filename}", file, first.file_size)
        if is_table:
            names = None
            if _NAMES in entries:
                with archive.open(entries[_NAMES]) as file:
                    (values,) = _npy_arrays(f"{path}: {_NAMES}", file, entries[_NAMES].file_size, most=_MOST_NAMES)
                names = tuple(_as_text(path, value) for value in values.reshape(-1).tolist())

    def read_rows(positions: Sequence[int]) -> Iterator[NDArray[Any]]:
        with zipfile.ZipFile(path) as archive, archive.open(entries[_TABLE]) as file:
            yield from _npy_arrays(f"{path}: {_TABLE}", file, entries[_TABLE].file_size, positions)

    def read_each(positions: Sequence[int]) -> Iterator[NDArray[Any]]:
        all_entries = [*entries.values()]
        with zipfile.ZipFile(path) as archive:
            for position in positions:
                entry = all_entries[position]
                with archive.open(entry) as file:
                    yield from _npy_arrays(f"{path}: {entry.filename}", file, entry.file_size)

    return _of_table(path, shape, names, read_rows) if is_table else Content(names, len(entries), shape, read_each)


def _npy_header(where: str, file: IO[bytes], size: int) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Return shape and type of an array of at most ``size`` bytes, and go to its first value."""
    version = npy.read_magic(file)
    shape, is_fortran, dtype = (npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0)(file)
    if dtype.hasobject:
        raise InputError(f"{where}: an array of objects; save numbers as float32, and names as an array of strings")
    if is_fortran and len(shape) > 1:
        raise InputError(f"{where}: an array in Fortran order; save numpy.ascontiguousarray of it")
    if math.prod(shape) * dtype.itemsize > size:
        raise InputError(f"{where}: an array {shape}, for which the file is too short; bring the file again")
    return shape, dtype


def _npy_arrays(
    where: str, file: IO[bytes], size: int, rows: Sequence[int] | None = None, most: int = MOST_VALUES
) -> Iterator[NDArray[Any]]:
    """Yield an array, or its rows at ascending positions, of at most ``most`` values each."""
    shape, dtype = _npy_header(where, file, size)
    inner, last = shape if rows is None else shape[1:], -1
    if math.prod(inner) > most:
        raise InputError(f"{where} has {math.prod(inner):,} values; the features of one photo are needed")
    length = math.prod(inner) * dtype.itemsize
    for position in (0,) if rows is None else rows:
        file.seek(length * (position - last - 1), os.SEEK_CUR)
        content = file.read(length)
        if len(content) < length:
            raise InputError(f"{where} ends too early; bring the file again")
        yield np.frombuffer(content, dtype).reshape(inner)
        last = position


def _open_safetensors(path: Path) -> Content:
    from safetensors import safe_open

    def read_tensors(wanted: Sequence[str]) -> Iterator[NDArray[Any]]:
        with safe_open(path, "pt") as file:
            for name in wanted:
                yield file.get_tensor(name).float().numpy()

    with safe_open(path, "pt") as file:
        names = tuple(file.keys())
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names[:1]}

    def read_rows(positions: Sequence[int]) -> Iterator[NDArray[Any]]:
        with safe_open(path, "pt") as file:
            table = file.get_slice(_TABLE)
            for position in positions:
                yield table[position : position + 1][0].float().numpy()

    if names == (_TABLE,):
        return _of_table(path, shapes[_TABLE], None, read_rows)
    if not names:
        raise InputError(f"{path}: holds no features")
    return Content(names, len(names), shapes[names[0]], lambda positions: read_tensors([names[i] for i in positions]))


def _open_hdf5(path: Path) -> Content:
    """Open an HDF5 file; only arrays whose values are in this file are read."""
    with opened(path) as file:
        found = _hdf5_shapes(path, file)
        if not found:
            raise InputError(f"{path}: holds no features")
        names = None
        if {_TABLE, _NAMES} <= found.keys():
            if math.prod(found[_NAMES]) > _MOST_NAMES:
                raise InputError(f"{path}: {_NAMES} has {math.prod(found[_NAMES]):,} entries, over {_MOST_NAMES:,}")
            names = tuple(_as_text(path, value) for value in file[_NAMES][()].reshape(-1).tolist())
    is_table = names is not None or found.keys() == {_TABLE}
    is_matlab = not is_table and _MATLAB in found
    table = _MATLAB if is_matlab else _TABLE

    def read_rows(positions: Sequence[int]) -> Iterator[NDArray[Any]]:
        with opened(path) as file:
            rows = file[table]
            # In blocks: a chunk may hold a few values of every row, and would be decompressed again for each.
            size = max(1, _BLOCK // (math.prod(rows.shape[1:]) * rows.dtype.itemsize))
            for block, wanted in groupby(positions, lambda position: position // size):
                values = rows[block * size : (block + 1) * size]
                for position in wanted:
                    yield values[position - block * size]

    def read_each(positions: Sequence[int]) -> Iterator[NDArray[Any]]:
        keys = list(found)
        with opened(path) as file:
            for position in positions:
                yield file[keys[position]][()]

    if is_table or is_matlab:  # MATLAB's columns are HDF5's rows
        return _of_table(path, found[table], names, read_rows, is_matlab)
    first = next(iter(found.values()))
    if math.prod(first) > MOST_VALUES:
        raise InputError(f"{path}: {next(iter(found))} is an array {first}; the features of one photo are needed")
    return Content(tuple(found), len(found), first, read_each)


def _hdf5_shapes(path: Path, file: "File") -> dict[str, tuple[int, ...]]:
    """Return the shapes of all arrays by name; refuse arrays whose values the file cannot hold."""
    from h5py import Dataset

    found: dict[str, tuple[int, ...]] = {}
    size = path.stat().st_size

    def visit(name: str, item: object) -> None:
        if not isinstance(item, Dataset):
            return
        if item.external or item.is_virtual:
            raise InputError(f"{path}: {name} has its values in another file, which is not read")
        chunk = math.prod(item.chunks or (0,)) * item.dtype.itemsize
        if item.size * item.dtype.itemsize > _COMPRESSION * size or chunk > _CHUNK:
            raise InputError(f"{path}: {name} claims {item.size:,} values, more than the file can hold")
        found[name] = item.shape

    file.visititems(visit)  # visits no soft or external link, and each object once
    return found


def _open_matlab(path: Path) -> Content:
    """Read the variable ``feats`` of a MATLAB 5 file, (F, N), into memory."""
    try:
        from scipy import io
    except ModuleNotFoundError:
        raise InputError(f"{path}: a MATLAB file, which SciPy reads: pip install scipy") from None
    variables = {name: shape for name, shape, _ in io.whosmat(path)}
    if _MATLAB not in variables:
        raise InputError(f"{path}: has no variable '{_MATLAB}' but {listed(sorted(variables)) or 'none'}; rename it")
    shape = variables[_MATLAB]
    if math.prod(shape) > _MATLAB_COMPRESSION * path.stat().st_size:
        raise InputError(f"{path}: {_MATLAB} claims {math.prod(shape):,} values, more than the file can hold")
    values = io.loadmat(path, variable_names=[_MATLAB])[_MATLAB]
    if not isinstance(values, np.ndarray) or values.dtype.kind not in "fiu" or values.ndim != 2:
        raise InputError(f"{path}: {_MATLAB} is no matrix of numbers; (F, N) is needed, a column for each photo")

    def read(positions: Sequence[int]) -> Iterator[NDArray[Any]]:
        for position in positions:
            yield values[:, position]

    return _of_table(path, values.T.shape, None, read, is_of_images=True)


def _as_text(path: Path, value: object) -> str:
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError:
            raise InputError(f"{path}: the name {value[:40]!r} is not UTF-8") from None
    if not isinstance(value, str):
        raise InputError(f"{path}: {_NAMES} holds {type(value).__name__}, not text")
    return value
