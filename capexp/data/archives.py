"""Archives from the network: downloads that resume, and unpacking that cannot write outside the folder.

A download is written to ``NAME.part``. ``NAME.part.json`` beside it holds the server's validator of the file (ETag or
Last-Modified), so that only parts of the same file are put together. An archive is unpacked into a staging folder, and
its content is moved into place only when it is whole: a kill leaves nothing incomplete there.
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

from capexp.data.progress import progress_bar
from capexp.errors import InputError, listed

log = logging.getLogger(__name__)

_CHUNK = 1 << 16
_START = b"PK\x03\x04"  # the first bytes of a zip archive that is not empty
_TRANSIENT = (429, 500, 502, 503, 504)  # HTTP statuses after which a retry may succeed


class ArchiveError(InputError):
    """An archive is damaged, unsafe, or not an archive; another copy of it is needed."""


class _Interrupted(Exception):
    """A download was interrupted by the connection or the server; a retry may succeed."""


@dataclass(frozen=True)
class _Remote:
    """The remote file that ``NAME.part`` is a part of."""

    url: str
    validator: str | None
    size: int | None

    @staticmethod
    def load(path: Path) -> "_Remote | None":
        """Read the record in ``NAME.part.json``; None if it is missing or damaged: then the download starts again."""
        with contextlib.suppress(OSError, ValueError, TypeError):
            return _Remote(**json.loads(path.read_text()))
        return None


def fetch(url: str, path: Path, timeout: float = 30, pauses: tuple[float, ...] = (1, 2, 4, 8, 16)) -> None:
    """Download a zip archive to ``path``; resume where an earlier call or a broken connection stopped.

    An interrupted download is retried, with ``pauses`` (in seconds) between retries, until as many retries in a row
    have received nothing. ``timeout`` is the time without an answer, in seconds, after which a connection is given up.
    The disk must have room for the archive and for its content.
    """
    part = path.with_name(f"{path.name}.part")
    most = first = _size(part)  # bytes
    failures = 0  # tries in a row that received nothing new
    while True:
        try:
            _download(url, part, timeout)
            part.replace(path)
            _record_of(part).unlink(missing_ok=True)
            return
        except _Interrupted as reason:
            received = _size(part)
            failures = 0 if received > most else failures + 1
            most = max(most, received)
            kept = f"; {_readable(received)} are kept" if received else ""
            # If the first try has received nothing, do not retry: a second later it seldom succeeds.
            if most == received == first or failures >= len(pauses):
                raise InputError(f"{url}: {reason}{kept}; when it can be reached, the same command goes on") from None
            log.info("%s: %s%s; going on in %g s", url, reason, kept, pauses[failures])
            time.sleep(pauses[failures])
        except OSError as error:
            raise InputError(f"{part}: {error.strerror or error}; free space or choose another folder") from None


def _download(url: str, part: Path, timeout: float) -> None:
    """Download the bytes that ``part`` lacks, in one connection."""
    import requests
    from urllib3.exceptions import HTTPError

    received, known = _size(part), _Remote.load(_record_of(part))
    if known is None or known.url != url or known.validator is None:
        received, known = 0, None
    if known is not None and received == known.size:
        return  # an earlier call was killed between the last byte and the renaming
    headers = {"Accept-Encoding": "identity"}
    if received and known is not None and known.validator is not None:
        headers |= {"Range": f"bytes={received}-", "If-Range": known.validator}
    try:
        with requests.get(url, headers=headers, stream=True, timeout=timeout) as answer:
            start, remote = _check_answer(url, part, answer.status_code, answer.headers, known)
            if received and not start:
                log.info("%s: the file has changed, or the server supports no ranges; starting again", url)
            if remote.size is not None:  # twice the size: unpacked photos are about as large as their archive
                _require_room(part.parent, 2 * remote.size - start, "fetch and unpack it")
            _receive(answer.raw, part, start, remote)
    except (requests.ConnectionError, requests.Timeout, HTTPError) as error:
        raise _Interrupted(_reason(error, timeout)) from None
    except requests.RequestException as error:
        raise InputError(f"{url}: {str(error).rstrip('.')}; check the address") from None
    if remote.size is not None and _size(part) < remote.size:
        raise _Interrupted(f"the connection ended before the {remote.size:,} bytes that were announced")


def _check_answer(
    url: str, part: Path, status: int, headers: Mapping[str, str], known: _Remote | None
) -> tuple[int, _Remote]:
    """Check the head of an answer; return the position in the file at which its body starts, and the remote file."""
    if status in _TRANSIENT:
        raise _Interrupted(f"the server answers {status}")
    length = int(headers["Content-Length"]) if headers.get("Content-Length", "").isdigit() else None
    if status in (206, 416):
        received = _size(part)
        content_range = headers.get("Content-Range", "")
        span = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", content_range)
        if (
            known is None or not span or int(span[1]) != received or int(span[2]) != int(span[3]) - 1
            or known.size not in (None, int(span[3])) or length not in (None, int(span[3]) - received)
        ):  # fmt: skip
            raise InputError(
                f"{url}: asked for what follows byte {received} of {known and known.size}, the server sends "
                f"{content_range!r}, {length} bytes; delete {part} to start again, or take another --source"
            )
        return received, replace(known, size=int(span[3]))
    if status != 200:
        raise InputError(f"{url}: the server answers {status}, not with the file; check the address")
    if "html" in headers.get("Content-Type", ""):
        raise ArchiveError(f"{url}: a web page comes, no zip archive; check the address")
    if headers.get("Content-Encoding", "identity") != "identity":
        raise InputError(f"{url}: it comes encoded as {headers['Content-Encoding']}; take another --source")
    etag = headers.get("ETag", "W/")
    # A weak ETag (W/) may be the same for different bytes.
    return 0, _Remote(url, headers.get("Last-Modified") if etag.startswith("W/") else etag, length)


def _receive(body: Any, part: Path, start: int, remote: _Remote) -> None:
    name = remote.url.rpartition("/")[2]
    chunk = body.read1(_CHUNK, decode_content=False)
    if start == 0 and not (chunk and _START.startswith(chunk[: len(_START)])):
        raise ArchiveError(f"{remote.url}: begins with {chunk[:20]!r}, so is no zip archive; check the address")
    # Unbuffered: a broken connection or a kill loses nothing that was received.
    with (
        part.open("r+b" if start else "wb", buffering=0) as file,
        progress_bar(
            desc=name, total=remote.size, initial=start, unit="B", unit_scale=True, unit_divisor=1024
        ) as progress,
    ):
        # Write the record after the old bytes were truncated and before the first new byte.
        _record_of(part).write_text(json.dumps(asdict(remote)))
        file.seek(start)
        while chunk:
            file.write(chunk)
            progress.update(len(chunk))
            chunk = body.read1(_CHUNK, decode_content=False)


def _require_room(folder: Path, size: int, purpose: str) -> None:
    free = shutil.disk_usage(folder).free
    if size > free:
        raise InputError(
            f"{folder}: {_readable(size)} are needed to {purpose}, and {_readable(free)} are free; free space or "
            "choose another folder"
        )


def _reason(error: BaseException, timeout: float) -> str:
    """Return the message of the innermost cause of a failed connection."""
    while True:
        cause = getattr(error, "reason", None) or error.__cause__ or error.__context__
        if not isinstance(cause, BaseException):
            break
        error = cause
    if isinstance(error, TimeoutError):
        return f"nothing came for {timeout:g} s"
    return str(getattr(error, "strerror", None) or "the connection broke off")


def _record_of(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _readable(count: int) -> str:
    """Return a number of bytes in GiB or MiB."""
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"


def unpack(
    archive: Path, folder: Path, needed: tuple[str, ...], most_bytes: int = 4 * 10**9, most_entries: int = 100_000
) -> None:
    """Unpack a zip archive into ``folder``; it must contain the names ``needed`` at its top level.

    Its content appears in ``folder`` only when all of it is unpacked and agrees with its checksums; the names
    ``needed`` appear last. ``__MACOSX`` and names that start with a dot are left out.

    Raises:
        ArchiveError: it is damaged or encrypted, lacks a name that is needed, has a name that leaves the folder or an
            entry that is neither file nor folder, or has more entries or bytes than ``most_entries`` or ``most_bytes``.
    """
    staging = folder / f"{archive.stem}.unpacking"
    try:
        if staging.exists():
            shutil.rmtree(staging)  # an earlier call was killed
        staging.mkdir(parents=True)
        try:
            with zipfile.ZipFile(archive) as opened:
                if _declared_entries(archive) not in (len(opened.infolist()), 0xFFFF):  # 0xFFFF: or more than that
                    raise ArchiveError("damaged, it has not as many entries as it tells")
                _extract(opened, staging, needed, most_bytes, most_entries)
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
            f"{error.filename or folder}: {error.strerror or error}; free space or choose another folder"
        ) from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _declared_entries(archive: Path) -> int:
    """Return the number of entries that the record at the archive's end declares; zipfile does not check it."""
    with archive.open("rb") as file:
        file.seek(-min(archive.stat().st_size, 22 + 0xFFFF), 2)  # the record, and a comment of any length
        end = file.read()
    at = end.rindex(b"PK\x05\x06")
    return int.from_bytes(end[at + 10 : at + 12], "little")


