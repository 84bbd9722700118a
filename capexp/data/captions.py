"""Photos with captions, in predefined splits, from files in Flickr8k's format.

On disk (Hodosh, Young and Hockenmaier, JAIR 2013): a folder of photos; one captions file whose lines are
``name.jpg#2<TAB>A dog runs .``; and one list of file names a split.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from pydantic import BaseModel, ConfigDict

from capexp.data.errors import InputError, listed

SplitName = Literal["train", "dev", "test"]
SPLITS: tuple[SplitName, ...] = ("train", "dev", "test")


class CaptionsConfig(BaseModel):
    """Where photos and captions lie; the other paths are relative to ``root``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    root: Path
    photos: Path = Path("Flicker8k_Dataset")
    captions: Path = Path("Flickr8k.token.txt")
    train: Path = Path("Flickr_8k.trainImages.txt")
    dev: Path = Path("Flickr_8k.devImages.txt")
    test: Path = Path("Flickr_8k.testImages.txt")

    def list_of(self, split: SplitName) -> Path:
        """The file that lists a split's photos."""
        lists = {"train": self.train, "dev": self.dev, "test": self.test}
        return self.root / lists[split]


@dataclass(frozen=True)
class Split:
    """The photos of one split, in the order of its list, each with its reference captions."""

    name: SplitName
    folder: Path
    photos: tuple[str, ...]
    references: tuple[tuple[str, ...], ...]

    def paths(self) -> list[Path]:
        """The photo files."""
        return [self.folder / photo for photo in self.photos]

    def digest(self) -> str:
        """Hexadecimal SHA-256 over photo names and captions, in order."""
        record = json.dumps([self.photos, self.references], ensure_ascii=False)
        return hashlib.sha256(record.encode()).hexdigest()


def read_captions(path: Path) -> dict[str, tuple[str, ...]]:
    """All captions of a file in Flickr8k's format, by photo name, in the order of the file.

    The photo's name is what stands before the last ``#`` of the key, taken literally: Flickr8k's odd key
    ``2258277193_586949ec62.jpg.1#0`` names a photo that no list names.

    Raises:
        InputError: a line without ``key#number<TAB>caption``, an empty caption, or bytes that are not UTF-8.
    """
    captions: dict[str, list[str]] = {}
    for number, line in _lines(path, "captions file"):
        key, tab, caption = line.partition("\t")
        photo, sign, index = key.rpartition("#")
        if not (tab and sign and photo and index.strip().isdigit() and caption.strip()):
            raise InputError(
                f"{path}, line {number}: {line[:60]!r} is not 'photo.jpg#0<TAB>caption'; mend or delete the line"
            )
        captions.setdefault(photo, []).append(caption.strip())
    if not captions:
        raise InputError(f"{path}: no captions in it; give lines like 'photo.jpg#0<TAB>caption'")
    return {photo: tuple(texts) for photo, texts in captions.items()}


def read_list(path: Path) -> tuple[str, ...]:
    """The photo names that a split's list names, one a line.

    Raises:
        InputError: an empty list, a name twice, or a name that would leave the photo folder.
    """
    names: dict[str, int] = {}
    for number, line in _lines(path, "list of photos"):
        name = line.strip()
        pure = PurePosixPath(name)
        if pure.is_absolute() or ".." in pure.parts or "\\" in name or "\0" in name:
            raise InputError(f"{path}, line {number}: {name!r} leaves the photo folder; name a file inside it")
        if name in names:
            raise InputError(f"{path}, line {number}: {name!r} stands on line {names[name]} already; delete one")
        names[name] = number
    if not names:
        raise InputError(f"{path}: the list is empty; name one photo a line")
    return tuple(names)


def read_splits(config: CaptionsConfig, wanted: tuple[SplitName, ...]) -> dict[SplitName, Split]:
    """Reads the splits asked for, and of the others only their lists, where these exist.

    Raises:
        InputError: a photo in two splits, listed photos without captions or without a file (all are counted),
            or any fault of the files themselves.
    """
    if not config.root.is_dir():
        raise InputError(f"{config.root}: no such folder; set captions.root to the folder that holds the data")
    folder = config.root / config.photos
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder of photos; set captions.root or captions.photos")
    captions = read_captions(config.root / config.captions)
    lists = {name: read_list(config.list_of(name)) for name in wanted}
    for name in SPLITS:
        if name not in lists and config.list_of(name).is_file():
            lists[name] = read_list(config.list_of(name))
    _refuse_overlap(config, lists)
    splits: dict[SplitName, Split] = {}
    for name in wanted:
        photos, source = lists[name], config.list_of(name)
        bare = [photo for photo in photos if photo not in captions]
        if bare:
            where = config.root / config.captions
            raise InputError(f"{source}: {len(bare)} of its photos have no captions in {where}: {listed(bare)}")
        missing = [photo for photo in photos if not (folder / photo).is_file()]
        if missing:
            raise InputError(f"{source}: {len(missing)} of its photos are not in {folder}: {listed(missing)}")
        splits[name] = Split(name, folder, photos, tuple(captions[photo] for photo in photos))
    return splits


def _refuse_overlap(config: CaptionsConfig, lists: dict[SplitName, tuple[str, ...]]) -> None:
    names = list(lists)
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            both = sorted(set(lists[first]) & set(lists[second]))
            if both:
                raise InputError(
                    f"{config.list_of(first)} and {config.list_of(second)} share {len(both)} photos: "
                    f"{listed(both)}; a photo belongs to one split"
                )


def _lines(path: Path, what: str) -> list[tuple[int, str]]:
    """The non-empty lines of a UTF-8 file, numbered from 1."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path}: no such {what}; check captions.root and the paths beside it") from None
    except OSError as error:
        raise InputError(f"{path}: the {what} cannot be read ({error.strerror})") from None
    lines = []
    for number, line in enumerate(content.splitlines(), start=1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise InputError(
                f"{path}, line {number}: byte {error.object[error.start]:#04x} is not UTF-8; save the file as UTF-8"
            ) from None
        if text.strip():
            lines.append((number, text))
    return lines
