"""The captioner: decoder, vocabulary and encoder, which belong together and are kept in one bundle."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from capexp.captioning.bundle import Settings, TrainingRecord, read_bundle, read_tensors, write_bundle
from capexp.captioning.decoder import Decoder, RecurrentDecoder
from capexp.captioning.decoding import decode, refuse_wide
from capexp.captioning.ensemble import Ensemble
from capexp.captioning.model import build_decoder, outline_decoder
from capexp.data.dataset import Dataset
from capexp.data.photos import read_photo, squash
from capexp.data.vgg16 import Encoder, EncoderIdentity, load_encoder
from capexp.data.vgg16_weights import NETS, State
from capexp.data.vocabulary import PAD, Vocabulary
from capexp.errors import InputError
from capexp.experiment import members_of
from capexp.settings import DecodingConfig, Experiment, FeaturesConfig, ModelConfig

_BATCH = 32  # photos at a time through the encoder
_DECODED = 256  # photos at a time through the decoder


@dataclass(frozen=True)
class Caption:
    """What a captioner says of a photo, and how probable it holds that."""

    text: str
    log_probability: float
    """In nats, of the whole caption."""
    alternatives: tuple["Caption", ...] = ()
    """The other captions that beam search has kept, the best first."""


class Captioner:
    """All that turns photos into captions."""

    def __init__(
        self,
        models: tuple[ModelConfig, ...],
        decoder: Decoder,
        vocabulary: Vocabulary,
        encoder: EncoderIdentity,
        decoding: DecodingConfig,
        record: TrainingRecord | None = None,
    ) -> None:
        self.models = models
        self.decoder = decoder
        self.vocabulary = vocabulary
        self.encoder_identity = encoder
        self.decoding = decoding
        self.record = record
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
        return cls((model,), decoder, vocabulary, encoder, decoding)

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
        models: list[ModelConfig] = []
        decoders: list[RecurrentDecoder] = []
        for member in members:
            assert isinstance(member.decoder, RecurrentDecoder)
            models += member.models
            decoders.append(member.decoder)
        return cls(tuple(models), Ensemble(decoders), first.vocabulary, first.encoder_identity, decoding)

    @property
    def device(self) -> torch.device:
        """Where the decoder is."""
        return next(self.decoder.parameters()).device

    def describe(self) -> str:
        """Which one of its experiment's it is, in words."""
        if len(self.models) > 1:
            return f"the ensemble of {len(self.models)} captioners"
        return "a fresh captioner" if self.record is None else f"the captioner of epoch {self.record.epoch}"

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
        settings = Settings(
            model=self.models if len(self.models) > 1 else self.models[0],
            decoding=self.decoding,
            encoder=self.encoder_identity,
            training=self.record,
        )
        write_bundle(folder, settings, self.vocabulary, self.decoder.state_dict(), encoder)
        return folder

    @classmethod
    def load(cls, folder: Path, device: torch.device | None = None) -> "Captioner":
        """Reads a bundle and checks every file of it.

        Raises:
            InputError: no bundle, one of another format, or a file that is missing or altered.
        """
        bundle = read_bundle(folder)
        settings = bundle.settings
        decoder = outline_decoder(settings.models, settings.encoder.shape, len(bundle.vocabulary))
        try:
            decoder.load_state_dict(bundle.decoder, assign=True)
        except RuntimeError as error:
            raise InputError(
                f"{bundle.decoder_path}: does not fit captioner.json ({str(error).splitlines()[-1]})"
            ) from None
        decoder.to(device or torch.device("cpu")).eval()
        captioner = cls(
            settings.models, decoder, bundle.vocabulary, settings.encoder, settings.decoding, settings.training
        )
        captioner._bundled_encoder = bundle.encoder_path
        return captioner

    def _read_encoder(self, path: Path) -> Encoder:
        try:
            return Encoder(self.encoder_identity, read_tensors(path))
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
        return FeaturesConfig(layer=identity.layer, pool=identity.pool, size=identity.size, weights=name)


def check_fits(experiment: Experiment, data: Dataset) -> int:
    """Refuse a model or a beam that does not fit the data, and weights that cannot be had, before hours of extraction.

    Returns the number of trainable parameters.
    """
    refuse_wide(experiment.decoding, data.vocabulary)
    members = members_of(experiment) if experiment.is_ensemble else (experiment,)
    shape, words = experiment.features.shape, len(data.vocabulary)
    parameters = outline_decoder([one.model for one in members], shape, words).parameter_count()
    _ = data.encoder  # last: weights whose digest is not known are read, or fetched
    return parameters
