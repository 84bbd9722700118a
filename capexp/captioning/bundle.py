"""The bundle: a captioner as a folder that holds everything it needs, checksummed so that no parts get mixed up.

A bundle holds

* ``captioner.json``: settings of model and decoding, the encoder's identity, the training record;
* ``vocabulary.json``;
* ``decoder.safetensors``: the decoder's weights, float32;
* optionally ``encoder.safetensors``: the VGG16 layers that it needs, float16, so that it works without downloads;
* ``reference.safetensors``, if it was trained on features of a file whose encoder is not known: the features of some
  train photos, float16, to check an encoder on;
* ``neighbours.safetensors``, if ``decoding.neighbours`` was set at the training: the pooled features, float16, their
  whitening, float32, and the captions of the train photos;
* ``manifest.json``: the version of the format, and the SHA-256 of each of the other files.

The bundle of an ensemble holds the model settings of each member, and the weights of all members in one file.
"""

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, TypeAdapter, ValidationError, field_validator
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file

from capexp.captioning.neighbours import Neighbours
from capexp.data.captions import PhotosBySplit
from capexp.data.encoder_check import Reference
from capexp.data.feature_files import FileIdentity
from capexp.data.vgg16 import EncoderIdentity
from capexp.data.vocabulary import Vocabulary
from capexp.data.weights_files import State
from capexp.errors import InputError
from capexp.files import sync, writing
from capexp.settings import DecodingConfig, ModelConfig

FORMAT_VERSIONS = (1, 2)
"""Of bundles: 1 holds one decoder, 2 the decoders of an ensemble. A capexp without ensembles refuses version 2."""

_MANIFEST = "manifest.json"
_SETTINGS = "captioner.json"
_VOCABULARY = "vocabulary.json"
_DECODER = "decoder.safetensors"
_ENCODER = "encoder.safetensors"
_REFERENCE = "reference.safetensors"
_NEIGHBOURS = "neighbours.safetensors"
_FEATURES = "features"  # the reference's tensor
_FOLDER, _NAMES = "folder", "names"  # of the reference's photos, in its metadata

M = TypeVar("M", bound=BaseModel)


