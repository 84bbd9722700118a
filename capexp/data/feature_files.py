"""Features that were computed elsewhere, read from a file in one of the common formats, recognised by content.

* The tutorial's ``features.pkl``: a pickled dictionary from a photo's name to an array ``(1, 4096)``.
* Karpathy's ``vgg_feats.mat``: MATLAB's variable ``feats`` with a column per photo, in the order of the images in the
  captions file (COCO's or Karpathy's format). MATLAB 5 and the HDF5-based MATLAB 7.3.
* ``.npz``, HDF5 and safetensors: one array per photo under its name, or the array ``features`` with a row per photo and
  its names in ``names``.
* ``.npy``, and safetensors with ``features`` alone: a row per photo; the names are in a text file beside it, one per
  line.

A photo's array has the features in its last axis, and the grid, if any, in the axes before: ``(F,)``, ``(1, F)``,
``(P, F)`` or ``(height, width, F)``. Names are photos' file names, with or without the extension.

The files are untrusted: nothing in them is executed, and no array is read before its size is checked.

Shapes: N photos in the file, P grid positions, F features.
"""

import hashlib
import importlib
import json
import math
import unicodedata
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Final

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from capexp.data.caption_files import decoded_lines, read_bytes, read_captions
from capexp.data.captions import Names
from capexp.data.hdf5 import check_heaps
from capexp.data.inert_pickle import read_arrays
from capexp.data.vgg16 import EncoderIdentity
from capexp.errors import InputError, listed
from capexp.files import listed_or_filed
from capexp.settings import CaptionsConfig, FeaturesConfig, Layer, NetSetting, PhotoResize, PhotoSize, Pool

_MOST_VALUES = 2**22  # of one photo: 16 MiB of float32
_MOST_NAMES = 10_000_000
_TABLE, _NAMES = "features", "names"  # the arrays of a file that has a row per photo
_MATLAB = "feats"
_EXAMPLES = "a pickled dictionary, .mat, .npz, .npy, HDF5 (.h5) or safetensors"
_COMPRESSION: Final = 1032  # bytes of values per byte in a file, at most: deflate cannot do more
_MATLAB_COMPRESSION: Final = 64  # the same for what is read into memory as a whole
_CHUNK: Final = 2**28  # bytes of an HDF5 chunk, which is in memory as a whole


@dataclass(frozen=True)
class FileIdentity:
    """The identity of features from a file: only features of the same content are the same."""

    digest: str
    """The SHA-256 of the file, and of the names if they are in another file."""
    positions: int
    """P."""
    feature_size: int
    """F."""
    name: str
    """The file's name; has no effect on :meth:`key`."""
    layer: Layer
    """The encoder's settings as the training had them: layer, pool, photo size, resize, net; no effect on
    :meth:`key`."""
    pool: Pool
    size: PhotoSize
    resize: PhotoResize = "bilinear"
    net: NetSetting = "auto"
    encoder: EncoderIdentity | None = None
    """The encoder that has been checked against the file, if any; no effect on :meth:`key`."""

    is_mirrored = False

    def __post_init__(self) -> None:
        """Raise ValueError for a shape that no features have."""
        if min(self.shape) < 1 or math.prod(self.shape) > _MOST_VALUES:
            raise ValueError(f"features {self.shape} a photo; at most {_MOST_VALUES:,} values")

    @property
    def shape(self) -> tuple[int, int]:
        """(P, F): the number of grid positions, and of features at each."""
        return self.positions, self.feature_size

    @property
    def label(self) -> str:
        """The beginning of the name of the cache's file."""
        return "file"

    def claimed(self, weights: str) -> FeaturesConfig:
        """Return the settings of the encoder as they were at the training, with the weights that are said to be its."""
        return FeaturesConfig(
            layer=self.layer, pool=self.pool, size=self.size, resize=self.resize, net=self.net, weights=weights
        )

    def record(self) -> dict[str, object]:
        """Return what identifies the features, for digests and for the cache's header."""
        return {"file": self.digest, "positions": self.positions, "features": self.feature_size}

    def key(self) -> str:
        """Return a short digest of the identity."""
        return hashlib.sha256(json.dumps(self.record(), sort_keys=True).encode()).hexdigest()[:16]

    def __str__(self) -> str:
        known = "encoder unknown" if self.encoder is None else str(self.encoder)
        return f"file {self.name} ({self.digest[:12]}), {self.positions}x{self.feature_size}, {known}"


