"""Archives from elsewhere: fetched so that a broken download goes on, and unpacked so that nothing leaves the folder.

A download's bytes go to ``NAME.part``; ``NAME.part.json`` beside it holds what the server called them (ETag or
Last-Modified), so that only bytes of the same file are ever put together. An archive is unpacked beside its place and
renamed into it when whole: what stands there is whole, whenever the process was killed.
"""

import contextlib
import errno
import json
import logging
import lzma
import re
import shutil
import stat
import time
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from tqdm import tqdm

from capexp.errors import InputError, listed

log = logging.getLogger(__name__)

_CHUNK = 1 << 16
_START = b"PK\x03\x04"  # of a zip archive with something in it
_PASSING = (429, 500, 502, 503, 504)  # statuses that may be better a moment later


class ArchiveError(InputError):
    """An archive is damaged, is none, or wants to do what none may; another copy of it is needed."""


class _BrokenOff(Exception):
    """The connection failed, or the server did for the moment: another try may do."""


@dataclass(frozen=True)
class _Remote:
    """What is known of the file that the bytes in ``NAME.part`` come from."""

    url: str
    validator: str | None
    size: int | None

    @staticmethod
    def load(path: Path) -> "_Remote | None":
        with contextlib.suppress(OSError, ValueError, TypeError):  # none, or cut short: the download starts anew
            return _Remote(**json.loads(path.read_text()))
        return None


def fetch(url: str, path: Path, timeout: float = 30, pauses: tuple[float, ...] = (1, 2, 4, 8, 16)) -> None:
    """Downloads a zip archive to ``path``, going on where an earlier call, or a broken connection, stopped.

    A connection that breaks off is tried again, until as many tries as there are ``pauses`` (in seconds) have brought
    nothing new one after the other; ``timeout`` is how long a server may be silent, in seconds.

    Raises:
        InputError: no such file there, no zip archive, a connection given up, no room for it packed and unpacked.
    """
    part = path.with_name(f"{path.name}.part")
    reached = first = _size(part)
    idle = 0
    while True:
        try:
            _continue(url, part, timeout)
            part.replace(path)
            _beside(part).unlink(missing_ok=True)
            return
        except _BrokenOff as broken:
            held = _size(part)
            idle = 0 if held > reached else idle + 1
            reached = max(reached, held)
            kept = f"; {readable(held)} are here" if held else ""
            # What fails before it has brought anything is seldom better a second later.
            if reached == held == first or idle >= len(pauses):
                raise InputError(f"{url}: {broken}{kept}; when it can be reached, the same command goes on") from None
            log.info("%s: %s%s; going on in %g s", url, broken, kept, pauses[idle])
            time.sleep(pauses[idle])
        except OSError as error:
            raise InputError(f"{part}: {error.strerror or error}; make room or choose another folder") from None


def _continue(url: str, part: Path, timeout: float) -> None:
    """One connection: fetches what ``part`` lacks."""
    import requests
    from urllib3.exceptions import HTTPError

    held, known = _size(part), _Remote.load(_beside(part))
    if known is None or known.url != url or known.validator is None:
        held, known = 0, None
    if known is not None and held == known.size:
        return  # killed between the last byte and the renaming
    headers = {"Accept-Encoding": "identity"}
    if held and known is not None and known.validator is not None:
        headers |= {"Range": f"bytes={held}-", "If-Range": known.validator}
    try:
        with requests.get(url, headers=headers, stream=True, timeout=timeout) as answer:
            start, remote = _judge(url, part, answer.status_code, answer.headers, known)
            if held and not start:
                log.info("%s: another file than before, or a server without ranges; starting anew", url)
            if remote.size is not None:  # twice, as photos hardly shrink when they are packed
                _need_room(part.parent, 2 * remote.size - start, "fetch and unpack it")
            _receive(answer.raw, part, start, remote)
    except (requests.ConnectionError, requests.Timeout, HTTPError) as error:
        raise _BrokenOff(_reason(error, timeout)) from None
    except requests.RequestException as error:
        raise InputError(f"{url}: {str(error).rstrip('.')}; check the address") from None
    if remote.size is not None and _size(part) < remote.size:
        raise _BrokenOff(f"the connection ended before the {remote.size:,} bytes that were announced")


