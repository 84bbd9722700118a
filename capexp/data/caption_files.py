"""Captions files in all common formats, recognised by their content.

* ``flickr8k``: lines ``name.jpg#2<TAB>A dog runs .`` (Hodosh, Young and Hockenmaier, JAIR 2013). Flickr30k's
  ``.token`` file has them too.
* ``descriptions``: lines ``name A dog runs``: a photo's name, usually without its file extension, and a caption. The
  tutorial writes its cleaned captions in this format.
* ``csv``: a table with a header that names a column of photos and one or several of captions. Columns are separated by
  commas, semicolons, tabs or pipes (``|``, as in Flickr30k's ``results.csv``).
* ``json``: records with a photo and its captions: JSON lines (``metadata.jsonl`` of a Hugging Face imagefolder), a JSON
  list of records, or one JSON object whose keys are the photos.
* ``coco``: ``images`` with ``id`` and ``file_name``, ``annotations`` with ``image_id`` and ``caption`` (Lin et al.,
  ECCV 2014; Chen et al., 2015).
* ``karpathy``: ``images`` with ``filename``, ``sentences`` and ``split`` (Karpathy and Fei-Fei, CVPR 2015).
"""

import ast
import codecs
import csv
import logging
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, Final

from pydantic import BaseModel, ValidationError
from pydantic_core import from_json

from capexp.errors import InputError, listed
from capexp.settings import CaptionsFormat, SplitName

log = logging.getLogger(__name__)

SPLIT_NAMES: Final[Mapping[str, SplitName]] = {
    **{"train": "train", "restval": "train"},
    **{"val": "dev", "dev": "dev", "valid": "dev", "validation": "dev"},
    "test": "test",
}
"""The split for each split name that a captions file may use: Karpathy's names and common variants."""

# Names of columns and keys, in lower case, with underscores for spaces and hyphens. The first one found is used.
_PHOTO_NAMES = (
    *("file_name", "filename", "image_name", "image_file", "image_path", "image", "file", "file_path", "filepath"),
    *("photo", "photo_name", "picture", "path", "img", "img_name", "img_path", "image_id", "img_id", "name", "id"),
)
_CAPTION_NAMES = ("caption", "text", "comment", "description", "sentence", "raw", "title")
_CAPTION_NAME = re.compile(rf"({'|'.join(_CAPTION_NAMES)})s?_?\d*")  # caption, captions, caption_0, caption3
_SEPARATORS = {"\t": "tab", ",": "comma", ";": "semicolon", "|": "pipe"}

_TOKEN_LINE = re.compile(r"[^\t]+#\s*\d+\s*\t")
_DESCRIPTION_LINE = re.compile(
    r"[^\s,;|]+(\.(?i:jpe?g|png|webp|bmp|gif|tiff?)([ ]+|\t[ ]*)[^\s\t][^\t]*|( [^\W\d_]+)+\s*)"
)
_LINES_TO_RECOGNISE = 20
_NUMBERED_TEXT = re.compile(r"(\d+)\s+(\S.*)")
_EXAMPLES = (
    "lines 'photo.jpg#0<TAB>caption' (flickr8k) or 'photo caption' (descriptions), a table with a header like "
    "'image,caption' (csv), JSON lines (json), COCO's or Karpathy's JSON; captions.format names the format"
)


@dataclass(frozen=True)
class CaptionsFile:
    """The content of a captions file."""

    captions: dict[str, tuple[str, ...]]
    """Keyed by photo name, in the order of the file; names and captions are in Unicode's composed form (NFC)."""
    splits: dict[SplitName, tuple[str, ...]]
    """The photo names of each split, if the file assigns photos to splits."""
    split_fault: str | None = None
    """The error message to raise if the file's splits are used; None if they are valid."""
    images: tuple[str, ...] | None = None
    """The names of all images in order, those without captions included, in COCO's and Karpathy's formats."""


