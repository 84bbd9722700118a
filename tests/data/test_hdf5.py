"""A damaged heap, on which the HDF5 library would loop for ever, is refused before the library opens the file."""

import struct
from pathlib import Path

import h5py
import pytest

from capexp.data.hdf5 import opened, text_of
from capexp.errors import InputError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file with a text of variable length, which is in a global heap."""
    with h5py.File(tmp_path / "file.h5", "w") as file:
        file.attrs["text"] = "words"
    return tmp_path / "file.h5"


def test_a_text_is_read(path: Path) -> None:
    with opened(path) as file:
        assert text_of(file, "text") == "words"
        assert text_of(file, "other") is None
    with opened(path, path.read_bytes()) as file:
        assert text_of(file, "text") == "words"


@pytest.mark.parametrize(
    ("number", "size"), [(n, size) for n in (0, 1) for size in (0, 8, 2**32, 2**63, 2**64 - 24) if (n, size) != (0, 8)]
)
def test_heaps_without_an_end_are_refused(path: Path, number: int, size: int) -> None:
    content = bytearray(path.read_bytes())
    heap = content.index(b"GCOL")
    first = struct.unpack_from("<HHIQ", content, heap + 16)
    assert first[0] == 1 and first[3] == len("words")
    at = heap + 16 + number * 24  # the object, or the free space after it
    struct.pack_into("<HHIQ", content, at, 1 - number, 1, 0, size)
    path.write_bytes(content)
    for given in (None, bytes(content)):
        with pytest.raises(InputError, match="a damaged HDF5 file"), opened(path, given) as file:
            text_of(file, "text")


def test_files_that_are_cut_or_empty_are_refused(path: Path) -> None:
    content = path.read_bytes()
    for end in (0, 5, 12, 50, 600):
        path.write_bytes(content[:end])
        with pytest.raises(InputError, match="a damaged HDF5 file"), opened(path):
            pass
