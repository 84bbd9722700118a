"""The captioner: a decoder, its vocabulary and its encoder, which belong together and are saved in one bundle."""

import hashlib
import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, cast, overload

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import ValidationError
from torch import nn

from capexp.captioning.bundle import Settings, TrainingRecord, read_bundle, read_tensors, write_bundle
from capexp.captioning.decoder import Decoder, RecurrentDecoder
from capexp.captioning.decoding import check_beam_width, decode
from capexp.captioning.ensemble import Ensemble
from capexp.captioning.model import build_decoder, outline_decoder
from capexp.captioning.neighbours import DIMENSIONS, Neighbours
from capexp.data.cache import Identity
from capexp.data.captions import PhotosBySplit
from capexp.data.dataset import Dataset
from capexp.data.encoder_check import Reference
from capexp.data.feature_files import FileIdentity
from capexp.data.photos import Photo, read_photo
from capexp.data.vgg16 import Encoder, EncoderIdentity, load_encoder
from capexp.data.vgg16_weights import NETS, net_of
from capexp.data.vocabulary import PAD, UNK, Vocabulary
from capexp.data.weights_files import State
from capexp.errors import InputError
from capexp.experiment import members_of, override_decoding
from capexp.settings import DecodingConfig, Experiment, FeaturesConfig, ModelConfig, NetSetting

log = logging.getLogger(__name__)

_ENCODER_BATCH = 32  # photos
_DECODER_BATCH = 256  # photos; eight times as many on a GPU


@dataclass(frozen=True)
class Caption:
    """A photo's caption and its probability."""

    text: str
    log_probability: float
    """The natural logarithm of the whole caption's probability."""
    alternatives: tuple["Caption", ...] = ()
    """The other hypotheses of the beam, the best first."""
    attention: NDArray[np.float32] | None = field(default=None, compare=False, repr=False)
    """The attention weights ``(T, side, side)`` over the photo's grid, for each of the T words; only if asked for, and
    only of an attention decoder."""


