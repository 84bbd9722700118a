"""Photos with captions, in splits.

On disk there are a captions file and a folder of photos for all splits, or one of each for every split. The splits come
from lists of photo names, from the captions file itself, or are drawn at random.
"""

import hashlib
import json
import posixpath
import unicodedata
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from capexp.data.caption_files import CaptionsFile, read_captions, read_list
from capexp.errors import InputError, listed
from capexp.files import PICTURE_ENDINGS, listed_or_filed
from capexp.settings import CaptionsConfig, SplitName

SPLITS: tuple[SplitName, ...] = ("train", "dev", "test")

PhotosBySplit = Mapping[SplitName, tuple[str, ...]]
"""The names of the photos of each split."""


@dataclass(frozen=True)
class Split:
    """The photos of a split, in the order of its list, with the reference captions of each."""

    name: SplitName
    folder: Path
    photos: tuple[str, ...]
    references: tuple[tuple[str, ...], ...]
    files: tuple[str, ...] | None = None
    """The names on disk, if they are spelled otherwise than in ``photos``."""

    def paths(self) -> list[Path]:
        """Return the photo files."""
        return [self.folder / name for name in self.files or self.photos]

    def digest(self) -> str:
        """Return the hexadecimal SHA-256 over photo names and captions, in order."""
        record = json.dumps([self.photos, self.references], ensure_ascii=False)
        return hashlib.sha256(record.encode()).hexdigest()


def read_splits(
    config: CaptionsConfig,
    wanted: Iterable[SplitName] | None = None,
    drawn: PhotosBySplit | None = None,
    with_photos: bool = True,
) -> dict[SplitName, Split]:
    """Read the splits in ``wanted``, by default all there are.

    Of other splits only the photos' names are read: a photo in two splits is refused. All photos without captions or
    without a file are refused together; unless ``with_photos``, the photo files may be missing. Random splits are
    ``drawn``, by default drawn now.
    """
    if not config.root.is_dir():
        raise InputError(f"{config.root}: no such folder; set captions.root to the folder that holds the data")
    sources = _sources(config, wanted, drawn)
    _refuse_overlap(sources)
    chosen = list(sources if wanted is None else wanted)
    for name in chosen:
        if with_photos and not sources[name].folder.is_dir():
            setting = f"captions.{name}_photos" if config.splits == "files" else "captions.photos"
            raise InputError(f"{sources[name].folder}: no such folder of photos; set captions.root or {setting}")
    splits, faults = {}, []
    for name in chosen:
        source = sources[name]
        files = PhotoFiles(source.folder)
        found = [files.find(file_name, source.origin) for file_name in source.names]
        if not with_photos:  # the names are those of the list, whether the photos are at hand or not
            at_hand = [own if file is None else file[1] for own, file in zip(source.names, found, strict=True)]
            found = [*zip(source.names, at_hand, strict=True)]
        uncaptioned = [photo for photo in source.photos if photo not in source.captions]
        missing = [file_name for file_name, file in zip(source.names, found, strict=True) if file is None]
        where = f"{source.origin}: {{}} of its {name} photos"
        if uncaptioned:
            text = f"have no captions in {config.captions_of(name)}: {listed_or_filed(uncaptioned)}"
            faults.append(f"{where.format(len(uncaptioned))} {text}")
        if missing:
            text = f"are not in {source.folder}: {listed_or_filed(missing)}"
            faults.append(f"{where.format(len(missing))} {text}")
        if not (uncaptioned or missing):
            splits[name] = _as_split(name, source, [file for file in found if file is not None])
    if faults:
        where = "list" if config.splits == "lists" else "captions file"
        raise InputError(f"{'; '.join(faults)}; bring what is missing, or take the photos out of the {where}")
    return splits


def read_texts(config: CaptionsConfig, split: SplitName, drawn: PhotosBySplit | None = None) -> list[str] | None:
    """Read all captions of a split without looking for its photos; return None if there is no such split."""
    if config.splits in ("lists", "files") and not config.list_of(split).is_file():
        return None
    only = (split,) if config.splits in ("lists", "files") else None
    source = _sources(config, only, drawn, others=False).get(split)
    return None if source is None else [text for photo in source.photos for text in source.captions.get(photo, ())]


