"""Atomic writes, and disk errors in one line."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from capexp.errors import Outage

_STREAMS = ("fd", "stdout", "stderr")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn errors of writing (a full disk, a folder without permission) into an :class:`Outage` of one line."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise Outage(
            f"{path}: cannot be written ({reason}); make room or mend it, then start the same again"
        ) from error


def write_whole(path: Path, text: str) -> Path:
    """Write a text file atomically: beside its place, then renamed. Return its path.

    Through a symbolic link the file that it points to is written; a device or a pipe is appended to.
    """
    shown, content = path, text.encode(errors="backslashreplace")  # names of files need not be UTF-8
    path = Path(os.path.realpath(path))
    # A process's own stream may be a file that others write to as well.
    is_stream = shown.parts[:2] == ("/", "proc") or shown.parts[:3] in [("/", "dev", name) for name in _STREAMS]
    if is_stream or (shown.exists() and not shown.is_file()):
        with writing(shown), shown.open("ab") as file:
            file.write(content)
        return shown
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with writing(path):
            beside.write_bytes(content)
            if path.exists():
                beside.chmod(path.stat().st_mode)
            beside.replace(path)
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
    return path


def sync(path: Path) -> None:
    """Flush a file or folder to disk (fsync), so that it survives a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