class Captioner:
    """Everything needed to turn photos into captions."""

    def __init__(
        self,
        models: tuple[ModelConfig, ...],
        decoder: Decoder,
        vocabulary: Vocabulary,
        encoder: Identity,
        decoding: DecodingConfig,
        record: TrainingRecord | None = None,
    ) -> None:
        self.models = models
        self.decoder = decoder
        self.vocabulary = vocabulary
        self.encoder_identity = encoder
        self.decoding = decoding
        self.record = record
        self.splits: PhotosBySplit | None = None
        """The photos of each split, if the training data was split at random; else None."""
        self.reference: Reference | None = None
        """What an encoder can be checked with, if the features came from a file and their encoder is not known."""
        self.neighbours: Neighbours | None = None
        """The train photos that consensus compares with, if ``decoding.neighbours`` was set at the training."""
        self._encoder: Encoder | None = None
        self._bundled_encoder: Path | None = None

    @classmethod
    def fresh(
        cls,
        model: ModelConfig,
        vocabulary: Vocabulary,
        encoder: Identity,
        decoding: DecodingConfig,
        seed: int,
    ) -> "Captioner":
        """Return an untrained captioner; the same seed gives the same weights."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            decoder = build_decoder(model, encoder.shape, len(vocabulary))
        return cls((model,), decoder, vocabulary, encoder, decoding)

    @classmethod
    def of_weights(
        cls,
        model: ModelConfig,
        weights: State,
        vocabulary: Vocabulary,
        encoder: Identity,
        decoding: DecodingConfig,
    ) -> "Captioner":
        """Return a captioner whose decoder has these weights, by the decoder's parameter names."""
        decoder = outline_decoder((model,), encoder.shape, len(vocabulary))
        decoder.load_state_dict(weights, assign=True)
        return cls((model,), decoder.eval(), vocabulary, encoder, decoding)

    @classmethod
    def ensemble(cls, members: Sequence["Captioner"], decoding: DecodingConfig) -> "Captioner":
        """Return an ensemble of captioners, which must have the same vocabulary and features.

        The members are not changed, and share their decoders with the ensemble.
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

    def take_data(self, data: Dataset) -> None:
        """Record what the captioner's bundle keeps of the data that it is trained on."""
        assert data.encoder.key() == self.encoder_identity.key()
        self.encoder_identity, self.splits, self.reference = data.encoder, data.drawn, data.reference
        if self.decoding.neighbours:
            self.take_neighbours(data)

    def take_neighbours(self, data: Dataset) -> None:
        """Take the train photos of the data as those that consensus compares with."""
        self.neighbours = Neighbours.of(data.splits["train"], data.features["train"], self.vocabulary)

    def check_decoding(self, decoding: DecodingConfig) -> None:
        """Raise InputError if the captioner cannot decode with these settings."""
        check_beam_width(decoding, self.vocabulary)
        if decoding.neighbours and self.neighbours is None:
            raise InputError(
                f"decoding.neighbours = {decoding.neighbours}: the captioner's bundle holds no captions of train "
                "photos; train it with decoding.neighbours, or set it to 0"
            )

    @property
    def has_maps(self) -> bool:
        """Whether there are attention maps: the decoder attends to the positions of a square grid."""
        positions = self.encoder_identity.shape[0]
        return self.decoder.has_attention and math.isqrt(positions) ** 2 == positions

    @property
    def device(self) -> torch.device:
        """Return the device of the decoder."""
        return next(self.decoder.parameters()).device

    def describe(self) -> str:
        """Return a short description of the captioner, such as "the captioner of epoch 3"."""
        if len(self.models) > 1:
            return f"the ensemble of {len(self.models)} captioners"
        return "a fresh captioner" if self.record is None else f"the captioner of epoch {self.record.epoch}"

    def digest(self) -> str:
        """Return the SHA-256, in hexadecimal, of the decoder's weights, the vocabulary and the encoder's identity."""
        digest = hashlib.sha256(f"{self.vocabulary.digest()} {self.encoder_identity.key()}".encode())
        for name, value in sorted(self.decoder.state_dict().items()):
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().numpy().data)
        return digest.hexdigest()

    def use_encoder(self, weights: str | None = None, photos: Path | None = None, net: NetSetting = "auto") -> Encoder:
        """Return the encoder, loaded at the first call.

        Its weights are ``weights`` (a name or a path) if given, else those in the bundle, else torchvision's, which
        are downloaded if needed. If the captioner was trained with a weights file, that file must be given.

        If the captioner was trained on a file of features whose encoder is not known, ``weights`` must be given. They
        are checked on photos of the file that are at hand, in the folder ``photos`` or where they were. ``net`` is the
        net of weights that are not recognised.
        """
        if self._encoder is None:
            identity = self.encoder_identity
            known = identity.encoder if isinstance(identity, FileIdentity) else identity
            if known is None:
                encoder = self._check_encoder(weights, photos, net)
            elif self._bundled_encoder is not None and weights is None:
                encoder = self._read_encoder(known, self._bundled_encoder)
            else:
                encoder = load_encoder(_features_config(known, weights))
            if known is not None and encoder.identity.key() != known.key():
                raise InputError(
                    f"the captioner was trained on {known}, "
                    f"but these weights are {encoder.identity}; set features.weights to the same net"
                )
            self._encoder = encoder.prepare(self.device, "auto")
        return self._encoder

    def _check_encoder(self, weights: str | None, photos: Path | None, net: NetSetting) -> Encoder:
        """Load the encoder of features that came from a file, and check it on the photos that are at hand."""
        identity, reference = self.encoder_identity, self.reference
        assert isinstance(identity, FileIdentity)
        if weights is None or reference is None:
            raise InputError(
                f"the captioner was trained on features from the file {identity.name!r}, whose encoder is not known; "
                "to caption photos give --features.weights, VGG16's weights that the features were computed with"
            )
        encoder = load_encoder(identity.claimed(weights, net)).prepare(self.device, "auto")
        if reference.check(encoder, photos) == 0:
            names = ", ".join(list(reference.features)[:3])
            log.warning(
                "features.weights = '%s': not checked, because none of the photos that it can be checked on is in %s "
                "(%s, ...); give their folder with --captions.root and --captions.photos",
                weights, reference.folder if photos is None else photos, names,
            )  # fmt: skip
        return encoder

    def caption_features(self, features: NDArray[np.float16], decoding: DecodingConfig | None = None) -> list[Caption]:
        """Return a caption of each photo from its features ``(B, P, F)``.

        ``decoding`` overrides the captioner's own decoding settings.
        """
        config = decoding or self.decoding
        self.check_decoding(config)
        captions = []
        batch = _DECODER_BATCH if self.device.type == "cpu" else 8 * _DECODER_BATCH
        for start in range(0, len(features), batch):
            part = torch.from_numpy(features[start : start + batch]).to(self.device).float()
            for hypotheses in decode(self.decoder, part, self.vocabulary, config, self.neighbours):
                best, *others = [Caption(self.vocabulary.decode(h.tokens), h.log_probability) for h in hypotheses]
                captions.append(replace(best, alternatives=tuple(others)))
        return captions

    def attention_maps(self, features: NDArray[np.float16], captions: Sequence[str]) -> list[NDArray[np.float32]]:
        """Return the attention weights ``(T, side, side)`` of each caption, from the photos' features ``(B, P, F)``.

        The captions are generated ones. There is one map for each of their words; its weights sum to 1. For an ensemble
        they are the mean over the members with attention.
        """
        assert self.has_maps
        words = [
            torch.tensor([self.vocabulary.entries.get(word, UNK) for word in self.vocabulary.spell(caption)]).long()
            for caption in captions
        ]
        side = math.isqrt(self.encoder_identity.shape[0])
        maps: list[NDArray[np.float32]] = []
        for start in range(0, len(words), _DECODER_BATCH):
            batch = words[start : start + _DECODER_BATCH]
            padded = nn.utils.rnn.pad_sequence(batch, batch_first=True, padding_value=PAD).to(self.device)
            part = torch.from_numpy(features[start : start + _DECODER_BATCH]).float().to(self.device)
            if padded.shape[1] == 0:  # no caption has a word
                maps += [np.empty((0, side, side), np.float32)] * len(batch)
                continue
            weights = self.decoder.attention_maps(part, padded).float().cpu().numpy()  # (N, T, P)
            maps += [
                of_photo[: len(tokens)].reshape(-1, side, side) for of_photo, tokens in zip(weights, batch, strict=True)
            ]
        return maps

    @overload
    def __call__(self, photos: Photo, **decoding: Any) -> Caption: ...

    @overload
    def __call__(self, photos: list[Any] | tuple[Any, ...], **decoding: Any) -> list[Caption]: ...

    @overload
    def __call__(self, photos: Iterator[Any], **decoding: Any) -> Iterator[Caption]: ...

    def __call__(self, photos: Photo | Iterable[Photo], **decoding: Any) -> Caption | list[Caption] | Iterator[Caption]:
        """Return the caption of a photo, or the captions of several.

        A photo is a path, its file's bytes or open file, a PIL image, or an array ``(height, width, 3)`` of uint8. A
        list or tuple gives a list; an iterator gives an iterator, which reads some photos at a time. Keyword arguments
        replace decoding settings: ``method="beam", beam_width=5``. Captions of an attention decoder have attention
        maps. A photo that cannot be read, and a setting that does not exist, raise InputError.
        """
        settings = override_decoding(self.decoding, {f"decoding.{name}": value for name, value in decoding.items()})
        self.check_decoding(settings)
        kinds = Path | str | bytes | bytearray | memoryview | Image.Image | np.ndarray
        if isinstance(photos, kinds) or hasattr(photos, "read"):
            return next(self._captions_of(iter([cast("Photo", photos)]), settings))
        captions = self._captions_of(iter(photos), settings)
        return captions if isinstance(photos, Iterator) else list(captions)

    def _captions_of(self, photos: Iterator[Photo], decoding: DecodingConfig) -> Iterator[Caption]:
        while batch := list(islice(photos, _ENCODER_BATCH)):
            for caption in self.caption_photos(batch, decoding, with_attention=self.has_maps):
                if isinstance(caption, InputError):
                    raise caption
                yield caption

    def caption_photos(
        self, photos: Sequence[Photo], decoding: DecodingConfig | None = None, with_attention: bool = False
    ) -> list[Caption | InputError]:
        """Return for each photo its caption, or the error if the photo cannot be read.

        ``with_attention`` adds the attention maps, which takes a decoder that has them.
        """
        self.check_decoding(decoding or self.decoding)
        results: list[Caption | InputError] = []
        for start in range(0, len(photos), _ENCODER_BATCH):
            batch = photos[start : start + _ENCODER_BATCH]
            # Read the photos; one that cannot be read does not stop the others.
            pixels: dict[int, NDArray[np.uint8]] = {}
            faults: dict[int, InputError] = {}
            for i, photo in enumerate(batch):
                try:
                    pixels[i] = self.encoder_identity.photo_transform(read_photo(photo))
                except InputError as error:
                    faults[i] = error
            # Caption those that were read, and put captions and errors in the order of the photos.
            captions: dict[int, Caption] = {}
            if pixels:
                features = self.use_encoder().encode(list(pixels.values()))
                told = self.caption_features(features, decoding)
                if with_attention:
                    maps = self.attention_maps(features, [caption.text for caption in told])
                    told = [replace(caption, attention=of) for caption, of in zip(told, maps, strict=True)]
                captions = dict(zip(pixels, told, strict=True))
            results += [faults[i] if i in faults else captions[i] for i in range(len(batch))]
        return results

    def save(self, folder: Path, encoder: State | None = None) -> Path:
        """Write the captioner's bundle atomically, with the encoder's weights if they are given."""
        settings = Settings(
            model=self.models if len(self.models) > 1 else self.models[0],
            decoding=self.decoding,
            encoder=self.encoder_identity,
            training=self.record,
            splits=self.splits,
        )
        write_bundle(
            folder, settings, self.vocabulary, self.decoder.state_dict(), encoder, self.reference, self.neighbours
        )
        return folder

    @classmethod
    def load(cls, folder: Path, device: torch.device | None = None) -> "Captioner":
        """Read a captioner from its bundle and check every file of it."""
        bundle = read_bundle(folder)
        settings = bundle.settings
        decoder = outline_decoder(settings.models, settings.encoder.shape, len(bundle.vocabulary))
        # Copies begin at a cache line, as fresh weights do; products with weights that do not are rounded otherwise.
        aligned = {name: value.clone() for name, value in bundle.decoder.items()}
        try:
            decoder.load_state_dict(aligned, assign=True)
        except RuntimeError as error:
            raise InputError(
                f"{bundle.decoder_path}: does not fit captioner.json ({str(error).splitlines()[-1]})"
            ) from None
        decoder.to(device or torch.device("cpu")).eval()
        captioner = cls(
            settings.models, decoder, bundle.vocabulary, settings.encoder, settings.decoding, settings.training
        )
        captioner.splits = settings.splits
        captioner.reference = bundle.reference
        captioner.neighbours = bundle.neighbours
        captioner._bundled_encoder = bundle.encoder_path
        return captioner

    @staticmethod
    def _read_encoder(identity: EncoderIdentity, path: Path) -> Encoder:
        try:
            return Encoder(identity, read_tensors(path))
        except RuntimeError as error:
            raise InputError(f"{path}: not VGG16's weights ({str(error).splitlines()[-1].strip()})") from None