@dataclass(frozen=True)
class _Source:
    """The photos of a split, and where they and their captions are."""

    origin: Path
    """The file that assigns the photos to the split."""
    folder: Path
    captions: Mapping[str, tuple[str, ...]]
    photos: tuple[str, ...]
    """As ``captions`` spells them, as far as they are in there."""
    names: tuple[str, ...]
    """As they are looked for in ``folder``: with their ending, if the list or the captions file has it."""


def _sources(
    config: CaptionsConfig,
    wanted: Iterable[SplitName] | None,
    drawn: PhotosBySplit | None,
    others: bool = True,
) -> dict[SplitName, _Source]:
    """Return all splits that exist, or without ``others`` only those in ``wanted``, which must exist."""
    required = () if wanted is None else tuple(wanted)
    if config.splits in ("lists", "files"):
        names = [name for name in SPLITS if name in required or (others and config.list_of(name).is_file())]
        if not names:
            raise InputError(f"{config.list_of('train')}: no such file, nor one for dev or test; make them")
    if config.splits == "files":
        files = {name: read_captions(config.list_of(name), config.format).captions for name in names}
        return {
            name: _Source(config.list_of(name), config.photos_of(name), captions, tuple(captions), tuple(captions))
            for name, captions in files.items()
        }
    path = config.root / config.captions
    file = read_captions(path, config.format)
    if config.splits == "lists":
        return {name: _listed_source(config, name, file) for name in names}
    if config.splits == "random":
        splits = drawn if drawn is not None else _draw(config, file.captions)
    else:
        if file.split_fault is not None:
            raise InputError(file.split_fault)
        splits = file.splits
    missing = [name for name in required if not splits.get(name)]
    if missing:
        if drawn is not None:
            raise InputError(f"the captioner was trained with random splits that have no {missing[0]} photos")
        remedy = (
            f"set captions.{missing[0]}_fraction"
            if config.splits == "random"
            else "give its images a split (train, val, test), or set captions.splits = 'lists' or 'random'"
        )
        raise InputError(f"{path}: no photo of it has the split {missing[0]}; {remedy}")
    return {
        name: _Source(path, config.photos_of(name), file.captions, photos, photos)
        for name, photos in splits.items()
        if photos
    }


def _listed_source(config: CaptionsConfig, name: SplitName, file: CaptionsFile) -> _Source:
    """Return the split of a list. Either the list or the captions file may leave out the endings of names."""
    path = config.list_of(name)
    captioned = Names(file.captions)
    listed_as: dict[str, str] = {}
    for listed_name in read_list(path):
        photo = captioned.find(listed_name, path) or listed_name
        if photo in listed_as:
            raise InputError(f"{path}: {listed_name!r} and {listed_as[photo]!r} are the same photo; delete one")
        listed_as[photo] = listed_name
    names = (photo if _stem(name) == name else name for photo, name in listed_as.items())
    return _Source(path, config.photos_of(name), file.captions, tuple(listed_as), tuple(names))


def draw_splits(config: CaptionsConfig) -> PhotosBySplit:
    """Draw the photos of all splits at random from those in the captions file.

    The photos are sorted by a SHA-256 of ``captions.split_seed`` and name, so that the draw is the same on every
    machine and for any order of the file.
    """
    return _draw(config, read_captions(config.root / config.captions, config.format).captions)


def _draw(config: CaptionsConfig, photos: Iterable[str]) -> PhotosBySplit:
    def rank(photo: str) -> bytes:
        return hashlib.sha256(f"{config.split_seed}/{photo}".encode(errors="surrogatepass")).digest()

    order = sorted(photos, key=rank)
    sizes = {name: _size(len(order), fraction) for name, fraction in config.fractions().items()}
    train = len(order) - sum(sizes.values())
    if train < 1:
        raise InputError(
            f"{config.root / config.captions}: {len(order)} photos are too few to draw dev and test photos from; give "
            "more, or set captions.test_fraction = 0"
        )
    dev = train + sizes["dev"]
    return {"train": tuple(order[:train]), "dev": tuple(order[train:dev]), "test": tuple(order[dev:])}