@dataclass(frozen=True)
class _Content:
    """An opened file: N arrays, which are read on demand."""

    names: tuple[str, ...] | None
    """None if the file has no names; then they are elsewhere."""
    count: int
    shape: tuple[int, ...]
    """The shape of a photo's array in the file; each array is checked against it when it is read."""
    read: Callable[[Sequence[int]], Iterator[NDArray[Any]]]
    """Yields the arrays at ascending positions."""


@dataclass(frozen=True)
class FeatureFile:
    """An opened file of features."""

    path: Path
    identity: FileIdentity
    names: tuple[str, ...]
    _content: _Content = field(repr=False)

    @classmethod
    def open(cls, config: FeaturesConfig, captions: CaptionsConfig) -> "FeatureFile":
        """Open the file of ``features.file``; ``captions`` name the photos of a file without names."""
        path = Path(config.file)
        if not path.is_file():
            raise InputError(f"features.file = '{path}': no such file; give {_EXAMPLES}")
        with _faults(path):
            content = _open(path)
        names, extra = content.names, b""
        if names is None:
            names = _names_elsewhere(path, content, captions)
            extra = "\n".join(names).encode()
        names = tuple(unicodedata.normalize("NFC", name) for name in names)
        if len(names) != content.count:
            raise InputError(
                f"{path}: {content.count:,} photos' features, but {len(names):,} names; bring the right file"
            )
        if twice := [name for name, count in Counter(names).items() if count > 1]:
            raise InputError(f"{path}: {listed(twice)} is there twice; delete one")
        positions, size = _grid(path, content.shape)
        try:
            identity = FileIdentity(
                digest=_digest(path, extra),
                positions=positions,
                feature_size=size,
                name=path.name,
                layer=config.layer,
                pool=config.pool,
                size=config.size,
                resize=config.resize,
                net=config.net,
            )
        except ValueError as error:
            raise InputError(f"{path}: {error}") from None
        return cls(path, identity, names, content)

    def find(self, photos: Sequence[str], where: str) -> list[str]:
        """Return the name in the file of each photo; refuse all photos that are not in it together.

        ``where`` says in messages which photos they are.
        """
        known = Names(self.names)
        found = [known.find(photo, self.path) for photo in photos]
        missing = [photo for photo, name in zip(photos, found, strict=True) if name is None]
        if missing:
            raise InputError(
                f"{self.path}: has no features of {len(missing):,} of the {len(photos):,} photos of {where}: "
                f"{listed_or_filed(missing)}; add them, or take the photos out of the list"
            )
        by_name: dict[str, str] = {}
        for photo, name in zip(photos, found, strict=True):
            assert name is not None
            if by_name.setdefault(name, photo) != photo:
                raise InputError(
                    f"{self.path}: {photo!r} and {by_name[name]!r} of {where} would both have the features of "
                    f"{name!r}; write the names with their extensions"
                )
        return [name for name in found if name is not None]

    def read(self, names: set[str]) -> Iterator[tuple[str, NDArray[np.float16]]]:
        """Yield the names and features ``(P, F)`` of some photos, in the order of the file."""
        positions = [position for position, name in enumerate(self.names) if name in names]
        with _faults(self.path):
            for position, values in zip(positions, self._content.read(positions), strict=True):
                yield self.names[position], self._checked(self.names[position], values)

    def sample(self, count: int) -> dict[str, NDArray[np.float16]]:
        """Return the features ``(P, F)`` of at most ``count`` photos of the file, by name."""
        return dict(self.read(set(self.names[:: -(-len(self.names) // count)])))

    def _checked(self, name: str, values: NDArray[Any]) -> NDArray[np.float16]:
        where = f"{self.path}: {name!r}"
        if values.shape != self._content.shape:
            raise InputError(
                f"{where}: an array {values.shape}, where the first is {self._content.shape}; compute it again"
            )
        if values.dtype.kind not in "fiu":
            raise InputError(f"{where}: holds {values.dtype}, not numbers; compute it again")
        if not np.isfinite(values).all():
            raise InputError(f"{where}: holds values that are not finite; compute it again")
        with np.errstate(over="ignore"):
            halves = values.reshape(self.identity.shape).astype(np.float16)
        if not np.isfinite(halves).all():
            raise InputError(f"{where}: holds {abs(values).max():.3g}, over float16's 65,504; scale the features down")
        return halves


def _grid(path: Path, shape: tuple[int, ...]) -> tuple[int, int]:
    """Return (P, F) of a photo's array."""
    if not shape or math.prod(shape) == 0 or len(shape) > 4:
        raise InputError(
            f"{path}: a photo's features are an array {shape}; (F,), (P, F) or (height, width, F) is needed"
        )
    while len(shape) > 1 and shape[0] == 1:
        shape = shape[1:]
    if len(shape) == 3 and shape[1] == shape[2] < shape[0]:
        raise InputError(
            f"{path}: a photo's features are an array {shape}, with the features first; bring them last: "
            f"({shape[1]}, {shape[2]}, {shape[0]})"
        )
    return math.prod(shape[:-1]), shape[-1]


def _digest(path: Path, extra: bytes) -> str:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    digest.update(extra)
    return digest.hexdigest()


@contextmanager
def _faults(path: Path) -> Iterator[None]:
    """Convert the errors by which libraries report a damaged file."""
    try:
        yield
    except (InputError, MemoryError):
        raise
    except (
        Exception
    ) as error:  # h5py, SciPy and zipfile raise OSError, ValueError, KeyError, RuntimeError, zlib.error, ...
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path}: cannot be read as features ({reason}); bring the file again") from None


def _open(path: Path) -> _Content:
    with path.open("rb") as file:
        head = file.read(520)
    if head.startswith(b"\x89HDF\r\n\x1a\n") or head[512:].startswith(b"\x89HDF"):
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
    raise InputError(f"{path}: begins with {head[:8]!r}, no known format of features; give {_EXAMPLES}")


def _of_arrays(path: Path, arrays: Mapping[str, NDArray[Any]]) -> _Content:
    """Return the content of a file that is in memory, with an array per photo."""
    if not arrays:
        raise InputError(f"{path}: holds no features")
    names = tuple(arrays)

    def read(positions: Sequence[int]) -> Iterator[NDArray[Any]]:
        for position in positions:
            yield arrays[names[position]]

    return _Content(names, len(names), arrays[names[0]].shape, read)


def _of_table(path: Path, table: Any, names: tuple[str, ...] | None, columns: bool = False) -> _Content:
    """Return the content of an array with a row per photo, in memory or read on demand, or with a column per photo."""
    if len(table.shape) < 2 or 0 in table.shape:
        raise InputError(f"{path}: an array {tuple(table.shape)}; a row of features for each photo is needed")
    count, shape = (table.shape[1], (table.shape[0],)) if columns else (table.shape[0], tuple(table.shape[1:]))

    def read(positions: Sequence[int]) -> Iterator[NDArray[Any]]:
        for position in positions:
            yield np.asarray(table[:, position] if columns else table[position])

    return _Content(names, count, shape, read)


def _open_npy(path: Path) -> _Content:
    return _of_table(path, np.load(path, mmap_mode="r", allow_pickle=False), None)


def _open_npz(path: Path) -> _Content:
    """Open a NumPy archive, of which one array, or one row of ``features``, is in memory at a time."""
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename.removesuffix(".npy"): entry for entry in archive.infolist()}
        if not entries:
            raise InputError(f"{path}: holds no features")
        if {_TABLE, _NAMES} <= entries.keys():
            (values,) = _npz_arrays(path, archive, entries[_NAMES], _MOST_NAMES)
            names = tuple(_as_text(path, value) for value in values.reshape(-1).tolist())
            shape = _npz_header(path, archive, entries[_TABLE])[0]
            if len(shape) < 2 or 0 in shape:
                raise InputError(f"{path}: {_TABLE} is an array {shape}; a row of features for each photo is needed")
        else:
            names, shape = tuple(entries), None
            first = _npz_header(path, archive, entries[names[0]])[0]

    def read(positions: Sequence[int]) -> Iterator[NDArray[Any]]:
        with zipfile.ZipFile(path) as archive:
            if shape is not None:
                yield from _npz_arrays(path, archive, entries[_TABLE], _MOST_VALUES, positions)
                return
            for position in positions:
                yield from _npz_arrays(path, archive, entries[names[position]], _MOST_VALUES)

    if shape is not None:
        return _Content(names, shape[0], shape[1:], read)
    return _Content(names, len(names), first, read)


def _npz_header(
    path: Path, archive: zipfile.ZipFile, entry: zipfile.ZipInfo, file: IO[bytes] | None = None
) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Return shape and type of an array, and go to its first value; refuse an array that the entry cannot hold."""
    if file is None:
        with archive.open(entry) as file:
            return _npz_header(path, archive, entry, file)
    version = npy.read_magic(file)
    shape, is_fortran, dtype = (npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0)(file)
    if dtype.hasobject or (is_fortran and len(shape) > 1) or math.prod(shape) * dtype.itemsize > entry.file_size:
        raise InputError(f"{path}: {entry.filename} is no array of numbers in C order that fits into the file")
    return shape, dtype


def _npz_arrays(
    path: Path, archive: zipfile.ZipFile, entry: zipfile.ZipInfo, most: int, rows: Sequence[int] | None = None
) -> Iterator[NDArray[Any]]:
    """Yield an array of an archive, or its rows at ascending positions, of at most ``most`` values each."""
    with archive.open(entry) as file:
        shape, dtype = _npz_header(path, archive, entry, file)
        inner, last = shape if rows is None else shape[1:], -1
        if math.prod(inner) > most:
            raise InputError(
                f"{path}: {entry.filename} has {math.prod(inner):,} values; the features of one photo are needed"
            )
        length = math.prod(inner) * dtype.itemsize
        for position in (0,) if rows is None else rows:
            file.seek(length * (position - last - 1), 1)
            content = file.read(length)
            if len(content) < length:
                raise InputError(f"{path}: {entry.filename} ends too early; bring the file again")
            yield np.frombuffer(content, dtype).reshape(inner)
            last = position


def _open_safetensors(path: Path) -> _Content:
    from safetensors import safe_open

    def read_tensors(wanted: Sequence[str]) -> Iterator[NDArray[Any]]:
        with safe_open(path, "pt") as file:
            for name in wanted:
                yield file.get_tensor(name).float().numpy()

    with safe_open(path, "pt") as file:
        names = tuple(file.keys())
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names[:1]}

    if names == (_TABLE,):

        def read_rows(positions: Sequence[int]) -> Iterator[NDArray[Any]]:
            with safe_open(path, "pt") as file:
                table = file.get_slice(_TABLE)
                for position in positions:
                    yield table[position : position + 1][0].float().numpy()

        shape = shapes[_TABLE]
        if len(shape) < 2 or 0 in shape:
            raise InputError(f"{path}: {_TABLE} is an array {shape}; a row of features for each photo is needed")
        return _Content(None, shape[0], shape[1:], read_rows)
    if not names:
        raise InputError(f"{path}: holds no features")
    return _Content(names, len(names), shapes[names[0]], lambda positions: read_tensors([names[i] for i in positions]))


def _open_hdf5(path: Path) -> _Content:
    """Open an HDF5 file; of its data sets only those that are whole in this file are read."""
    h5py, size = _require("h5py", path), path.stat().st_size
    check_heaps(path)
    with h5py.File(path, "r") as file:
        found: dict[str, tuple[int, ...]] = {}

        def visit(name: str, item: Any) -> bool | None:
            if isinstance(item, h5py.Dataset):
                if item.external or item.is_virtual:
                    raise InputError(f"{path}: {name} has its values in another file, which is not read")
                chunk = math.prod(item.chunks or (0,)) * item.dtype.itemsize
                if item.size * item.dtype.itemsize > _COMPRESSION * size or chunk > _CHUNK:
                    raise InputError(f"{path}: {name} claims {item.size:,} values, more than the file can hold")
                found[name] = item.shape
            return True if len(found) > _MOST_NAMES else None

        file.visititems(visit)  # visits no soft or external link, and each object once
        if not found:
            raise InputError(f"{path}: holds no features")
        matlab = found.keys() & {_MATLAB}
        names = None
        if {_TABLE, _NAMES} <= found.keys():
            if math.prod(found[_NAMES]) > _MOST_NAMES:
                raise InputError(f"{path}: {_NAMES} has {math.prod(found[_NAMES]):,} entries")
            names = tuple(_as_text(path, value) for value in file[_NAMES][()].reshape(-1).tolist())
    table = _MATLAB if matlab else _TABLE if names is not None or found.keys() == {_TABLE} else None

    def read_rows(positions: Sequence[int]) -> Iterator[NDArray[Any]]:
        with h5py.File(path, "r") as file:
            for position in positions:
                yield file[table][position]

    def read_each(positions: Sequence[int]) -> Iterator[NDArray[Any]]:
        keys = list(found)
        with h5py.File(path, "r") as file:
            for position in positions:
                yield file[keys[position]][()]

    if table is not None:  # MATLAB's columns are HDF5's rows
        shape = found[table]
        if len(shape) < 2 or 0 in shape or math.prod(shape[1:]) > _MOST_VALUES:
            raise InputError(f"{path}: {table} is an array {shape}; a row of features for each photo is needed")
        return _Content(names, shape[0], shape[1:], read_rows)
    first = next(iter(found.values()))
    if math.prod(first) > _MOST_VALUES:
        raise InputError(f"{path}: {next(iter(found))} is an array {first}; the features of one photo are needed")
    return _Content(tuple(found), len(found), first, read_each)


def _open_matlab(path: Path) -> _Content:
    """Read the variable ``feats`` of a MATLAB 5 file, (F, N), into memory."""
    scipy_io = _require("scipy.io", path)
    variables = {name: shape for name, shape, _ in scipy_io.whosmat(path)}
    if _MATLAB not in variables:
        raise InputError(f"{path}: has no variable '{_MATLAB}' but {listed(sorted(variables)) or 'none'}; rename it")
    shape = variables[_MATLAB]
    if math.prod(shape) > _MATLAB_COMPRESSION * path.stat().st_size:
        raise InputError(f"{path}: {_MATLAB} claims {math.prod(shape):,} values, more than the file can hold")
    values = scipy_io.loadmat(path, variable_names=[_MATLAB])[_MATLAB]
    if not isinstance(values, np.ndarray) or values.dtype.kind not in "fiu" or values.ndim != 2:
        raise InputError(f"{path}: {_MATLAB} is no matrix of numbers; (F, N) is needed, a column for each photo")
    return _of_table(path, values, None, columns=True)


def _require(module: str, path: Path) -> Any:
    """Import a package of the extra ``files``."""
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.partition(".")[0]
        raise InputError(f"{path}: reading it needs {package}: pip install {package}") from None


def _as_text(path: Path, value: object) -> str:
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError:
            raise InputError(f"{path}: the name {value[:40]!r} is not UTF-8") from None
    if not isinstance(value, str):
        raise InputError(f"{path}: {_NAMES} holds {type(value).__name__}, not text")
    return value


def _names_elsewhere(path: Path, content: _Content, captions: CaptionsConfig) -> tuple[str, ...]:
    """Return the names for a file without names: from a text file beside it, else from the captions file."""
    beside = [path.with_suffix(".txt"), path.with_name(f"{_NAMES}.txt")]
    for file in beside:
        if file.is_file():
            return tuple(line.strip() for _, line in decoded_lines(file, read_bytes(file, "list of names")))
    if captions.splits != "files":
        source = captions.root / captions.captions
        read = read_captions(source, captions.format)
        if read.images is not None:
            if len(read.images) != content.count:
                raise InputError(
                    f"{path}: {content.count:,} photos' features, but {source} has {len(read.images):,} images; "
                    "bring the captions file that it belongs to"
                )
            return read.images
    raise InputError(
        f"{path}: has no names of photos; write them to {beside[0]}, one per line, or set captions.captions to the "
        "JSON file (COCO's or Karpathy's) whose images are in this order"
    )