def _extract(
    opened: zipfile.ZipFile, folder: Path, needed: tuple[str, ...], most_bytes: int, most_entries: int
) -> None:
    entries = opened.infolist()
    if len(entries) > most_entries:
        raise ArchiveError(f"{len(entries):,} entries; {most_entries:,} at most are unpacked")
    total = sum(entry.file_size for entry in entries)
    if total > most_bytes:
        raise ArchiveError(f"{total:,} bytes when unpacked; {most_bytes:,} at most are")
    for entry in entries:
        _refuse_unsafe(entry)
    wanted = [entry for entry in entries if not _is_ignored(PurePosixPath(entry.filename))]
    names = [PurePosixPath(entry.filename) for entry in wanted if not entry.is_dir()]
    folders = {parent for name in names for parent in name.parents}
    if len(set(names)) < len(names) or folders & set(names):
        raise ArchiveError("two entries have one name")
    missing = sorted(set(needed) - {name.parts[0] for name in names})
    if missing:
        raise ArchiveError(f"there is no {listed(missing)} in it")
    _require_room(folder, total, "unpack it")
    with progress_bar(desc=f"unpacking {Path(str(opened.filename)).name}", total=len(names), unit="file") as progress:
        for entry in wanted:
            path = folder / entry.filename
            if entry.is_dir():
                path.mkdir(parents=True, exist_ok=True)
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            with opened.open(entry) as source, path.open("xb") as target:
                shutil.copyfileobj(source, target)  # zipfile reads the declared size at most, and checks the checksum
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


def _is_ignored(name: PurePosixPath) -> bool:
    return name.parts[0] == "__MACOSX" or any(part.startswith(".") for part in name.parts)
