"""Features that were computed elsewhere, read from a file and matched with photos by name.

A photo's array has the features in its last axis, and the grid, if any, in the axes before: ``(F,)``, ``(1, F)``,
``(P, F)`` or ``(height, width, F)``. Names are photos' file names, with or without the extension.

Shapes: N photos in the file, P grid positions, F features.
"""

import hashlib
import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from capexp.data.caption_files import decoded_lines, read_bytes, read_captions
from capexp.data.captions import Names
from capexp.data.feature_formats import EXAMPLES, MOST_VALUES, Content, faults, open_content
from capexp.data.photo_transform import PhotoTransform
from capexp.data.vgg16 import EncoderIdentity
from capexp.errors import InputError, listed
from capexp.files import listed_or_filed
from capexp.settings import CaptionsConfig, FeaturesConfig, Layer, NetSetting, PhotoResize, PhotoSize, Pool

# Control characters, and surrogates, which stand for bytes that are not Unicode.
_FORBIDDEN = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")


@dataclass(frozen=True)
class FileIdentity:
    """The identity of features from a file: only features of the same content are the same."""

    digest: str
    """The SHA-256 of the file, and of the names if they are in another file."""
    positions: int
    """P."""
    feature_size: int
    """F."""
    name: str
    """The file's name; has no effect on :meth:`key`."""
    layer: Layer
    """The encoder's settings as the training had them: layer, pool, photo size, resize, net; no effect on
    :meth:`key`."""
    pool: Pool
    size: PhotoSize
    resize: PhotoResize = "bilinear"
    net: NetSetting = "auto"
    encoder: EncoderIdentity | None = None
    """The encoder that has been checked against the file, if any; no effect on :meth:`key`."""

    def __post_init__(self) -> None:
        """Raise ValueError for a shape that no features have."""
        if min(self.shape) < 1 or math.prod(self.shape) > MOST_VALUES:
            raise ValueError(f"features {self.shape} a photo; at most {MOST_VALUES:,} values")

    @property
    def shape(self) -> tuple[int, int]:
        """(P, F): the number of grid positions, and of features at each."""
        return self.positions, self.feature_size

    @property
    def photo_transform(self) -> PhotoTransform:
        """How the encoder of the file's features makes pixels of photos, as the training's settings say."""
        return PhotoTransform(self.size, self.resize)

    @property
    def label(self) -> str:
        """The beginning of the name of the cache's file."""
        return "file"

    def claimed(self, weights: str, net: NetSetting = "auto") -> FeaturesConfig:
        """Return the settings of an encoder: those of the training, with other weights, and another net unless auto."""
        own: dict[str, object] = {"layer": self.layer, "pool": self.pool, "size": self.size, "resize": self.resize}
        own |= {"net": self.net if net == "auto" else net, "weights": weights}
        try:
            return FeaturesConfig.model_validate(own)
        except ValidationError as error:  # weights without the layer, or a size that does not fit it
            raise InputError(error.errors()[0]["msg"].removeprefix("Value error, ")) from None

    def record(self) -> dict[str, object]:
        """Return what identifies the features, for digests and for the cache's header."""
        return {"file": self.digest, "positions": self.positions, "features": self.feature_size}

    def key(self) -> str:
        """Return a short digest of the identity."""
        return hashlib.sha256(json.dumps(self.record(), sort_keys=True).encode()).hexdigest()[:16]

    def __str__(self) -> str:
        known = "encoder unknown" if self.encoder is None else str(self.encoder)
        return f"file {self.name} ({self.digest[:12]}), {self.positions}x{self.feature_size}, {known}"


