"""The captioner: decoder, vocabulary and encoder in one bundle that cannot be mixed with another's.

A bundle is a folder: ``captioner.json`` (model and decoding settings, encoder identity, what it was trained
to), ``vocabulary.json``, ``decoder.safetensors``, where it travels alone ``encoder.safetensors`` (VGG16's
layers that it needs, float16), and ``manifest.json`` with the format's version and the SHA-256 of each.
That of an ensemble holds the settings of each member's model, and the weights of all of them.
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from capexp.captioning.decoder import Decoder, ModelConfig, RecurrentDecoder
from capexp.captioning.decoding import DecodingConfig, decode
from capexp.captioning.ensemble import Ensemble
from capexp.captioning.model import build_decoder, outline_decoder
from capexp.data.errors import InputError
from capexp.data.features import NETS, Encoder, EncoderIdentity, FeaturesConfig, State, load_encoder
from capexp.data.files import sync, writing
from capexp.data.photos import read_photo, squash
from capexp.data.vocabulary import PAD, Vocabulary

FORMAT_VERSIONS = (1, 2)
"""Of bundles: 1 holds one decoder, and 2, which a capexp that knows no ensembles refuses, those of an ensemble."""

_MANIFEST = "manifest.json"
_SETTINGS = "captioner.json"
_VOCABULARY = "vocabulary.json"
_DECODER = "decoder.safetensors"
_ENCODER = "encoder.safetensors"
_BATCH = 32  # photos at a time through the encoder
_DECODED = 256  # photos at a time through the decoder


M = TypeVar("M", bound=BaseModel)


@dataclass(frozen=True)
class Caption:
    """What a captioner says of a photo, and how probable it holds that."""

    text: str
    log_probability: float
    """In nats, of the whole caption."""
    alternatives: tuple["Caption", ...] = ()
    """The other captions that beam search has kept, the best first."""


class TrainingRecord(BaseModel):
    """What the captioner's training came to: the epoch it is from, and losses in nats per token."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    epoch: int | None
    """None of an ensemble, which is not trained as one; so is the train loss."""
    train_loss: float | None
    dev_loss: float
    dev_digest: str = ""


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid")

    model: ModelConfig | tuple[ModelConfig, ...]
    decoding: DecodingConfig
    encoder: EncoderIdentity
    training: TrainingRecord | None


class _Manifest(BaseModel):
    model_config = ConfigDict(extra="forbid")

    format_version: Literal[1, 2]
    sha256: dict[str, str]


