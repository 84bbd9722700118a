"""An experiment's data: splits, vocabulary and features, read and checked before anything is computed."""

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

import torch

from capexp.data.batches import CaptionBatches
from capexp.data.cache import FeatureCache, cache_features
from capexp.data.captions import Split, read_splits
from capexp.data.features import Features
from capexp.data.photos import digest_photos
from capexp.data.vgg16 import Encoder, EncoderIdentity, identify, load_encoder
from capexp.data.vocabulary import Vocabulary, build_vocabulary
from capexp.distributed import ALONE, World, choose_device
from capexp.errors import InputError
from capexp.settings import Experiment, FeaturesConfig, Order, SplitName, TrainingConfig

log = logging.getLogger(__name__)


class Dataset:
    """Splits of photos with captions, the vocabulary, and the identity of the encoder whose features they get.

    :meth:`read` checks captions and lists; :meth:`with_features` reads the pictures and computes what the cache lacks.
    """

    def __init__(
        self,
        splits: dict[SplitName, Split],
        vocabulary: Vocabulary,
        config: FeaturesConfig,
        features: dict[SplitName, Features] | None = None,
    ) -> None:
        self.splits = splits
        self.vocabulary = vocabulary
        self.config = config
        self.features = features or {}
        self._batches: dict[SplitName, tuple[tuple[int, Order], CaptionBatches]] = {}

    @classmethod
    def read(
        cls,
        experiment: Experiment,
        names: Sequence[SplitName] = ("train", "dev"),
        vocabulary: Vocabulary | None = None,
    ) -> "Dataset":
        """Read and check splits; the vocabulary is built from the train captions unless it is given."""
        splits = read_splits(experiment.captions, names)
        if vocabulary is None:
            captions = (caption for captions in splits["train"].references for caption in captions)
            vocabulary = build_vocabulary(captions, experiment.vocabulary)
        choose_device(experiment.training.device)  # refuses one that is not there
        return cls(splits, vocabulary, experiment.features)

    @cached_property
    def encoder(self) -> EncoderIdentity:
        """The encoder's identity; weights whose digest is not known are read for it, or fetched."""
        return identify(self.config)

    def with_features(self, experiment: Experiment, world: World = ALONE) -> "Dataset":
        """Return the dataset with features, from the cache or computed now, each rank its shard."""
        features = compute_split_features(experiment, list(self.splits.values()), self.encoder, world=world)
        return Dataset(self.splits, self.vocabulary, self.config, features)

    def count_uncached(self) -> int:
        """Return how many photos the cache lacks features of."""
        lacking: set[Path] = set()
        for splits, identity in encoder_passes(list(self.splits.values()), self.encoder, self.config.mirror):
            paths = _paths(splits)
            rows = FeatureCache(self.config.cache, identity).lookup(digest_photos(paths))
            lacking |= {path for path, row in zip(paths, rows, strict=True) if row < 0}
        return len(lacking)

    def batches(self, name: SplitName, config: TrainingConfig) -> CaptionBatches:
        """Return a split's captions as batches, encoded once for all runs that ask for the same ones."""
        kind = config.batch_size, config.order
        if name not in self._batches or self._batches[name][0] != kind:
            made = CaptionBatches(self.splits[name], self.vocabulary, self.features[name], *kind)
            self._batches[name] = kind, made
        return self._batches[name][1]

    def digest(self) -> str:
        """Return the hexadecimal SHA-256 over photo names and captions of all splits."""
        return hashlib.sha256("".join(split.digest() for split in self.splits.values()).encode()).hexdigest()


def encoder_passes(
    splits: list[Split], identity: EncoderIdentity, mirror: bool
) -> Iterator[tuple[list[Split], EncoderIdentity]]:
    """Yield which splits are encoded by which encoder: all, and with ``mirror`` those of train mirrored too."""
    yield splits, identity
    train = [split for split in splits if split.name == "train"]
    if mirror and train:
        yield train, identity.mirrored()


def compute_split_features(
    experiment: Experiment,
    splits: list[Split],
    identity: EncoderIdentity,
    *,
    recompute: bool = False,
    world: World = ALONE,
) -> dict[SplitName, Features]:
    """Return the features of some splits, from the cache or computed now, each rank its shard.

    With ``features.mirror`` those of train hold those of its mirrored photos too. ``recompute`` replaces what is
    cached.
    """
    config, device = experiment.features, choose_device(experiment.training.device)
    features: dict[SplitName, Features] = {}
    for group, encoder in encoder_passes(splits, identity, config.mirror):

        def load(encoder: EncoderIdentity = encoder) -> Encoder:
            log.info("computing features with %s on %s", encoder, device)
            return load_encoder(config, encoder.is_mirrored).prepare(device, config.precision)

        cache = FeatureCache(config.cache, encoder)
        if world.size > 1:
            assert not recompute, "refused by the command"
            cached = _cache_by_shards(_paths(group), cache, load, config.batch_size, world)
        else:
            cached = cache_features(_paths(group), cache, load, config.batch_size, recompute)
        start = 0
        for split in group:
            part = cached.part(start, start + len(split.photos))
            features[split.name] = features[split.name].with_mirrored(part) if encoder.is_mirrored else part
            start += len(split.photos)
    return features


def _paths(splits: list[Split]) -> list[Path]:
    return [path for split in splits for path in split.paths()]


def _cache_by_shards(
    paths: list[Path], cache: FeatureCache, load: Callable[[], Encoder], batch_size: int, world: World
) -> Features:
    """As :func:`cache_features`: each rank computes a shard into a file of its own, rank 0 merges the files."""
    digests = [bytes(row) for row in world.broadcast(lambda: _as_rows(digest_photos(paths))).numpy()]
    if world.is_main:
        cache.tidy()
    world.barrier()
    rows = cache.lookup(digests)
    lacking = {digest: path for digest, path, row in zip(digests, paths, rows, strict=True) if row < 0}
    shard = world.shard(list(lacking.items()))
    fault: InputError | None = None
    if shard:
        try:
            cache.of_rank(world.rank).extend(
                [path for _, path in shard], [digest for digest, _ in shard], load(), batch_size
            )
        except InputError as error:
            fault = error
    world.barrier()
    if fault is not None:
        raise fault
    if world.is_main:
        cache.absorb()
    world.barrier()
    found = cache.find(digests)
    if found is None:
        raise InputError(
            f"features.cache = '{cache.path.parent}': lacks what other processes have computed; "
            "give a folder that all machines share"
        )
    return found


def _as_rows(digests: list[bytes]) -> torch.Tensor:
    return torch.frombuffer(bytearray(b"".join(digests)), dtype=torch.uint8).view(len(digests), -1)