def _judge(url: str, part: Path, status: int, headers: Mapping[str, str], known: _Remote | None) -> tuple[int, _Remote]:
    """Where in the file an answer begins, and what it tells of the file."""
    if status in _PASSING:
        raise _BrokenOff(f"the server answers {status}")
    length = int(headers["Content-Length"]) if headers.get("Content-Length", "").isdigit() else None
    if status in (206, 416):
        held = _size(part)
        told = headers.get("Content-Range", "")
        span = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", told)
        if (
            known is None or not span or int(span[1]) != held or int(span[2]) != int(span[3]) - 1
            or known.size not in (None, int(span[3])) or length not in (None, int(span[3]) - held)
        ):  # fmt: skip
            raise InputError(
                f"{url}: asked for what follows byte {held} of {known and known.size}, the server sends {told!r}, "
                f"{length} bytes; delete {part} to start anew, or take another --source"
            )
        return held, replace(known, size=int(span[3]))
    if status != 200:
        raise InputError(f"{url}: the server answers {status}, not with the file; check the address")
    if "html" in headers.get("Content-Type", ""):
        raise ArchiveError(f"{url}: a web page comes, no zip archive; check the address")
    if headers.get("Content-Encoding", "identity") != "identity":
        raise InputError(f"{url}: it comes encoded as {headers['Content-Encoding']}; take another --source")
    etag = headers.get("ETag", "W/")
    # A weak ETag may stand for other bytes with the same meaning.
    return 0, _Remote(url, headers.get("Last-Modified") if etag.startswith("W/") else etag, length)


def _receive(body: Any, part: Path, start: int, remote: _Remote) -> None:
    name = remote.url.rpartition("/")[2]
    chunk = body.read1(_CHUNK, decode_content=False)
    if start == 0 and not (chunk and _START.startswith(chunk[: len(_START)])):
        raise ArchiveError(f"{remote.url}: begins with {chunk[:20]!r}, so is no zip archive; check the address")
    # Unbuffered: what has arrived is lost neither by a break nor by a kill.
    with (
        part.open("r+b" if start else "wb", buffering=0) as file,
        tqdm(desc=name, total=remote.size, initial=start, unit="B", unit_scale=True, unit_divisor=1024) as progress,
    ):
        # After the old bytes are gone, before the first new one.
        _beside(part).write_text(json.dumps(asdict(remote)))
        file.seek(start)
        while chunk:
            file.write(chunk)
            progress.update(len(chunk))
            chunk = body.read1(_CHUNK, decode_content=False)


def _need_room(folder: Path, size: int, purpose: str) -> None:
    free = shutil.disk_usage(folder).free
    if size > free:
        raise InputError(
            f"{folder}: {readable(size)} are needed to {purpose}, and {readable(free)} are free; make room or choose "
            "another folder"
        )


def _reason(error: BaseException, timeout: float) -> str:
    """What the innermost cause of a failed connection says."""
    while True:
        cause = getattr(error, "reason", None) or error.__cause__ or error.__context__
        if not isinstance(cause, BaseException):
            break
        error = cause
    if isinstance(error, TimeoutError):
        return f"nothing came for {timeout:g} s"
    return str(getattr(error, "strerror", None) or "the connection broke off")