def _size(photos: int, fraction: float) -> int:
    return max(1, round(photos * fraction)) if fraction else 0


def _refuse_overlap(sources: Mapping[SplitName, _Source]) -> None:
    """Refuse a photo that is in two splits, or twice in one under two spellings.

    Files are compared by their path, and as the same photo if one name lacks its ending.
    """
    photos: dict[str, list[tuple[str, SplitName]]] = {}
    shared: dict[tuple[SplitName, SplitName], list[str]] = {}
    for split, source in sources.items():
        folder = source.folder.resolve()
        for name in source.names:
            path = str(folder / name)
            known = photos.setdefault(_stem(path), [])
            for other_path, other in known:
                if path == other_path or _stem(path) in (path, other_path):
                    if other == split:
                        both = sorted((name, PurePosixPath(other_path).name))
                        raise InputError(f"{source.origin}: {both[0]!r} and {both[1]!r} are the same photo; delete one")
                    shared.setdefault((other, split), []).append(name)
            known.append((path, split))
    for (first, second), names in shared.items():
        raise InputError(
            f"{sources[first].origin} and {sources[second].origin} share {len(names)} photos: {listed(sorted(names))}; "
            "a photo belongs to one split"
        )


class Names:
    """Names of photos, found with or without their ending."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = set(names)
        self._endings: dict[str, list[str]] = {}
        for name in self._names:
            if _stem(name) != name:
                self._endings.setdefault(_stem(name), []).append(name)

    def find(self, name: str, where: object) -> str | None:
        """Return ``name`` as it is spelled here; a name that may be two photos is refused."""
        if name in self._names:
            return name
        if _stem(name) in self._names:
            return _stem(name)
        matches = sorted(self._endings.get(name, ()))
        if len(matches) > 1:
            raise InputError(f"{where}: {name!r} may be {' or '.join(matches[:3])}; write the ending")
        return matches[0] if matches else None


def _stem(name: str) -> str:
    """Return the name without the ending of a picture's file, if it has one."""
    stem, ending = posixpath.splitext(name)
    return stem if ending.lower() in PICTURE_ENDINGS else name


class PhotoFiles:
    """The files of a photo folder, which is listed only if a name is not found as it is spelled."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._listings: dict[str, tuple[Names, dict[str, str]]] = {}

    def find(self, photo: str, where: object) -> tuple[str, str] | None:
        """Return the photo's name with its ending in NFC, and the file's name on disk; None if there is no file."""
        with suppress(OSError):  # a name may be too long for a file
            if (self._folder / photo).is_file():
                return photo, photo
        parent = str(PurePosixPath(photo).parent)
        if parent not in self._listings:
            self._listings[parent] = self._list(parent)
        names, on_disk = self._listings[parent]
        name = names.find(photo, where)
        return None if name is None else (name, on_disk[name])

    def path(self, photo: str) -> Path | None:
        """Return the path of a photo's file, or None if there is none."""
        found = self.find(photo, self._folder)
        return None if found is None else self._folder / found[1]

    def _list(self, parent: str) -> tuple[Names, dict[str, str]]:
        folder = self._folder / parent
        prefix = "" if parent == "." else f"{parent}/"
        files = [f"{prefix}{path.name}" for path in folder.iterdir() if path.is_file()] if folder.is_dir() else []
        on_disk = {unicodedata.normalize("NFC", name): name for name in files}
        return Names(on_disk), on_disk


def _as_split(name: SplitName, source: _Source, found: list[tuple[str, str]]) -> Split:
    photos = tuple(photo for photo, _ in found)
    files = tuple(file for _, file in found)
    references = tuple(source.captions[photo] for photo in source.photos)
    return Split(name, source.folder, photos, references, None if files == photos else files)