def read_captions(path: Path, form: CaptionsFormat = "auto") -> CaptionsFile:
    """Read all captions of a file in the format ``form``; ``auto`` recognises the format by the content."""
    content = read_bytes(path, "captions file").removeprefix(codecs.BOM_UTF8)
    return _READERS[_recognise(path, content) if form == "auto" else form](path, content)


def _recognise(path: Path, content: bytes) -> CaptionsFormat:
    """Return the format of a captions file, recognised by its first lines."""
    if content.lstrip()[:1] in (b"{", b"["):
        return _recognise_json(content)
    first = decoded_lines(path, content)[:_LINES_TO_RECOGNISE]
    if not first:
        raise InputError(f"{path}: no captions in it; give {_EXAMPLES}")
    if any(_TOKEN_LINE.match(line) for _, line in first):
        return "flickr8k"
    if _separator(first[0][1]) is not None:
        return "csv"
    if all(_DESCRIPTION_LINE.fullmatch(line) for _, line in first):
        return "descriptions"
    number, line = first[0]
    raise InputError(f"{path}, line {number}: {line[:60]!r} begins no known format of captions; give {_EXAMPLES}")


def _recognise_json(content: bytes) -> CaptionsFormat:
    """Return ``coco`` for an object with the key ``images`` (COCO's or Karpathy's format), else ``json``."""
    with suppress(ValueError):
        whole = from_json(content)
        return "coco" if isinstance(whole, dict) and isinstance(whole.get("images"), list) else "json"
    # JSON lines, or an incomplete file.
    with suppress(ValueError):
        return "coco" if "images" in from_json(content.strip().splitlines()[0]) else "json"
    return "coco" if b'"images"' in content else "json"


class _Captions:
    """Collects the captions and splits of a file, and checks each name and caption."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._captions: dict[str, list[str]] = {}
        self._splits: dict[str, SplitName] = {}
        self._split_fault: str | None = None

    def add(self, photo: str, captions: Sequence[str], where: str, split: str | None = None) -> None:
        """Add captions of a photo, which may have some already. ``where`` begins the messages."""
        name = checked_name(photo, where)
        if not all(caption.strip() for caption in captions):
            raise InputError(f"{where}: {name} has an empty caption; write one or delete it")
        self._captions.setdefault(name, []).extend(unicodedata.normalize("NFC", caption) for caption in captions)
        if split is not None:
            self._assign(name, split.strip().lower(), where)

    def _assign(self, name: str, split: str, where: str) -> None:
        fault = None
        if split not in SPLIT_NAMES:
            fault = f"{where}: split = {split!r} of {name} is none of {', '.join(SPLIT_NAMES)}"
        elif self._splits.setdefault(name, SPLIT_NAMES[split]) != SPLIT_NAMES[split]:
            fault = f"{where}: split = {split!r}, but {name} is in {self._splits[name]} already; choose one"
        self._split_fault = self._split_fault or fault

    def result(self) -> CaptionsFile:
        """Return all captions; refuse a file without any."""
        if not any(self._captions.values()):
            raise InputError(f"{self._path}: no captions in it; give {_EXAMPLES}")
        rest = [name for name in self._captions if name not in self._splits]
        fault = self._split_fault
        if self._splits and rest and fault is None:
            fault = (
                f"{self._path}: {len(rest)} photos have no split, but others do; give each one a split: {listed(rest)}"
            )
        splits: dict[SplitName, list[str]] = {}
        for name, split in self._splits.items():
            splits.setdefault(split, []).append(name)
        return CaptionsFile(
            {name: tuple(texts) for name, texts in self._captions.items() if texts},
            {split: tuple(names) for split, names in splits.items()},
            fault,
        )


def _read_flickr8k(path: Path, content: bytes) -> CaptionsFile:
    """Read lines ``photo.jpg#0<TAB>caption``.

    The photo's name is everything before the last ``#`` of the key, taken literally: Flickr8k's odd key
    ``2258277193_586949ec62.jpg.1#0`` names a photo that is in no list.
    """
    found = _Captions(path)
    for number, line in decoded_lines(path, content):
        key, tab, caption = line.partition("\t")
        photo, sign, index = key.rpartition("#")
        if not (tab and sign and photo and index.strip().isdigit() and caption.strip()):
            raise InputError(
                f"{path}, line {number}: {line[:60]!r} is not 'photo.jpg#0<TAB>caption' (read as flickr8k); correct "
                "or delete the line"
            )
        found.add(photo, [caption.strip()], f"{path}, line {number}")
    return found.result()


def _read_descriptions(path: Path, content: bytes) -> CaptionsFile:
    found = _Captions(path)
    for number, line in decoded_lines(path, content):
        photo, *words = line.split()
        if not words:
            raise InputError(
                f"{path}, line {number}: {line[:60]!r} is not 'photo caption' (read as descriptions); correct or "
                "delete the line"
            )
        found.add(photo, [" ".join(words)], f"{path}, line {number}")
    return found.result()


@dataclass(frozen=True)
class _Columns:
    """The columns of a table, or keys of a record, that contain the photo's name, its captions and its split."""

    photo: str
    captions: tuple[str, ...]
    split: str | None

    @classmethod
    def find(cls, names: Sequence[str], where: str) -> "_Columns":
        """Find the columns among ``names``; raise InputError if the photo's name or its captions have no column."""
        photo, captions = _photo_column(names), _caption_columns(names)
        if photo is None or not captions:
            wanted = "a photo's name (image, file_name, ...)" if photo is None else "captions (caption, text, ...)"
            raise InputError(f"{where}: none of {', '.join(names)[:200]} is a name for {wanted}; rename one")
        split = next((name for name in names if _plain(name) == "split"), None)
        return cls(photo, captions, split)


