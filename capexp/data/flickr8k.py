"""Flickr8k: download it into a folder and check that it is complete."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

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


Part = Literal["text", "photos"]
"""One of the two archives: captions and lists, or photos."""
Say = Callable[[str], None]
"""Print a line of progress."""


def _silent(line: str) -> None:
    """Print nothing."""


@dataclass(frozen=True)
class Contents:
    """The expected numbers of photos, of lines of captions, and of photos in each list (0: there is no such list)."""

    photos: int = 8091
    captions: int = 40_460
    train: int = 6000
    dev: int = 1000
    test: int = 1000

    def lists(self) -> dict[str, int]:
        """Return the number of photos in each list, keyed by file name."""
        counts = {"train": self.train, "dev": self.dev, "test": self.test}
        return {f"Flickr_8k.{split}Images.txt": count for split, count in counts.items() if count}

    def archives(self, only: Part | None = None) -> dict[str, tuple[str, ...]]:
        """Return the names that each archive must contain at its top level, keyed by the archive's name.

        With ``only``, return only that archive.
        """
        text = {"Flickr8k_text.zip": (CAPTIONS, *self.lists())}
        photos: dict[str, tuple[str, ...]] = {"Flickr8k_Dataset.zip": (PHOTOS,)}
        return text | photos if only is None else {"text": text, "photos": photos}[only]


def bring(
    output: Path,
    source: str,
    contents: Contents = Contents(),
    only: Part | None = None,
    keep: bool = False,
    say: Say = _silent,
) -> None:
    """Download and unpack the archives that ``output`` lacks, and check that the data is complete.

    ``source`` is the folder or the URL that has the archives. Downloaded archives are deleted unless ``keep``. With
    ``only`` the other archive is neither fetched nor checked.
    """
    if "://" in source and not _is_url(source):
        raise InputError(f"--source {source}: neither a folder nor an http or https URL")
    archives = contents.archives(only)
    try:
        output.mkdir(parents=True, exist_ok=True)
        with FileLock(output / "download.lock", timeout=0):
            missing = [name for name, tops in archives.items() if not all((output / top).exists() for top in tops)]
            say(NOTICE if missing else f"{output}: complete already, nothing is fetched")
            for name in missing:
                archive = _find(name, source, output)
                if not archive.is_file():
                    fetch(f"{source.rstrip('/')}/{name}", archive)
                try:
                    unpack(archive, output, archives[name])
                except ArchiveError as error:
                    if not _is_url(source):
                        raise InputError(f"{error}; put another copy in its place") from None
                    archive.unlink()
                    raise InputError(f"{error}; it is deleted, and the same command downloads it again") from None
            say(check(output, contents, only))
            if missing and not keep and _is_url(source):
                for name in archives:
                    (output / name).unlink(missing_ok=True)
    except Timeout:
        raise InputError(f"{output}: another download into this folder is under way; wait for it") from None
    except OSError as error:
        raise InputError(f"{error.filename or output}: {error.strerror or error}; choose another --output") from None


def _is_url(source: str) -> bool:
    return source.startswith(("http://", "https://"))


def _find(name: str, source: str, output: Path) -> Path:
    """Return the path of an archive, or the path to fetch it to."""
    archive = (output if _is_url(source) else Path(source)) / name
    if not archive.is_file():
        if not _is_url(source):
            raise InputError(f"{archive}: no such archive; --source names the folder that holds it, or an http(s) URL")
        if os.environ.get("CAPEXP_OFFLINE"):
            raise InputError(f"{archive}: missing, and CAPEXP_OFFLINE forbids fetching; name a folder with --source")
    return archive


def check(folder: Path, contents: Contents = Contents(), only: Part | None = None) -> str:
    """Check that a folder holds all of ``contents``, and that listed photos have a file and captions.

    Returns a line with the counts. With ``only``, only that part is checked.
    """
    remedy = f"delete what is in {folder}, then give the same command again, or with another --source"
    photos = {path.name for path in (folder / PHOTOS).glob("*.jpg")}
    counted = [] if only == "text" else [(PHOTOS, "photos", len(photos), contents.photos)]
    if only == "photos":
        _refuse_other_counts(folder, counted, remedy)
        return f"{folder}: {len(photos):,} photos"
    texts = (folder / CAPTIONS).read_text(encoding="utf-8", errors="replace")
    lines = [line for line in texts.split("\n") if line.strip()]
    counted.append((CAPTIONS, "captions", len(lines), contents.captions))
    listed_photos: set[str] = set()
    for name, count in contents.lists().items():
        names = (folder / name).read_text(encoding="utf-8", errors="replace").split()
        listed_photos.update(names)
        counted.append((name, "photos", len(names), count))
    _refuse_other_counts(folder, counted, remedy)
    wanted = tuple(split for split in SPLITS if getattr(contents, split))
    lists = " + ".join(f"{count:,} {split}" for split, count in zip(wanted, contents.lists().values(), strict=True))
    if only == "text":
        return f"{folder}: {len(lines):,} captions, lists of {lists} photos"
    try:
        read_splits(CaptionsConfig(root=folder), wanted)
    except InputError as error:
        raise InputError(f"{error}; {remedy}") from None
    # Flickr8k has captions of two photos whose files it lacks; one has the odd key 2258277193_586949ec62.jpg.1#0.
    absent = {line.partition("\t")[0].rpartition("#")[0] for line in lines} - photos
    assert not absent & listed_photos
    summary = f"{folder}: {len(photos):,} photos, {len(lines):,} captions, lists of {lists} photos"
    if absent:
        summary += f"; captions of {len(absent)} photos that are not there and in no list are left out: "
        summary += listed(sorted(absent))
    return summary


def _refuse_other_counts(folder: Path, counted: list[tuple[str, str, int, int]], remedy: str) -> None:
    """Refuse an unexpected count. An entry is the file's name, the unit, the count and the expected count."""
    for name, what, count, expected in counted:
        if count != expected:
            raise InputError(f"{folder / name}: {count:,} {what}, not {expected:,}; {remedy}")
