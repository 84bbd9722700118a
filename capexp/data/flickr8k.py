"""Flickr8k: what it must contain, and how it is fetched, unpacked and checked."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from capexp.data.archives import ArchiveError, fetch, unpack
from capexp.data.captions import SPLITS, read_splits
from capexp.errors import InputError, listed
from capexp.settings import CaptionsConfig

PHOTOS, CAPTIONS = "Flicker8k_Dataset", "Flickr8k.token.txt"
NOTICE = """\
Flickr8k: the photos belong to those who put them on Flickr, and may be used for research and education only; do not
pass them on. Whoever publishes results with it cites M. Hodosh, P. Young, J. Hockenmaier: "Framing Image Description
as a Ranking Task: Data, Models and Evaluation Metrics", Journal of Artificial Intelligence Research 47, 2013."""


Say = Callable[[str], None]
"""Prints a line of progress."""


def _silent(line: str) -> None:
    pass


@dataclass(frozen=True)
class Contents:
    """The numbers of photos, caption lines, and photos in each list (0: there is no such list)."""

    photos: int = 8091
    captions: int = 40_460
    train: int = 6000
    dev: int = 1000
    test: int = 1000

    def lists(self) -> dict[str, int]:
        """Return the lists with the number of photos in each."""
        counts = {"train": self.train, "dev": self.dev, "test": self.test}
        return {f"Flickr_8k.{split}Images.txt": count for split, count in counts.items() if count}

    def archives(self) -> dict[str, tuple[str, ...]]:
        """Return the archives with what each must contain."""
        return {"Flickr8k_text.zip": (CAPTIONS, *self.lists()), "Flickr8k_Dataset.zip": (PHOTOS,)}


def bring(output: Path, source: str, contents: Contents = Contents(), keep: bool = False, say: Say = _silent) -> None:
    """Fetch, unpack and check what is not in ``output`` yet; ``source`` is a folder or the URL of the archives."""
    if "://" in source and not _is_url(source):
        raise InputError(f"--source {source}: neither a folder nor an http or https URL")
    archives = contents.archives()
    try:
        output.mkdir(parents=True, exist_ok=True)
        with FileLock(output / "download.lock", timeout=0):
            lacking = [name for name, needed in archives.items() if not all((output / one).exists() for one in needed)]
            say(NOTICE if lacking else f"{output}: complete already, nothing is fetched")
            for name in lacking:
                archive = _find(name, source, output)
                if not archive.is_file():
                    fetch(f"{source.rstrip('/')}/{name}", archive)
                try:
                    unpack(archive, output, archives[name])
                except ArchiveError as error:
                    if not _is_url(source):
                        raise InputError(f"{error}; put another copy in its place") from None
                    archive.unlink()
                    raise InputError(f"{error}; it is deleted, and the same command fetches it anew") from None
            say(check(output, contents))
            if lacking and not keep and _is_url(source):
                for name in archives:
                    (output / name).unlink(missing_ok=True)
    except Timeout:
        raise InputError(f"{output}: another download into this folder is under way; wait for it") from None
    except OSError as error:
        raise InputError(f"{error.filename or output}: {error.strerror or error}; choose another --output") from None


def _is_url(source: str) -> bool:
    return source.startswith(("http://", "https://"))


def _find(name: str, source: str, output: Path) -> Path:
    """Return where an archive is, or where it is fetched to."""
    archive = (output if _is_url(source) else Path(source)) / name
    if not archive.is_file():
        if not _is_url(source):
            raise InputError(f"{archive}: no such archive; --source names the folder that holds it, or an http(s) URL")
        if os.environ.get("CAPEXP_OFFLINE"):
            raise InputError(f"{archive}: not here, and CAPEXP_OFFLINE forbids fetching; name a folder with --source")
    return archive


def check(folder: Path, contents: Contents = Contents()) -> str:
    """Refuse data that is not whole; return its counts in a line."""
    remedy = f"delete what is in {folder}, then give the same command again, or with another --source"
    photos = {path.name for path in (folder / PHOTOS).glob("*.jpg")}
    texts = (folder / CAPTIONS).read_text(encoding="utf-8", errors="replace")
    lines = [line for line in texts.split("\n") if line.strip()]
    counted = [(PHOTOS, "photos", len(photos), contents.photos), (CAPTIONS, "captions", len(lines), contents.captions)]
    listed_photos: set[str] = set()
    for name, count in contents.lists().items():
        names = (folder / name).read_text(encoding="utf-8", errors="replace").split()
        listed_photos.update(names)
        counted.append((name, "photos", len(names), count))
    for name, what, count, expected in counted:
        if count != expected:
            raise InputError(f"{folder / name}: {count:,} {what}, not {expected:,}; {remedy}")
    wanted = tuple(split for split in SPLITS if getattr(contents, split))
    try:
        read_splits(CaptionsConfig(root=folder), wanted)
    except InputError as error:
        raise InputError(f"{error}; {remedy}") from None
    # Flickr8k's captions name two photos that are not there, one by the odd key 2258277193_586949ec62.jpg.1#0.
    absent = {line.partition("\t")[0].rpartition("#")[0] for line in lines} - photos
    assert not absent & listed_photos
    lists = " + ".join(f"{count:,} {split}" for split, count in zip(wanted, contents.lists().values(), strict=True))
    told = f"{folder}: {len(photos):,} photos, {len(lines):,} captions, lists of {lists} photos"
    if absent:
        told += f"; captions of {len(absent)} photos that are not there and in no list are left out: "
        told += listed(sorted(absent))
    return told
