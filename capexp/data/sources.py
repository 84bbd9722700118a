"""Where the features of a data set come from: its photos, through the encoder, or a file of features."""

import hashlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property, lru_cache
from pathlib import Path

import torch

from capexp.data.cache import FeatureCache, Identity, cache_features
from capexp.data.captions import Split
from capexp.data.encoder_check import Reference
from capexp.data.feature_files import FeatureFile, FileIdentity
from capexp.data.features import Features
from capexp.data.photo_transform import MIRROR, crop_view
from capexp.data.photos import digest_photos
from capexp.data.vgg16 import Encoder, EncoderIdentity, encoder_at_hand, identify, load_encoder
from capexp.distributed import ALONE, World, choose_device
from capexp.errors import InputError
from capexp.settings import UNKNOWN_WEIGHTS, Experiment, SplitName, grid_shape

log = logging.getLogger(__name__)


class Source(ABC):
    """The features of an experiment's photos, which are cached when they are first needed."""

    def __init__(self, experiment: Experiment) -> None:
        self.config = experiment.features
        self.device = choose_device(experiment.training.device)  # refuses a device that does not exist

    @property
    @abstractmethod
    def identity(self) -> Identity:
        """What the features depend on."""

    @abstractmethod
    def passes(self, splits: Sequence[Split]) -> Iterator[tuple[list[Split], Identity]]:
        """Yield the splits whose features are in one cache, and the identity of that cache."""

    @abstractmethod
    def count_uncached(self, splits: Sequence[Split]) -> int:
        """Return the number of photos whose features the cache lacks."""

    @abstractmethod
    def compute(
        self, splits: Sequence[Split], *, recompute: bool = False, world: World = ALONE
    ) -> dict[SplitName, Features]:
        """Return the features of splits, from the cache or computed now; ``recompute`` replaces those in the cache."""

    def check(self, splits: Sequence[Split], features: dict[SplitName, Features]) -> tuple[Identity, Reference | None]:
        """Return the identity, with the encoder if that is known, else also what an encoder can be checked with."""
        return self.identity, None


def open_source(experiment: Experiment) -> Source:
    """Return the source of an experiment's features; a file of features is opened and checked."""
    return PhotoSource(experiment) if experiment.features.from_photos else FileSource(experiment)


class PhotoSource(Source):
    """Photos, from which the encoder computes features; of train photos also from their other views."""

    @cached_property
    def identity(self) -> EncoderIdentity:
        """The encoder's identity; weights whose digest is not known are read, or fetched first."""
        return identify(self.config)

    def passes(self, splits: Sequence[Split]) -> Iterator[tuple[list[Split], EncoderIdentity]]:
        """Yield all splits with the encoder, and train with the encoder of each other view."""
        yield list(splits), self.identity
        train = [split for split in splits if split.name == "train"]
        if train:
            for view in self._other_views():
                yield train, self.identity.of_view(view)

    def _other_views(self) -> list[str]:
        """Return the views of a train photo besides the photo itself."""
        crops = [crop_view(number) for number in range(1, self.config.crops + 1)]
        return [MIRROR, *crops] if self.config.mirror else crops

    def count_uncached(self, splits: Sequence[Split]) -> int:
        """Return the number of photos whose features the cache lacks."""
        digests, uncached = _digests(splits, ALONE), set[Path]()
        for group, identity in self.passes(splits):
            paths = _paths(group)
            rows = FeatureCache(self.config.cache, identity).lookup([digests[path] for path in paths])
            uncached |= {path for path, row in zip(paths, rows, strict=True) if row < 0}
        return len(uncached)

    def compute(
        self, splits: Sequence[Split], *, recompute: bool = False, world: World = ALONE
    ) -> dict[SplitName, Features]:
        """Return the features of splits, from the cache or computed now; each rank computes a shard.

        The train features include those of the photos' other views.
        """
        config = self.config

        @lru_cache
        def encoder() -> Encoder:
            return load_encoder(config).prepare(self.device, config.precision)

        features: dict[SplitName, Features] = {}
        digests = _digests(splits, world)
        for group, identity in self.passes(splits):

            def load(identity: EncoderIdentity = identity) -> Encoder:
                log.info("computing features with %s on %s", identity, self.device)
                return encoder().of_view(identity.view)

            cache = FeatureCache(config.cache, identity)
            paths = _paths(group)
            of_group = [digests[path] for path in paths]
            if world.size > 1:
                assert not recompute, "refused by the command"
                cached = _cache_by_shards(paths, of_group, cache, load, config.batch_size, world)
            else:
                cached = cache_features(paths, cache, load, config.batch_size, recompute, of_group)
            for name, part in _by_split(group, cached):
                features[name] = features[name].with_view(part) if identity.view else part
        return features


