"""Photo files as pixels: any picture that Pillow reads, as RGB, upright, first frame."""

import glob
import hashlib
import importlib.util
import io
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from capexp.data.progress import progress_bar
from capexp.errors import InputError, listed
from capexp.files import PICTURE_ENDINGS, listed_or_filed

log = logging.getLogger(__name__)

MAXIMUM_PIXELS = 100_000_000  # a 100-megapixel photo; more is a decompression bomb, or no photo
MAXIMUM_UPLOAD = 20 * 2**20  # the largest size in bytes of a photo that a client or visitor sends
_BLOCK = 2**20  # bytes of a file that are read at a time
_FILES_PER_TASK = 64  # the most files per task; single files would take as long to hand to a thread as to read
_TASKS = 256  # the fewest tasks if there are as many files, so that every thread gets some
_HEIF = frozenset({".heic", ".heif", ".hif"})
_HEIF_REMEDY = "pip install pillow-heif, which reads HEIC"


Photo = Path | str | bytes | bytearray | memoryview | BinaryIO | Image.Image | NDArray[np.uint8]
"""A photo: its path, its file's bytes or open file, an open image, or an array ``(height, width, 3)`` of RGB values."""


def read_photo(source: Photo) -> Image.Image:
    """Return a photo as an upright RGB image: first frame, EXIF rotation applied, transparency over white.

    Raise InputError if it cannot be decoded as a picture, or if it has more than 100 megapixels.
    """
    _with_heif()
    if isinstance(source, np.ndarray):
        source = _from_array(source)
    if hasattr(source, "read"):
        source = source.read()
    if isinstance(source, bytearray | memoryview):
        source = bytes(source)
    source = Path(source) if isinstance(source, str) else source
    name = str(source) if isinstance(source, Path) else "the photo"
    if isinstance(source, Path) and not source.is_file():  # opening a pipe would wait for ever
        raise InputError(f"{name}: no such file")
    try:
        with _opened(source) as image:
            width, height = image.size
            if width * height > MAXIMUM_PIXELS:
                raise InputError(f"{name}: {width}x{height} pixels are over {MAXIMUM_PIXELS:,}; scale it down")
            image.load()
            return _rgb(ImageOps.exif_transpose(image))
    except InputError:
        raise
    except Image.DecompressionBombError:
        raise InputError(f"{name}: more than {MAXIMUM_PIXELS:,} pixels; scale it down") from None
    except MemoryError:
        raise
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, ... on broken files
        reason = str(error) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            reason = "not a picture in a format that Pillow knows"
            if isinstance(source, Path) and source.suffix.lower() in _HEIF and not _with_heif():
                raise InputError(f"{name}: HEIC, which Pillow alone cannot read; {_HEIF_REMEDY}") from None
        raise InputError(f"{name}: cannot be read as a picture ({reason}); replace it") from None


def _from_array(values: NDArray[np.uint8]) -> Image.Image:
    if values.ndim != 3 or values.shape[2] != 3 or values.dtype != np.uint8 or values.size == 0:
        raise InputError(
            f"the photo: an array {values.shape} of {values.dtype}; give (height, width, 3) of uint8, in RGB order"
        )
    return Image.fromarray(values)