def _beside(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def readable(count: int) -> str:
    """A number of bytes, to be read."""
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"


def unpack(
    archive: Path, folder: Path, needed: tuple[str, ...], most_bytes: int = 4 * 10**9, most_entries: int = 100_000
) -> None:
    """Unpacks a zip archive into ``folder``, of which ``needed`` are the names at its top that it must hold.

    They stand there only when all of the archive is unpacked and agrees with its checksums, and last.
    ``__MACOSX`` and what begins with a dot is left out.

    Raises:
        ArchiveError: it is damaged or encrypted, lacks something, has a name that leaves the folder, an entry that is
            neither file nor folder, or more entries or bytes than ``most_entries`` and ``most_bytes``.
        InputError: it cannot be written.
    """
    staging = folder / f"{archive.stem}.unpacking"
    try:
        if staging.exists():
            shutil.rmtree(staging)  # a killed unpack
        staging.mkdir(parents=True)
        try:
            with zipfile.ZipFile(archive) as opened:
                if _count(archive) not in (len(opened.infolist()), 0xFFFF):  # 0xFFFF: more than it can tell
                    raise ArchiveError("damaged, it has not as many entries as it tells")
                _write(opened, staging, needed, most_bytes, most_entries)
        except ArchiveError as error:
            raise ArchiveError(f"{archive}: {error}") from None
        except InputError:
            raise
        except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, RuntimeError, ValueError) as error:
            raise ArchiveError(f"{archive}: damaged, or no zip archive ({error})") from None
        except OSError as error:
            if error.errno == errno.EINVAL:
                raise ArchiveError(f"{archive}: damaged, it tells of places outside itself") from None
            if error.errno is None:  # from bzip2, not from the system
                raise ArchiveError(f"{archive}: damaged ({error})") from None
            raise
        for path in sorted(staging.iterdir(), key=lambda path: path.name in needed):
            path.replace(folder / path.name)
        staging.rmdir()
    except OSError as error:
        raise InputError(
            f"{error.filename or folder}: {error.strerror or error}; make room or choose another folder"
        ) from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _count(archive: Path) -> int:
    """How many entries there are by the record at the end, which zipfile does not compare."""
    with archive.open("rb") as file:
        file.seek(-min(archive.stat().st_size, 22 + 0xFFFF), 2)  # the record, and a comment of any length
        end = file.read()
    at = end.rindex(b"PK\x05\x06")
    return int.from_bytes(end[at + 10 : at + 12], "little")


def _write(opened: zipfile.ZipFile, folder: Path, needed: tuple[str, ...], most_bytes: int, most_entries: int) -> None:
    entries = opened.infolist()
    if len(entries) > most_entries:
        raise ArchiveError(f"{len(entries):,} entries; {most_entries:,} at most are unpacked")
    total = sum(entry.file_size for entry in entries)
    if total > most_bytes:
        raise ArchiveError(f"{total:,} bytes when unpacked; {most_bytes:,} at most are")
    for entry in entries:
        _refuse_unsafe(entry)
    wanted = [entry for entry in entries if not _idle(PurePosixPath(entry.filename))]
    names = [PurePosixPath(entry.filename) for entry in wanted if not entry.is_dir()]
    folders = {parent for name in names for parent in name.parents}
    if len(set(names)) < len(names) or folders & set(names):
        raise ArchiveError("two entries have one name")
    lacking = sorted(set(needed) - {name.parts[0] for name in names})
    if lacking:
        raise ArchiveError(f"there is no {listed(lacking)} in it")
    _need_room(folder, total, "unpack it")
    with tqdm(desc=f"unpacking {Path(str(opened.filename)).name}", total=len(names), unit="file") as progress:
        for entry in wanted:
            path = folder / entry.filename
            if entry.is_dir():
                path.mkdir(parents=True, exist_ok=True)
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            with opened.open(entry) as source, path.open("xb") as target:
                shutil.copyfileobj(source, target)  # of no more than the declared size, with its checksum
            if path.stat().st_size != entry.file_size:
                raise ArchiveError(f"{entry.filename!r} has not the size that is declared")
            progress.update()


def _refuse_unsafe(entry: zipfile.ZipInfo) -> None:
    name, kind = entry.orig_filename, stat.S_IFMT(entry.external_attr >> 16)
    parts = PurePosixPath(name).parts
    if not parts or ".." in parts or re.match(r"/|[A-Za-z]:", name) or "\\" in name or "\0" in name:
        raise ArchiveError(f"{name!r} leaves the folder")
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise ArchiveError(f"{name!r} is a link or a device, neither file nor folder")
    if entry.flag_bits & 1:
        raise ArchiveError(f"{name!r} is encrypted")


def _idle(name: PurePosixPath) -> bool:
    return name.parts[0] == "__MACOSX" or any(part.startswith(".") for part in name.parts)