class TrainingRecord(BaseModel):
    """The result of the captioner's training: its epoch, and its losses in nats per token."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    epoch: int | None
    """None for an ensemble, as is the train loss: its members are trained, not the whole."""
    train_loss: float | None
    dev_loss: float
    dev_digest: str = ""


def _kind(identity: object) -> str:
    """Return which kind of identity a JSON object or an object is."""
    is_file = "digest" in identity if isinstance(identity, dict) else isinstance(identity, FileIdentity)
    return "file" if is_file else "encoder"


class Settings(BaseModel):
    """The content of ``captioner.json``."""

    model_config = ConfigDict(extra="forbid")

    model: ModelConfig | Annotated[tuple[ModelConfig, ...], Field(min_length=2)]
    """For an ensemble, one per member."""
    decoding: DecodingConfig
    encoder: Annotated[
        Annotated[EncoderIdentity, Tag("encoder")] | Annotated[FileIdentity, Tag("file")], Discriminator(_kind)
    ]
    training: TrainingRecord | None
    splits: PhotosBySplit | None = None
    """The photos of each split, if they were drawn at random; left out of the file otherwise."""

    @field_validator("encoder")
    @classmethod
    def _takes_photos_as_they_are(cls, encoder: EncoderIdentity | FileIdentity) -> EncoderIdentity | FileIdentity:
        if isinstance(encoder, EncoderIdentity) and encoder.view:
            raise ValueError(f"the encoder is for view {encoder.view} of photos")
        return encoder

    @property
    def models(self) -> tuple[ModelConfig, ...]:
        """Return the model settings of all decoders: one, or one per member of an ensemble."""
        return self.model if isinstance(self.model, tuple) else (self.model,)


class _Manifest(BaseModel):
    model_config = ConfigDict(extra="forbid")

    format_version: Literal[1, 2]
    sha256: dict[str, str]


@dataclass(frozen=True)
class Bundle:
    """The content of a bundle. Each file has been checked, but not whether the weights fit the settings."""

    settings: Settings
    vocabulary: Vocabulary
    decoder: State
    decoder_path: Path
    encoder_path: Path | None
    reference: Reference | None
    neighbours: Neighbours | None


def write_bundle(
    folder: Path,
    settings: Settings,
    vocabulary: Vocabulary,
    decoder: State,
    encoder: State | None,
    reference: Reference | None = None,
    neighbours: Neighbours | None = None,
) -> None:
    """Write a bundle atomically; the encoder's weights, reference and neighbours are left out if they are None."""
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with writing(folder):
            _write(partial, settings, vocabulary, decoder, encoder)
            if reference is not None:
                _write_reference(partial / _REFERENCE, reference)
            if neighbours is not None:
                save_arrays(neighbours.arrays(), partial / _NEIGHBOURS)
            _write_manifest(partial, settings)
            shutil.rmtree(folder, ignore_errors=True)  # a resumed run writes the same bundle again
            partial.rename(folder)
            sync(folder.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _write(folder: Path, settings: Settings, vocabulary: Vocabulary, decoder: State, encoder: State | None) -> None:
    folder.mkdir(parents=True)
    # Earlier versions of the project do not know these settings.
    unknown: dict[str, Any] = {} if settings.splits is not None else {"splits": True}
    decoding = set() if settings.decoding.neighbours else {"neighbours", "neighbour_weight", "copy_neighbours"}
    unknown["decoding"] = decoding | (set() if settings.decoding.likelihood_weight else {"likelihood_weight"})
    text = settings.model_dump_json(indent=2, exclude=unknown)
    (folder / _SETTINGS).write_text(text + "\n", encoding="utf-8")
    (folder / _VOCABULARY).write_text(vocabulary.to_json() + "\n", encoding="utf-8")
    save_file(_contiguous(decoder), folder / _DECODER)
    if encoder is not None:
        save_file(_contiguous(encoder), folder / _ENCODER)


def _write_manifest(folder: Path, settings: Settings) -> None:
    digests = {path.name: _sha256(path) for path in sorted(folder.iterdir())}
    manifest = {"format_version": min(len(settings.models), 2), "sha256": digests}
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    for path in folder.iterdir():
        sync(path)


def _write_reference(path: Path, reference: Reference) -> None:
    features = torch.from_numpy(np.stack([*reference.features.values()]))  # (photos, P, F)
    folder = os.fsencode(reference.folder).decode(errors="replace")
    save_file({_FEATURES: features}, path, {_FOLDER: folder, _NAMES: json.dumps([*reference.features])})


def _read_reference(path: Path, shape: tuple[int, int]) -> Reference:
    features = read_tensors(path).get(_FEATURES)
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
    try:
        names = TypeAdapter(list[str]).validate_json(metadata.get(_NAMES, ""))
    except ValidationError:
        names = []
    if features is None or features.dtype != torch.float16 or features.shape != (len(names), *shape) or not names:
        raise InputError(f"{path}: not the features {shape} of some photos in float16; copy the bundle again")
    return Reference(Path(metadata.get(_FOLDER, "")), dict(zip(names, features.numpy(), strict=True)))


def _read_neighbours(path: Path, settings: Settings, vocabulary: Vocabulary) -> Neighbours:
    tensors = read_tensors(path)
    try:
        arrays = {name: value.numpy() for name, value in tensors.items()}
        return Neighbours.of_arrays(arrays, settings.encoder.shape[1], len(vocabulary))
    except (KeyError, TypeError, ValueError):  # TypeError for a type that NumPy does not have
        raise InputError(f"{path}: not the features and captions of train photos; copy the bundle again") from None


def read_bundle(folder: Path) -> Bundle:
    """Read a bundle and check every file of it."""
    files = verify_bundle(folder)
    settings = _parse(Settings, folder / _SETTINGS)
    vocabulary = _parse_vocabulary(folder / _VOCABULARY)
    path = folder / _DECODER
    decoder = read_tensors(path)
    invalid = [name for name, value in decoder.items() if value.dtype != torch.float32]
    if invalid:
        raise InputError(f"{path}: {invalid[0]} is {decoder[invalid[0]].dtype}, not float32")
    invalid = [name for name, value in decoder.items() if not value.isfinite().all()]
    if invalid:
        raise InputError(f"{path}: {invalid[0]} holds values that are not finite; take another captioner")
    reference = _read_reference(folder / _REFERENCE, settings.encoder.shape) if _REFERENCE in files else None
    neighbours = _read_neighbours(folder / _NEIGHBOURS, settings, vocabulary) if _NEIGHBOURS in files else None
    if settings.decoding.neighbours and neighbours is None:
        raise InputError(f"{folder}: decoding.neighbours is set, but {_NEIGHBOURS} is missing; copy the bundle again")
    encoder = folder / _ENCODER if _ENCODER in files else None
    return Bundle(settings, vocabulary, decoder, path, encoder, reference, neighbours)


def verify_bundle(folder: Path) -> set[str]:
    """Check the SHA-256 of every file of a bundle, and return the files' names."""
    manifest_path = folder / _MANIFEST
    if not manifest_path.is_file():
        raise InputError(f"{folder}: not a captioner's bundle ({_MANIFEST} is missing)")
    manifest = _parse(_Manifest, manifest_path)
    required = {_SETTINGS, _VOCABULARY, _DECODER}
    unlisted = sorted(required - set(manifest.sha256))
    unknown = sorted(set(manifest.sha256) - required - {_ENCODER, _REFERENCE, _NEIGHBOURS})
    if unlisted or unknown:
        raise InputError(f"{manifest_path}: {', '.join(unlisted + unknown)} should (not) be listed; copy it again")
    for name, digest in manifest.sha256.items():
        path = folder / name
        if not path.is_file():
            raise InputError(f"{path}: missing from the bundle; copy the bundle again")
        if _sha256(path) != digest:
            raise InputError(f"{path}: altered since it was saved; copy the bundle again")
    return set(manifest.sha256)


def _parse(kind: type[M], path: Path) -> M:
    try:
        return kind.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        # The location of an identity includes the tag of its kind.
        loc = first["loc"][:1] + first["loc"][2:] if first["loc"][:1] == ("encoder",) else first["loc"]
        where = ".".join(str(part) for part in loc)
        if where == "format_version":
            raise InputError(
                f"{path}: format_version {first['input']} is unknown to this capexp, which reads "
                f"{' and '.join(map(str, FORMAT_VERSIONS))}; "
                "install the version that wrote it"
            ) from None
        raise InputError(f"{path}: {where or 'content'}: {first['msg']}; copy the bundle again") from None


def _parse_vocabulary(path: Path) -> Vocabulary:
    try:
        return TypeAdapter(Vocabulary).validate_json(path.read_bytes())
    except ValidationError as error:
        raise InputError(f"{path}: {error.errors()[0]['msg']}; copy the bundle again") from None


def read_tensors(path: Path) -> State:
    """Return the tensors of a safetensors file by name."""
    try:
        state: State = load_file(path)
        return state
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: cannot be read ({error}); copy the bundle again") from None


def _contiguous(state: State) -> State:
    return {name: value.detach().cpu().contiguous() for name, value in state.items()}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