class FileSource(Source):
    """A file of features that were computed elsewhere; the photos need not be at hand."""

    def __init__(self, experiment: Experiment) -> None:
        super().__init__(experiment)
        self._file = FeatureFile.open(experiment.features, experiment.captions)

    @property
    def identity(self) -> FileIdentity:
        """The identity of the file's content."""
        return self._file.identity

    def passes(self, splits: Sequence[Split]) -> Iterator[tuple[list[Split], FileIdentity]]:
        """Yield all splits with the identity of the file."""
        yield list(splits), self.identity

    def find(self, splits: Sequence[Split]) -> list[str]:
        """Return the name in the file of each photo of the splits; refuse photos that it lacks."""
        names = [name for split in splits for name in self._file.find(split.photos, split.name)]
        twice = len(names) - len(set(names))
        if twice:
            raise InputError(
                f"{self._file.path}: {twice} of its features belong to photos of two splits; correct the lists"
            )
        return names

    def count_uncached(self, splits: Sequence[Split]) -> int:
        """Return the number of photos whose features the cache lacks."""
        digests = [_name_digest(name) for name in self.find(splits)]
        return int((FeatureCache(self.config.cache, self.identity).lookup(digests) < 0).sum())

    def compute(
        self, splits: Sequence[Split], *, recompute: bool = False, world: World = ALONE
    ) -> dict[SplitName, Features]:
        """Return the features of splits, from the cache or copied into it now, which rank 0 does."""
        names = self.find(splits)
        spare = len(self._file.names) - len(names)
        if spare:
            log.info("%s: %d photos of it are in none of these splits", self._file.path, spare)
        digests = {name: _name_digest(name) for name in names}
        cache = FeatureCache(self.config.cache, self.identity)
        if world.is_main:
            cache.clean_up()
            cache.copy(digests, self._file.read, recompute)
        world.barrier()
        cached = cache.find([digests[name] for name in names])
        if cached is None:
            raise InputError(
                f"features.cache = '{cache.path.parent}': lacks what another process has copied; "
                "give a folder that all machines share"
            )
        return dict(_by_split(splits, cached))

    def check(self, splits: Sequence[Split], features: dict[SplitName, Features]) -> tuple[Identity, Reference | None]:
        """Check the encoder of ``features.weights``, if it is known and at hand, on train photos that are at hand."""
        train = next((split for split in splits if split.name == "train"), None)
        if train is None:
            return self.identity, None
        reference = Reference.of(train, features["train"])
        if self.config.weights != UNKNOWN_WEIGHTS and encoder_at_hand(self.config):
            encoder = load_encoder(self.config).prepare(self.device, self.config.precision)
            checked = reference.check(encoder)
            if checked:
                log.info("%s: %d photos have the features of %s", self._file.path, checked, encoder.identity)
                return replace(self.identity, encoder=encoder.identity), None
        claimed = grid_shape(self.config.layer, self.config.pool, self.config.size)
        if claimed != self.identity.shape:
            log.warning(
                "%s: has %d x %d features a photo, VGG16 with features.layer = '%s', pool and size gives %d x %d; to "
                "caption photos later, set them as the features were computed, or train on features of VGG16",
                self._file.path, *self.identity.shape, self.config.layer, *claimed,
            )  # fmt: skip
            return self.identity, reference
        log.info(
            "%s: its encoder is not checked; to caption photos, give --features.weights, VGG16's weights that the "
            "features were computed with", self._file.path,
        )  # fmt: skip
        return self.identity, reference


def _by_split(splits: Sequence[Split], features: Features) -> Iterator[tuple[SplitName, Features]]:
    """Yield the name and the features of each split, from the features of all their photos."""
    start = 0
    for split in splits:
        yield split.name, features.slice(start, start + len(split.photos))
        start += len(split.photos)


def _name_digest(name: str) -> bytes:
    """Return what identifies a photo of a file in the cache."""
    return hashlib.sha256(name.encode(errors="surrogatepass")).digest()


def _paths(splits: Sequence[Split]) -> list[Path]:
    return [path for split in splits for path in split.paths()]


def _digests(splits: Sequence[Split], world: World) -> dict[Path, bytes]:
    """Return the digest of each photo of the splits; rank 0 reads the files for all ranks."""
    paths = _paths(splits)
    if world.size == 1:
        return dict(zip(paths, digest_photos(paths), strict=True))
    rows = world.broadcast(lambda: _as_tensor(digest_photos(paths))).numpy()
    return {path: bytes(row) for path, row in zip(paths, rows, strict=True)}


def _cache_by_shards(
    paths: list[Path],
    digests: list[bytes],
    cache: FeatureCache,
    load: Callable[[], Encoder],
    batch_size: int,
    world: World,
) -> Features:
    """Return features as :func:`cache_features`; each rank computes a shard into its own file, rank 0 merges them."""
    if world.is_main:
        cache.clean_up()
    world.barrier()
    rows = cache.lookup(digests)
    uncached = {digest: path for digest, path, row in zip(digests, paths, rows, strict=True) if row < 0}
    shard = world.shard(list(uncached.items()))
    fault: InputError | None = None  # raised after the barrier, at which the other ranks wait
    if shard:
        try:
            cache.shard(world.rank).extend(
                [path for _, path in shard], [digest for digest, _ in shard], load(), batch_size
            )
        except InputError as error:
            fault = error
    world.barrier()
    if fault is not None:
        raise fault
    if world.is_main:
        cache.merge_shards()
    world.barrier()
    features = cache.find(digests)
    if features is None:
        raise InputError(
            f"features.cache = '{cache.path.parent}': lacks what other processes have computed; "
            "give a folder that all machines share"
        )
    return features


def _as_tensor(digests: list[bytes]) -> torch.Tensor:
    """Return digests as a tensor ``(photos, 32)`` that can be broadcast."""
    return torch.frombuffer(bytearray(b"".join(digests)), dtype=torch.uint8).view(len(digests), -1)
