"""Photos with captions, in predefined splits, from files in Flickr8k's or COCO's format.

On disk there are a folder of photos, one captions file, and a list of file names for each split. The captions file is

* Flickr8k's (Hodosh, Young and Hockenmaier, JAIR 2013): lines ``name.jpg#2<TAB>A dog runs .``;
* or, ending in ``.json``, COCO's (Lin et al., ECCV 2014; Chen et al., 2015): ``images`` with ``id`` and ``file_name``,
  ``annotations`` with ``image_id`` and ``caption``; or Karpathy's form of it (Karpathy and Fei-Fei, CVPR 2015):
  ``images`` with ``filename``, ``sentences`` and ``split``, which can replace the lists.
"""

import codecs
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pydantic import BaseModel, ValidationError

from capexp.errors import InputError, listed
from capexp.settings import CaptionsConfig, SplitName

SPLITS: tuple[SplitName, ...] = ("train", "dev", "test")

_KARPATHY: dict[str, SplitName] = {"train": "train", "restval": "train", "val": "dev", "test": "test"}


@dataclass(frozen=True)
class Split:
    """The photos of a split, in the order of its list, with the reference captions of each."""

    name: SplitName
    folder: Path
    photos: tuple[str, ...]
    references: tuple[tuple[str, ...], ...]

    def paths(self) -> list[Path]:
        """Return the photo files."""
        return [self.folder / photo for photo in self.photos]

    def digest(self) -> str:
        """Return the hexadecimal SHA-256 over photo names and captions, in order."""
        record = json.dumps([self.photos, self.references], ensure_ascii=False)
        return hashlib.sha256(record.encode()).hexdigest()


@dataclass(frozen=True)
class CaptionsFile:
    """The content of a captions file."""

    captions: dict[str, tuple[str, ...]]
    """By photo name, in the order of the file."""
    splits: dict[SplitName, tuple[str, ...]]
    """The photo names of each split, if the file assigns photos to splits."""


def read_captions(path: Path) -> CaptionsFile:
    """Read all captions of a file: COCO's or Karpathy's format if its name ends in ``.json``, else Flickr8k's.

    In Flickr8k's, the photo's name is everything before the last ``#`` of the key, taken literally: the odd key
    ``2258277193_586949ec62.jpg.1#0`` names a photo that is in no list.
    """
    return _read_json(path) if path.suffix.lower() == ".json" else CaptionsFile(_read_lines(path), {})


def _read_lines(path: Path) -> dict[str, tuple[str, ...]]:
    captions: dict[str, list[str]] = {}
    for number, line in _lines(path, "captions file"):
        key, tab, caption = line.partition("\t")
        photo, sign, index = key.rpartition("#")
        if not (tab and sign and photo and index.strip().isdigit() and caption.strip()):
            raise InputError(
                f"{path}, line {number}: {line[:60]!r} is not 'photo.jpg#0<TAB>caption'; correct or delete the line"
            )
        captions.setdefault(_normalized(photo), []).append(caption.strip())
    if not captions:
        raise InputError(f"{path}: no captions in it; give lines like 'photo.jpg#0<TAB>caption'")
    return {photo: tuple(texts) for photo, texts in captions.items()}


class _Sentence(BaseModel):
    raw: str


class _Image(BaseModel):
    id: int | str | None = None
    file_name: str | None = None  # COCO
    filename: str | None = None  # Karpathy
    filepath: str = ""
    split: str | None = None
    sentences: list[_Sentence] = []

    @property
    def name(self) -> str:
        return self.file_name or f"{self.filepath}/{self.filename or ''}".lstrip("/")


class _Annotation(BaseModel):
    image_id: int | str
    caption: str


class _Coco(BaseModel):
    images: list[_Image]
    annotations: list[_Annotation] = []


def _read_json(path: Path) -> CaptionsFile:
    try:
        coco = _Coco.model_validate_json(_read_bytes(path, "captions file").removeprefix(codecs.BOM_UTF8))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise InputError(
            f"{path}: {where}: {first['msg'][0].lower()}{first['msg'][1:]}; captions in JSON are COCO's (images, "
            "annotations) or Karpathy's (images with sentences)"
        ) from None
    captions: dict[str, list[str]] = {}
    splits: dict[SplitName, list[str]] = {}
    by_id: dict[int | str, str] = {}
    for number, image in enumerate(coco.images):
        where = f"{path}, images.{number}"
        if not (image.file_name or image.filename):
            raise InputError(f"{where}: has no file_name (COCO) nor filename (Karpathy); add it")
        name = _checked(image.name, where)
        if name in captions:
            raise InputError(f"{where}: {name!r} stands there already; delete one")
        captions[name] = [sentence.raw for sentence in image.sentences]
        if image.id is not None:
            if image.id in by_id:
                raise InputError(f"{where}: id {image.id!r} is that of {by_id[image.id]} already; give each its own")
            by_id[image.id] = name
        if image.split is not None:
            if image.split not in _KARPATHY:
                raise InputError(f"{where}: split = {image.split!r} of {name} is none of {', '.join(_KARPATHY)}")
            splits.setdefault(_KARPATHY[image.split], []).append(name)
    for number, annotation in enumerate(coco.annotations):
        if annotation.image_id not in by_id:
            raise InputError(f"{path}, annotations.{number}: image_id {annotation.image_id!r} is none of the images'")
        captions[by_id[annotation.image_id]].append(annotation.caption)
    for name, texts in captions.items():
        if not all(text.strip() for text in texts):
            raise InputError(f"{path}: {name} has an empty caption; delete it")
    if not any(captions.values()):
        raise InputError(f"{path}: no captions in it; give annotations, or images with sentences")
    if splits and sum(map(len, splits.values())) < len(captions):
        assigned = {name for names in splits.values() for name in names}
        rest = [name for name in captions if name not in assigned]
        raise InputError(f"{path}: {len(rest)} images have no split while others have: {listed(rest)}")
    return CaptionsFile(
        {name: tuple(" ".join(text.split()) for text in texts) for name, texts in captions.items() if texts},
        {split: tuple(names) for split, names in splits.items()},
    )