@dataclass(frozen=True)
class FeatureFile:
    """An opened file of features."""

    path: Path
    identity: FileIdentity
    names: tuple[str, ...]
    _content: Content = field(repr=False)
    _extra: bytes = field(repr=False)
    """The names as far as they come from another file."""

    @classmethod
    def open(cls, config: FeaturesConfig, captions: CaptionsConfig) -> "FeatureFile":
        """Open the file of ``features.file``; ``captions`` name the photos of a file without names."""
        path = Path(config.file)
        if not path.is_file():
            what = "is no file" if path.exists() else "no such file"
            raise InputError(f"features.file = '{path}': {what}; give {EXAMPLES}")
        with faults(path):
            content = open_content(path)
        names, extra = content.names, b""
        if names is None:
            names = _names_elsewhere(path, content, captions)
            extra = "\n".join(names).encode()
        names = tuple(unicodedata.normalize("NFC", name) for name in names)
        wrong = [ascii(name) for name in names if _FORBIDDEN.search(name)]
        if wrong:
            raise InputError(f"{path}: {listed(wrong)} cannot be names of photos; rename them")
        if len(names) != content.count:
            raise InputError(
                f"{path}: {content.count:,} photos' features, but {len(names):,} names; bring the right file"
            )
        if twice := [name for name, count in Counter(names).items() if count > 1]:
            raise InputError(f"{path}: {listed(twice)} is there twice; delete one")
        positions, size = _grid(path, content.shape)
        try:
            identity = FileIdentity(
                digest=_digest(path, extra),
                positions=positions,
                feature_size=size,
                name=path.name,
                layer=config.layer,
                pool=config.pool,
                size=config.size,
                resize=config.resize,
                net=config.net,
            )
        except ValueError as error:
            raise InputError(f"{path}: {error}") from None
        return cls(path, identity, names, content, extra)

    def find(self, photos: Sequence[str], where: str) -> list[str]:
        """Return the name in the file of each photo; refuse all photos that are not in it together.

        ``where`` says in messages which photos they are.
        """
        known = Names(self.names)
        found = [known.find(photo, self.path) for photo in photos]
        missing = [photo for photo, name in zip(photos, found, strict=True) if name is None]
        if missing:
            raise InputError(
                f"{self.path}: has no features of {len(missing):,} of the {len(photos):,} photos of {where}: "
                f"{listed_or_filed(missing)}; add them, or leave these photos out of the splits"
            )
        by_name: dict[str, str] = {}
        for photo, name in zip(photos, found, strict=True):
            assert name is not None
            if by_name.setdefault(name, photo) != photo:
                raise InputError(
                    f"{self.path}: {photo!r} and {by_name[name]!r} of {where} would both have the features of "
                    f"{name!r}; write the names with their extensions"
                )
        return [name for name in found if name is not None]

    def read(self, names: set[str]) -> Iterator[tuple[str, NDArray[np.float16]]]:
        """Yield the names and features ``(P, F)`` of some photos, in the order of the file.

        At the end, raise InputError if the file has changed since it was opened.
        """
        positions = [position for position, name in enumerate(self.names) if name in names]
        with faults(self.path):
            for position, values in zip(positions, self._content.read(positions), strict=True):
                yield self.names[position], self._checked(self.names[position], values)
            if _digest(self.path, self._extra) != self.identity.digest:
                raise InputError(f"{self.path}: has changed while it was read; run the same command again")

    def sample(self, count: int) -> dict[str, NDArray[np.float16]]:
        """Return the features ``(P, F)`` of at most ``count`` photos of the file, by name."""
        return dict(self.read(set(self.names[:: -(-len(self.names) // count)])))

    def _checked(self, name: str, values: NDArray[Any]) -> NDArray[np.float16]:
        where = f"{self.path}: {name!r}"
        if values.shape != self._content.shape:
            raise InputError(
                f"{where}: an array {values.shape}, where the first is {self._content.shape}; compute it again"
            )
        if values.dtype.kind not in "fiu":
            raise InputError(f"{where}: holds {values.dtype}, not numbers; compute it again")
        if not np.isfinite(values).all():
            raise InputError(f"{where}: holds values that are not finite; compute it again")
        with np.errstate(over="ignore"):
            halves = values.reshape(self.identity.shape).astype(np.float16)
        if not np.isfinite(halves).all():
            raise InputError(f"{where}: holds {abs(values).max():.3g}, over float16's 65,504; scale the features down")
        return halves


def _grid(path: Path, shape: tuple[int, ...]) -> tuple[int, int]:
    """Return (P, F) of a photo's array."""
    if not shape or math.prod(shape) == 0 or len(shape) > 4:
        raise InputError(
            f"{path}: a photo's features are an array {shape}; (F,), (P, F) or (height, width, F) is needed"
        )
    while len(shape) > 1 and shape[0] == 1:
        shape = shape[1:]
    positions, size = math.prod(shape[:-1]), shape[-1]
    if (len(shape) == 3 and shape[0] > size) or (positions > size and math.isqrt(size) ** 2 == size):
        raise InputError(
            f"{path}: a photo's features are an array {shape}, with the features first; bring them last: "
            f"({', '.join(map(str, shape[1:]))}, {shape[0]})"
        )
    return positions, size


def _digest(path: Path, extra: bytes) -> str:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    digest.update(extra)
    return digest.hexdigest()


def _names_elsewhere(path: Path, content: Content, captions: CaptionsConfig) -> tuple[str, ...]:
    """Return the names for a file without names: from a text file beside it, else from the captions file.

    MATLAB's columns are in the order of the captions file's images, whatever lies beside.
    """
    beside = path.with_suffix(".txt"), path.with_name("names.txt")
    for file in () if content.is_of_images else beside:
        if file.is_file():
            return tuple(line.strip() for _, line in decoded_lines(file, read_bytes(file, "list of names")))
    remedy = "set captions.captions to the JSON file (COCO's or Karpathy's) whose images are in this order"
    if captions.splits != "files":
        source = captions.root / captions.captions
        images = read_captions(source, captions.format).images
        if images is not None and len(images) != content.count:
            raise InputError(
                f"{path}: {content.count:,} photos' features, but {source} has {len(images):,} images; {remedy}"
            )
        if images is not None:
            return images
    if not content.is_of_images:
        remedy = f"write them to {beside[0]}, one per line, or {remedy}"
    raise InputError(f"{path}: has no names of photos; {remedy}")