def _plain(name: str) -> str:
    return re.sub(r"[\s-]+", "_", name.strip().lower())


def _photo_column(names: Sequence[str]) -> str | None:
    plain = [_plain(name) for name in names]
    return next((names[plain.index(wanted)] for wanted in _PHOTO_NAMES if wanted in plain), None)


def _caption_columns(names: Sequence[str]) -> tuple[str, ...]:
    """Return the columns of the first caption name that occurs: ``caption_0`` and ``caption_1``, but not ``title``."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        match = _CAPTION_NAME.fullmatch(_plain(name))
        if match is not None:
            kinds.setdefault(match[1], []).append(name)
    return tuple(next((kinds[kind] for kind in _CAPTION_NAMES if kind in kinds), []))


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _separator(header: str) -> str | None:
    """Return the separator of the columns of a table with this header; None if the line is not a header."""
    for separator in _SEPARATORS:
        names = _header(header, separator)
        if len(names) > 1 and (_photo_column(names) is not None or _caption_columns(names)):
            return separator
    return None


def _header(line: str, separator: str) -> list[str]:
    return [name.strip().strip('"') for name in line.split(separator)]


def _read_csv(path: Path, content: bytes) -> CaptionsFile:
    """Read a table with a header. An empty caption cell is skipped if another cell of its row has a caption.

    A row of Flickr30k's ``results.csv`` lacks the pipe after the caption's number. It is read as meant, with a warning.
    """
    lines = decoded_lines(path, content)
    if not lines:
        raise InputError(f"{path}: no captions in it; give {_EXAMPLES}")
    first, line = lines[0]
    separator = _separator(line)
    if separator is None:
        raise InputError(
            f"{path}, line {first}: read as a table (csv), but {line[:60]!r} is no header; begin with a line such as "
            "image,caption"
        )
    names = _header(line, separator)
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"{path}, line {first}: two columns have the name {twice!r}; rename one")
    columns = _Columns.find(names, f"{path}, line {first}")
    found = _Captions(path)
    for number, row in _rows(path, lines, separator):
        where = f"{path}, line {number}"
        if len(row) == len(names) - 1 and (match := _NUMBERED_TEXT.fullmatch(row[-1])) and separator == "|":
            log.warning("%s: no pipe after the caption's number %s; the rest is read as the caption", where, match[1])
            row = [*row[:-1], match[1], match[2]]
        if len(row) != len(names):
            raise InputError(
                f"{where}: {len(row)} fields, where the header has {len(names)}; quote captions that hold a "
                f"{_SEPARATORS[separator]}"
            )
        cells = dict(zip(names, row, strict=True))
        texts = [text for name in columns.captions for text in _texts(cells[name])]
        if not texts:
            raise InputError(f"{where}: {cells[columns.photo]} has an empty caption; write one or delete the row")
        found.add(cells[columns.photo], texts, where, cells[columns.split] if columns.split else None)
    return found.result()


def _rows(path: Path, lines: list[tuple[int, str]], separator: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the rows after the header, each with the number of its first line.

    If the separator is ``|``, quotation marks are ordinary characters: Flickr30k's captions contain unpaired ones.
    """
    if separator == "|":
        for number, line in lines[1:]:
            yield number, [cell.strip() for cell in line.split(separator)]
        return
    reader = csv.reader((f"{line}\n" for _, line in lines[1:]), delimiter=separator, strict=True, skipinitialspace=True)
    while True:
        start = lines[min(reader.line_num + 1, len(lines) - 1)][0]
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise InputError(
                f"{path}, line {start}: not a valid row of a table ({error}); put the caption between quotation "
                "marks, and double those inside it"
            ) from None
        if any(cell.strip() for cell in row):
            yield start, [cell.strip() for cell in row]