def read_list(path: Path) -> tuple[str, ...]:
    """Read the photo names in a split's list, one a line."""
    names: dict[str, int] = {}
    for number, line in _lines(path, "list of photos"):
        name = _checked(line.strip(), f"{path}, line {number}")
        if name in names:
            raise InputError(f"{path}, line {number}: {name!r} stands on line {names[name]} already; delete one")
        names[name] = number
    if not names:
        raise InputError(f"{path}: the list is empty; name one photo a line")
    return tuple(names)


def read_splits(config: CaptionsConfig, wanted: Iterable[SplitName] | None = None) -> dict[SplitName, Split]:
    """Read the splits in ``wanted``, by default all there are.

    Of other splits only the lists are read: a photo in two splits is refused. All listed photos without captions or
    without a file are refused together.
    """
    if not config.root.is_dir():
        raise InputError(f"{config.root}: no such folder; set captions.root to the folder that holds the data")
    folder = config.root / config.photos
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder of photos; set captions.root or captions.photos")
    file = read_captions(config.root / config.captions)
    lists = _split_photos(config, file, wanted)
    _refuse_overlap(config, lists)
    chosen = list(lists if wanted is None else wanted)
    faults = []
    for name in chosen:
        uncaptioned = [photo for photo in lists[name] if photo not in file.captions]
        missing = [photo for photo in lists[name] if not (folder / photo).is_file()]
        where = f"{config.list_of(name)}: {{}} of its {name} photos"
        if uncaptioned:
            text = f"have no captions in {config.root / config.captions}: {listed(uncaptioned)}"
            faults.append(f"{where.format(len(uncaptioned))} {text}")
        if missing:
            faults.append(f"{where.format(len(missing))} are not in {folder}: {listed(missing)}")
    if faults:
        raise InputError(f"{'; '.join(faults)}; bring what is missing, or take the photos out of the list")
    return {
        name: Split(name, folder, lists[name], tuple(file.captions[photo] for photo in lists[name])) for name in chosen
    }


def read_texts(config: CaptionsConfig, split: SplitName) -> list[str] | None:
    """Read all captions of a split without looking for its photos; return None if there is no list of its photos."""
    file = read_captions(config.root / config.captions)
    if config.splits == "karpathy":
        photos = file.splits.get(split)
    else:
        photos = read_list(config.list_of(split)) if config.list_of(split).is_file() else None
    return None if photos is None else [text for photo in photos for text in file.captions.get(photo, ())]


def _split_photos(
    config: CaptionsConfig, file: CaptionsFile, wanted: Iterable[SplitName] | None
) -> dict[SplitName, tuple[str, ...]]:
    """Return the photo names of all splits that exist; those in ``wanted`` must."""
    required = () if wanted is None else tuple(wanted)
    if config.splits == "lists":
        names = [name for name in SPLITS if name in required or config.list_of(name).is_file()]
        if not names:
            raise InputError(f"{config.list_of('train')}: no such list of photos, nor one for dev or test; make them")
        return {name: read_list(config.list_of(name)) for name in names}
    missing = [name for name in required if name not in file.splits]
    if missing:
        raise InputError(
            f"{config.root / config.captions}: no photo of it has the split {missing[0]}; give its images a split "
            "(train, val, test), or set captions.splits = 'lists' and name lists"
        )
    return file.splits


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


def _checked(name: str, where: str) -> str:
    """Return a photo's name, normalized; refuse one that leaves the photo folder."""
    pure = PurePosixPath(name)
    if not name or pure.is_absolute() or ".." in pure.parts or "\\" in name or "\0" in name:
        raise InputError(f"{where}: {name!r} leaves the photo folder; name a file inside it")
    return _normalized(name)


def _normalized(name: str) -> str:
    """Return ``a.jpg`` for ``./a.jpg``."""
    return str(PurePosixPath(name)) if "/" in name else name


def _read_bytes(path: Path, what: str) -> bytes:
    if path.exists() and not path.is_file():  # reading a pipe would wait for ever
        raise InputError(f"{path}: the {what} is no file; check captions.root and the paths beside it")
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path}: no such {what}; check captions.root and the paths beside it") from None
    except OSError as error:
        raise InputError(f"{path}: the {what} cannot be read ({error.strerror})") from None


def _lines(path: Path, what: str) -> list[tuple[int, str]]:
    """Return the non-empty lines of a UTF-8 file, numbered from 1."""
    lines = []
    for number, line in enumerate(_read_bytes(path, what).splitlines(), start=1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise InputError(
                f"{path}, line {number}: byte {error.object[error.start]:#04x} is not UTF-8; save the file as UTF-8"
            ) from None
        if text.strip():
            lines.append((number, text))
    return lines
