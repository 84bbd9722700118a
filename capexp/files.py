"""Write files atomically, and report disk errors in one line."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from capexp.errors import Outage, listed

PICTURE_ENDINGS = frozenset(
    {
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff", ".jp2", ".avif"),
        *(".heic", ".heif", ".hif", ".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".ico"),
    }
)
"""The file extensions of pictures, in lower case."""

_STREAMS = ("fd", "stdout", "stderr")  # the names of this process's streams under /dev


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Convert write errors in the block (disk full, permission denied) to an :class:`Outage` that names ``path``."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise Outage(
            f"{path}: cannot be written ({reason}); free space or fix it, then run the same command again"
        ) from error


def write_whole(path: Path, text: str) -> Path:
    """Write a text file atomically: write a temporary file in the same folder and rename it. Return the file's path.

    A symbolic link is followed: its target is replaced, the link stays. A device or a pipe is appended to.
    """
    content = text.encode(errors="backslashreplace")  # the text may contain file names that are not UTF-8
    target = Path(os.path.realpath(path))
    # Append to a stream of this process too: it may be a file that other processes write to.
    is_stream = path.parts[:2] == ("/", "proc") or path.parts[:3] in [("/", "dev", name) for name in _STREAMS]
    if is_stream or (path.exists() and not path.is_file()):
        with writing(path), path.open("ab") as file:
            file.write(content)
        return path
    temporary = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        with writing(target):
            temporary.write_bytes(content)
            if target.exists():
                temporary.chmod(target.stat().st_mode)
            temporary.replace(target)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
    return target


def sync(path: Path) -> None:
    """Flush a file or folder to disk (fsync), so that it survives a power failure."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def listed_or_filed(names: list[str], shown: int = 3) -> str:
    """Return the first names for an error message; write more than ``shown`` to a file, which the text names."""
    text = listed(names, shown)
    if len(names) <= shown:
        return text
    with tempfile.NamedTemporaryFile(
        "w", prefix="capexp-names-", suffix=".txt", delete=False, encoding="utf-8", errors="backslashreplace"
    ) as file:
        file.writelines(f"{name}\n" for name in names)
    return f"{text} (all of them are in {file.name})"