def _texts(value: object) -> list[str]:
    """Return the captions in a cell or value: a text, a list of texts, or a list as JSON or Python writes it."""
    if value is None:
        return []
    if isinstance(value, str) and value.startswith("[") and value.endswith("]"):
        with suppress(ValueError, SyntaxError, MemoryError, RecursionError):  # a caption may begin with [
            written = ast.literal_eval(value)
            value = written if isinstance(written, list) else value
    if isinstance(value, str):
        return [_one_line(value)] if value.strip() else []
    if isinstance(value, list) and all(isinstance(text, str) for text in value):
        return [_one_line(text) for text in value]
    raise TypeError(type(value).__name__)


def _read_json(path: Path, content: bytes) -> CaptionsFile:
    found = _Captions(path)
    for place, record in _records(path, content):
        where = f"{path}, {place}"
        if not isinstance(record, dict):
            raise InputError(
                f'{where}: a {type(record).__name__}, where a record such as {{"file_name": "a.jpg", '
                '"text": "A dog runs."} is needed'
            )
        columns = _Columns.find([*record], where)
        photo, split = record[columns.photo], record[columns.split] if columns.split else None
        try:
            texts = [text for name in columns.captions for text in _texts(record[name])]
        except TypeError as error:
            raise InputError(f"{where}: a caption has the type {error}; give a string, or a list of strings") from None
        is_number = isinstance(photo, int) and not isinstance(photo, bool) and 0 <= photo < 10**18
        if not (isinstance(photo, str) or is_number) or not isinstance(split, str | None):
            raise InputError(f"{where}: {columns.photo} must be a string or a whole number, and split a string")
        if not texts:
            raise InputError(f"{where}: {photo} has an empty caption; write one or delete the record")
        found.add(str(photo), texts, where, split)
    return found.result()


def _records(path: Path, content: bytes) -> Iterator[tuple[str, Any]]:
    """Yield the records of JSON lines, of a list, or of an object ``{photo: captions}``, each with its place."""
    if content.lstrip().startswith(b"["):
        for number, record in enumerate(_parse(path, "the list", content)):
            yield f"entry {number}", record
        return
    lines = decoded_lines(path, content)
    try:
        whole = from_json(content)
    except ValueError:
        for number, line in lines:
            yield f"line {number}", _parse(path, f"line {number}", line)
        return
    if not isinstance(whole, dict):
        raise InputError(f"{path}: read as JSON records (json), but it is a {type(whole).__name__}; give {_EXAMPLES}")
    if _photo_column([*whole]) is not None and _caption_columns([*whole]):
        yield f"line {lines[0][0]}", whole  # a single record
        return
    for photo, captions in whole.items():
        yield f"{photo[:60]!r}", {"image": photo, "caption": captions}