def _opened(source: Path | bytes | Image.Image) -> AbstractContextManager[Image.Image]:
    """Return a context with the image; an image that the caller has opened stays open."""
    if isinstance(source, Image.Image):
        return nullcontext(source)
    return Image.open(source if isinstance(source, Path) else io.BytesIO(source))


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # Pillow's own conversion clips at 255 instead of scaling
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        values = np.asarray(image, dtype=np.float64)
        scale = 255 / max(float(values.max()), 255.0)
        image = Image.fromarray((values.clip(min=0) * scale).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


@cache
def _with_heif() -> bool:
    """Let Pillow read HEIC if pillow-heif is installed; return whether it is."""
    if importlib.util.find_spec("pillow_heif") is None:
        return False
    import pillow_heif

    pillow_heif.register_heif_opener()
    return True


def _readable_extensions() -> set[str]:
    """Return the file extensions, in lower case, of the formats that can be read on this machine."""
    with_heif = _with_heif()  # first: it registers formats
    formats = Image.registered_extensions()
    extensions = {extension for extension in PICTURE_ENDINGS if formats.get(extension) in Image.OPEN}
    return extensions if with_heif else extensions - _HEIF


def find_photos(names: list[str]) -> list[Path]:
    """Return photo files by path, by pattern (``holiday/*.jpg``), or all pictures in a folder and below, in order.

    In folders, hidden files and folders are skipped, and files of other formats are left out with a warning. One error
    names all ``names`` without a photo.
    """
    found: list[Path] = []
    missing: list[str] = []
    for name in names:
        path = Path(name)
        if name and path.is_dir():
            photos = _photos_in(path)
        elif path.is_file():
            photos = [path]
        else:
            matches = sorted(glob.glob(name, recursive=True))  # noqa: PTH207 (pathlib takes no absolute patterns)
            photos = [Path(match) for match in matches if Path(match).is_file()]
        found += photos
        if not photos:
            is_folder = bool(name) and path.is_dir()
            is_other = path.exists() and not is_folder
            missing.append(name + (" (a folder without pictures)" if is_folder else " (no file)" if is_other else ""))
    if missing:
        raise InputError(f"{listed(missing)}: no such photo; give photos, folders or patterns that are there")
    return found


def _photos_in(folder: Path) -> list[Path]:
    """Return all pictures in a folder and below; warn of files that are left out."""
    readable = _readable_extensions()
    files = [
        file
        for file in sorted(folder.rglob("*"))
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    ]
    others = [file for file in files if file.suffix.lower() not in readable]
    heif = [file.name for file in others if file.suffix.lower() in _HEIF]
    if heif:
        log.warning("%s: %d photos left out: %s; %s", folder, len(heif), listed(heif), _HEIF_REMEDY)
    rest = [file.name for file in others if file.suffix.lower() not in _HEIF]
    if rest:
        log.warning("%s: %d files left out that are no pictures: %s", folder, len(rest), listed(rest))
    return [file for file in files if file.suffix.lower() in readable]


def require_readable(paths: list[Path]) -> None:
    """Open and decode each photo; raise one InputError that names all unreadable photos."""
    unread: list[str] = []
    with ThreadPoolExecutor() as pool, progress_bar(total=len(paths), unit="photo", desc="decoding") as progress:
        for path, is_read in zip(paths, pool.map(_is_readable, paths), strict=True):
            if not is_read:
                unread.append(str(path))
            progress.update()
    if unread:
        raise InputError(f"{len(unread)} photos cannot be read as pictures: {listed_or_filed(unread)}; replace them")


def _is_readable(path: Path) -> bool:
    try:
        read_photo(path)
    except InputError:
        return False
    return True


def digest_photos(paths: list[Path]) -> list[bytes]:
    """Return the SHA-256 of each file's bytes: a photo is identified by its content, so a changed photo is a new one.

    Raise one InputError that names all files that cannot be read.
    """

    def digest(path: Path) -> bytes | None:
        sha256 = hashlib.sha256()
        try:
            # Read without a Python file object: creating one takes as long as reading a small photo.
            file = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
            try:
                while block := os.read(file, _BLOCK):
                    sha256.update(block)
            finally:
                os.close(file)
        except OSError:
            return None
        return sha256.digest()

    def digest_part(start: int) -> list[bytes | None]:
        return [digest(path) for path in paths[start : start + size]]

    size = max(1, min(_FILES_PER_TASK, len(paths) // _TASKS))
    with ThreadPoolExecutor() as pool:
        digests = [value for part in pool.map(digest_part, range(0, len(paths), size)) for value in part]
    unread = [str(path) for path, value in zip(paths, digests, strict=True) if value is None]
    if unread:
        raise InputError(f"{len(unread)} photos cannot be read: {listed_or_filed(unread)}")
    return [value for value in digests if value is not None]