class Captioner:
    """All that turns photos into captions."""

    def __init__(
        self,
        model: ModelConfig | tuple[ModelConfig, ...],
        decoder: Decoder,
        vocabulary: Vocabulary,
        encoder: EncoderIdentity,
        decoding: DecodingConfig,
        training: TrainingRecord | None = None,
    ) -> None:
        self.model = model
        self.decoder = decoder
        self.vocabulary = vocabulary
        self.encoder_identity = encoder
        self.decoding = decoding
        self.training = training
        self._encoder: Encoder | None = None
        self._bundled_encoder: Path | None = None

    @classmethod
    def fresh(
        cls,
        model: ModelConfig,
        vocabulary: Vocabulary,
        encoder: EncoderIdentity,
        decoding: DecodingConfig,
        seed: int,
    ) -> "Captioner":
        """An untrained captioner; the same seed gives the same weights."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            decoder = build_decoder(model, encoder.shape, len(vocabulary))
        return cls(model, decoder, vocabulary, encoder, decoding)

    @classmethod
    def ensemble(cls, members: Sequence["Captioner"], decoding: DecodingConfig) -> "Captioner":
        """Captioners that say a caption together; they stay as they are, and share their decoders with it.

        Raises:
            InputError: they have other words or features than the first.
        """
        first = members[0]
        for number, member in enumerate(members[1:], start=2):
            if member.vocabulary.digest() != first.vocabulary.digest():
                raise InputError(
                    f"member {number} of the ensemble has another vocabulary ({member.vocabulary.digest()[:12]}) than "
                    f"the first ({first.vocabulary.digest()[:12]}); take members with the same"
                )
            if member.encoder_identity.key() != first.encoder_identity.key():
                raise InputError(
                    f"member {number} of the ensemble takes features of {member.encoder_identity}, the first those of "
                    f"{first.encoder_identity}; take members with the same"
                )
        models, decoders = [], []
        for member in members:
            assert isinstance(member.model, ModelConfig) and isinstance(member.decoder, RecurrentDecoder)
            models.append(member.model)
            decoders.append(member.decoder)
        return cls(tuple(models), Ensemble(decoders), first.vocabulary, first.encoder_identity, decoding)

    @property
    def device(self) -> torch.device:
        """Where the decoder is."""
        return next(self.decoder.parameters()).device

    def describe(self) -> str:
        """Which one of its experiment's it is, in words."""
        if isinstance(self.model, tuple):
            return f"the ensemble of {len(self.model)} captioners"
        return "a fresh captioner" if self.training is None else f"the captioner of epoch {self.training.epoch}"

    def digest(self) -> str:
        """Hexadecimal SHA-256 of the decoder's weights and what is needed to read them."""
        digest = hashlib.sha256(f"{self.vocabulary.digest()} {self.encoder_identity.key()}".encode())
        for name, value in sorted(self.decoder.state_dict().items()):
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().numpy().data)
        return digest.hexdigest()

    def use_encoder(self, weights: str | None = None) -> Encoder:
        """The encoder: the bundle's own, or from ``weights`` (a name or a path), or fetched by its name.

        Raises:
            InputError: weights that cannot be had, or that are not those the captioner was trained with.
        """
        if self._encoder is None:
            if self._bundled_encoder is not None and weights is None:
                encoder = self._read_encoder(self._bundled_encoder)
            else:
                encoder = load_encoder(self._features_config(weights))
            if encoder.identity.key() != self.encoder_identity.key():
                raise InputError(
                    f"the captioner was trained on {self.encoder_identity}, "
                    f"but these weights are {encoder.identity}; set features.weights to the same net"
                )
            self._encoder = encoder.prepare(self.device, "auto")
        return self._encoder

    def caption_features(self, features: NDArray[np.float16], decoding: DecodingConfig | None = None) -> list[Caption]:
        """Captions of photos from their features ``(B, P, F)``, decoded as the bundle says unless told otherwise.

        Raises:
            InputError: a beam wider than the vocabulary.
        """
        captions = []
        for start in range(0, len(features), _DECODED):
            part = torch.from_numpy(features[start : start + _DECODED]).float().to(self.device)
            for hypotheses in decode(self.decoder, part, self.vocabulary, decoding or self.decoding):
                best, *others = [Caption(self.vocabulary.decode(h.tokens), h.log_probability) for h in hypotheses]
                captions.append(replace(best, alternatives=tuple(others)))
        return captions

    def look_back(self, features: NDArray[np.float16], captions: Sequence[str]) -> list[NDArray[np.float32]]:
        """Where it looks as it says each word of a photo's caption: ``(T, side, side)`` of each, of those it can say.

        From features ``(B, P, F)``. At each word the weights sum to 1; of an ensemble they are the mean of those of
        the members that look.
        """
        assert self.decoder.looks
        words = [torch.tensor(self.vocabulary.encode(caption), dtype=torch.long) for caption in captions]
        side = math.isqrt(self.encoder_identity.shape[0])
        maps: list[NDArray[np.float32]] = []
        for start in range(0, len(words), _DECODED):
            some = words[start : start + _DECODED]
            padded = nn.utils.rnn.pad_sequence(some, batch_first=True, padding_value=PAD).to(self.device)
            part = torch.from_numpy(features[start : start + _DECODED]).float().to(self.device)
            if padded.shape[1] == 0:  # nothing but captions without words
                maps += [np.empty((0, side, side), np.float32)] * len(some)
                continue
            looked = self.decoder.look_back(part, padded).float().cpu().numpy()  # (N, T, P)
            maps += [one[: len(said)].reshape(-1, side, side) for one, said in zip(looked, some, strict=True)]
        return maps

    def caption_photos(
        self, photos: list[Path | bytes], decoding: DecodingConfig | None = None
    ) -> list[Caption | InputError]:
        """A caption of each photo, or what is wrong with it.

        Raises:
            InputError: the encoder's weights cannot be had, or a beam wider than the vocabulary.
        """
        results: list[Caption | InputError] = []
        for start in range(0, len(photos), _BATCH):
            batch = photos[start : start + _BATCH]
            pixels: dict[int, NDArray[np.uint8]] = {}
            faults: dict[int, InputError] = {}
            for i, photo in enumerate(batch):
                try:
                    pixels[i] = squash(read_photo(photo), self.encoder_identity.size)
                except InputError as error:
                    faults[i] = error
            captions: dict[int, Caption] = {}
            if pixels:
                features = self.use_encoder().encode(list(pixels.values()))
                captions = dict(zip(pixels, self.caption_features(features, decoding), strict=True))
            results += [faults[i] if i in faults else captions[i] for i in range(len(batch))]
        return results

    def save(self, folder: Path, encoder: State | None = None) -> Path:
        """Writes the bundle, whole or not at all, with the encoder's weights where these are given.

        Raises:
            InputError: the disk is full, or the folder cannot be written.
        """
        beside = folder.with_name(f".{folder.name}.{os.getpid()}.part")
        shutil.rmtree(beside, ignore_errors=True)
        try:
            with writing(folder):
                self._write(beside, encoder)
                shutil.rmtree(folder, ignore_errors=True)  # a resumed run writes the same bundle again
                beside.rename(folder)
                sync(folder.parent)
        except BaseException:
            shutil.rmtree(beside, ignore_errors=True)
            raise
        return folder

    def _write(self, folder: Path, encoder: State | None) -> None:
        folder.mkdir(parents=True)
        settings = _Settings(
            model=self.model,
            decoding=self.decoding,
            encoder=self.encoder_identity,
            training=self.training,
        )
        (folder / _SETTINGS).write_text(settings.model_dump_json(indent=2) + "\n", encoding="utf-8")
        (folder / _VOCABULARY).write_text(self.vocabulary.to_json() + "\n", encoding="utf-8")
        save_file(_contiguous(self.decoder.state_dict()), folder / _DECODER)
        if encoder is not None:
            save_file(_contiguous(encoder), folder / _ENCODER)
        digests = {path.name: _sha256(path) for path in sorted(folder.iterdir())}
        manifest = {"format_version": 2 if isinstance(self.model, tuple) else 1, "sha256": digests}
        (folder / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        for path in folder.iterdir():
            sync(path)

    @classmethod
    def load(cls, folder: Path, device: torch.device | None = None) -> "Captioner":
        """Reads a bundle and checks every file of it.

        Raises:
            InputError: no bundle, one of another format, or a file that is missing or altered.
        """
        files = verify_bundle(folder)
        settings = _parse(_Settings, folder / _SETTINGS)
        vocabulary = _parse_vocabulary(folder / _VOCABULARY)
        decoder = outline_decoder(settings.model, settings.encoder.shape, len(vocabulary))
        state = _read_tensors(folder / _DECODER)
        strange = [name for name, value in state.items() if value.dtype != torch.float32]
        if strange:
            raise InputError(f"{folder / _DECODER}: {strange[0]} is {state[strange[0]].dtype}, not float32")
        try:
            decoder.load_state_dict(state, assign=True)
        except RuntimeError as error:
            raise InputError(f"{folder / _DECODER}: does not fit {_SETTINGS} ({str(error).splitlines()[-1]})") from None
        decoder.to(device or torch.device("cpu")).eval()
        captioner = cls(settings.model, decoder, vocabulary, settings.encoder, settings.decoding, settings.training)
        if _ENCODER in files:
            captioner._bundled_encoder = folder / _ENCODER
        return captioner

    def _read_encoder(self, path: Path) -> Encoder:
        try:
            return Encoder(self.encoder_identity, _read_tensors(path))
        except RuntimeError as error:
            raise InputError(f"{path}: not VGG16's weights ({str(error).splitlines()[-1].strip()})") from None

    def _features_config(self, weights: str | None) -> FeaturesConfig:
        identity = self.encoder_identity
        name = identity.weights if weights is None else weights
        if weights is None and name not in NETS:
            raise InputError(
                f"the bundle holds no encoder, and its features came from a file named {name!r}; "
                "give that file with --features.weights"
            )
        return FeaturesConfig(layer=identity.layer, pool=identity.pool, weights=name)


def verify_bundle(folder: Path) -> set[str]:
    """The names of a bundle's files, each of which is as it was saved.

    Raises:
        InputError: no bundle, one of another format, or a file that is missing or altered.
    """
    manifest_path = folder / _MANIFEST
    if not manifest_path.is_file():
        raise InputError(f"{folder}: not a captioner's bundle ({_MANIFEST} is missing)")
    manifest = _parse(_Manifest, manifest_path)
    required = {_SETTINGS, _VOCABULARY, _DECODER}
    unlisted = sorted(required - set(manifest.sha256))
    strange = sorted(set(manifest.sha256) - required - {_ENCODER})
    if unlisted or strange:
        raise InputError(f"{manifest_path}: {', '.join(unlisted + strange)} should (not) be listed; copy it again")
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
        where = ".".join(str(part) for part in first["loc"])
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


def _read_tensors(path: Path) -> State:
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