def _parse(path: Path, place: str, content: str | bytes) -> Any:
    try:
        return from_json(content)
    except ValueError as error:
        raise InputError(f"{path}: {place}: read as JSON records (json), but it is invalid JSON: {error}") from None


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


def _read_coco(path: Path, content: bytes) -> CaptionsFile:
    """Read COCO's format, or Karpathy's, in which each image contains its sentences."""
    try:
        coco = _Coco.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise InputError(
            f"{path}: {where}: {first['msg'][0].lower()}{first['msg'][1:]}; read as COCO's (images, annotations) or "
            "Karpathy's format (images with sentences); for a list of records set captions.format = 'json'"
        ) from None
    found = _Captions(path)
    image_names: dict[str, None] = {}
    by_id: dict[int | str, str] = {}
    for number, image in enumerate(coco.images):
        where = f"{path}, images.{number}"
        if not (image.file_name or image.filename):
            raise InputError(f"{where}: has no file_name (COCO) nor filename (Karpathy); add it")
        name = checked_name(image.name, where)
        if name in image_names:
            raise InputError(f"{where}: {name!r} is there already; delete one")
        image_names[name] = None
        found.add(name, [_one_line(sentence.raw) for sentence in image.sentences], where, image.split)
        if image.id is not None:
            if image.id in by_id:
                raise InputError(f"{where}: id {image.id!r} is already used by {by_id[image.id]}; make the ids unique")
            by_id[image.id] = name
    for number, annotation in enumerate(coco.annotations):
        where = f"{path}, annotations.{number}"
        if annotation.image_id not in by_id:
            raise InputError(f"{where}: no image has the id {annotation.image_id!r}; correct it, or add the image")
        found.add(by_id[annotation.image_id], [_one_line(annotation.caption)], where)
    return replace(found.result(), images=tuple(image_names))


_READERS: Final[Mapping[CaptionsFormat, Callable[[Path, bytes], CaptionsFile]]] = {
    "flickr8k": _read_flickr8k,
    "descriptions": _read_descriptions,
    "csv": _read_csv,
    "json": _read_json,
    "coco": _read_coco,
    "karpathy": _read_coco,
}


def read_list(path: Path) -> tuple[str, ...]:
    """Read the photo names in a split's list, one per line; file extensions may be missing."""
    names: dict[str, int] = {}
    for number, line in decoded_lines(path, read_bytes(path, "list of photos")):
        name = checked_name(line.strip(), f"{path}, line {number}")
        if name in names:
            raise InputError(f"{path}, line {number}: {name!r} is on line {names[name]} already; delete one")
        names[name] = number
    if not names:
        raise InputError(f"{path}: the list is empty; name one photo a line")
    return tuple(names)


def checked_name(name: str, where: str) -> str:
    """Return a photo's name, ``a.jpg`` for ``./a.jpg``, in NFC; refuse a name that leaves the photo folder."""
    if "\\" in name:
        raise InputError(f"{where}: {name!r} is a Windows path; write {name.replace(chr(92), '/')!r} instead")
    if not name or name.startswith("/") or ".." in name.split("/") or "\0" in name:
        raise InputError(f"{where}: {name!r} is empty or leaves the photo folder; name a file inside it")
    return unicodedata.normalize("NFC", str(PurePosixPath(name)) if "/" in name else name)


def read_bytes(path: Path, what: str) -> bytes:
    """Return a file's content; if it cannot be read, the error message calls the file ``what``."""
    if path.exists() and not path.is_file():  # reading a pipe would wait for ever
        raise InputError(f"{path}: the {what} is no file; check captions.root and the paths beside it")
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path}: no such {what}; check captions.root and the paths beside it") from None
    except OSError as error:
        raise InputError(f"{path}: the {what} cannot be read ({error.strerror})") from None


def decoded_lines(path: Path, content: bytes) -> list[tuple[int, str]]:
    """Return the non-empty lines of a UTF-8 file, numbered from 1."""
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