def _features_config(identity: EncoderIdentity, weights: str | None) -> FeaturesConfig:
    """Return the settings of an encoder, with other weights if they are given."""
    name = identity.weights if weights is None else weights
    if weights is None and name not in NETS:
        raise InputError(
            f"the bundle holds no encoder, and its features came from a file named {name!r}; "
            "give that file with --features.weights"
        )
    # The captioner knows the net of a file, because it knows the preprocessing.
    net = "auto" if name in NETS else net_of(identity.mean, identity.std)
    try:
        return FeaturesConfig(
            layer=identity.layer,
            pool=identity.pool,
            size=identity.size,
            resize=identity.resize,
            weights=name,
            net=net,
        )
    except ValidationError as error:  # named weights without the fully connected layers
        raise InputError(error.errors()[0]["msg"].removeprefix("Value error, ")) from None


def check_fits(experiment: Experiment, data: Dataset) -> int:
    """Raise InputError, before the slow extraction, if model or beam width do not fit or weights are unavailable.

    Returns the number of trainable parameters.
    """
    check_beam_width(experiment.decoding, data.vocabulary)
    members = members_of(experiment) if experiment.is_ensemble else (experiment,)
    # Weights whose digest is not known are read, or fetched, only after the settings were checked.
    shape = experiment.features.shape if experiment.features.from_photos else data.encoder.shape
    parameters = outline_decoder([one.model for one in members], shape, len(data.vocabulary)).parameter_count()
    _ = data.encoder
    return parameters


def neighbours_size(experiment: Experiment, data: Dataset) -> int:
    """Return about how many bytes a bundle needs for the features and captions of the train photos."""
    if not experiment.decoding.neighbours:
        return 0
    _, size = experiment.features.shape if experiment.features.from_photos else data.encoder.shape
    texts = [text for texts in data.splits["train"].references for text in texts]
    whitening = 4 * size * min(size, DIMENSIONS)
    return whitening + 2 * size * len(data.splits["train"].photos) + 4 * sum(len(text.split()) + 2 for text in texts)
