"""An experiment's data: splits, vocabulary and features."""

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

import torch

from capexp.data.batches import CaptionBatches
from capexp.data.cache import FeatureCache, cache_features
from capexp.data.captions import PhotosBySplit, Split, draw_splits, read_splits
from capexp.data.features import Features
from capexp.data.photos import digest_photos
from capexp.data.vgg16 import Encoder, EncoderIdentity, identify, load_encoder
from capexp.data.vocabulary import Vocabulary, build_vocabulary, tokenize
from capexp.distributed import ALONE, World, choose_device
from capexp.errors import InputError
from capexp.settings import Experiment, FeaturesConfig, Order, SplitName, TrainingConfig

log = logging.getLogger(__name__)


class Dataset:
    """Splits of photos with captions, the vocabulary, the encoder's identity and the photos' features.

    :meth:`read` reads and checks captions and lists, before anything expensive is computed. :meth:`with_features` reads
    the photos and computes the features that the cache lacks.
    """

    def __init__(
        self,
        splits: dict[SplitName, Split],
        vocabulary: Vocabulary,
        config: FeaturesConfig,
        features: dict[SplitName, Features] | None = None,
        drawn: PhotosBySplit | None = None,
    ) -> None:
        self.splits = splits
        self.vocabulary = vocabulary
        self.config = config
        self.features = features or {}
        self.drawn = drawn
        """The photos of all splits, if they were drawn at random."""
        self._batches: dict[SplitName, tuple[tuple[int, Order], CaptionBatches]] = {}

    @classmethod
    def read(
        cls,
        experiment: Experiment,
        names: Sequence[SplitName] = ("train", "dev"),
        vocabulary: Vocabulary | None = None,
        drawn: PhotosBySplit | None = None,
    ) -> "Dataset":
        """Read and check splits. The vocabulary is built from the train captions unless it is given.

        ``drawn`` are random splits that an earlier run has drawn; without them they are drawn now.
        """
        if experiment.captions.splits != "random":
            drawn = None
        elif drawn is None:
            drawn = draw_splits(experiment.captions)
            sizes = ", ".join(f"{len(photos):,} {name}" for name, photos in drawn.items())
            log.info("photos drawn at random by captions.split_seed = %d: %s", experiment.captions.split_seed, sizes)
        splits = read_splits(experiment.captions, names, drawn)
        if vocabulary is None:
            captions = (caption for captions in splits["train"].references for caption in captions)
            vocabulary = build_vocabulary(captions, experiment.vocabulary)
            _warn_of_long_tokens(splits["train"], vocabulary)
        choose_device(experiment.training.device)  # refuses a device that does not exist
        return cls(splits, vocabulary, experiment.features, drawn=drawn)

    @cached_property
    def encoder(self) -> EncoderIdentity:
        """The encoder's identity; weights whose digest is not known are read, or fetched first."""
        return identify(self.config)

    def with_features(self, experiment: Experiment, world: World = ALONE) -> "Dataset":
        """Return the dataset with features, cached or computed now; each rank computes a shard."""
        features = compute_split_features(experiment, list(self.splits.values()), self.encoder, world=world)
        dataset = Dataset(self.splits, self.vocabulary, self.config, features, self.drawn)
        dataset.encoder = self.encoder  # lest weights be read and hashed again
        return dataset

    def count_uncached(self) -> int:
        """Return the number of photos whose features the cache lacks."""
        uncached: set[Path] = set()
        for splits, identity in encoder_passes(list(self.splits.values()), self.encoder, self.config.mirror):
            paths = _paths(splits)
            rows = FeatureCache(self.config.cache, identity).lookup(digest_photos(paths))
            uncached |= {path for path, row in zip(paths, rows, strict=True) if row < 0}
        return len(uncached)

    def batches(self, name: SplitName, config: TrainingConfig) -> CaptionBatches:
        """Return a split's captions as batches; runs with the same batch size and order share them."""
        kind = config.batch_size, config.order
        if name not in self._batches or self._batches[name][0] != kind:
            batches = CaptionBatches(self.splits[name], self.vocabulary, self.features[name], *kind)
            self._batches[name] = kind, batches
        return self._batches[name][1]

    def digest(self) -> str:
        """Return the hexadecimal SHA-256 over photo names and captions of all splits."""
        return hashlib.sha256("".join(split.digest() for split in self.splits.values()).encode()).hexdigest()


def _warn_of_long_tokens(split: Split, vocabulary: Vocabulary) -> None:
    """Log a warning if captions have one or two tokens each, as in languages without blanks between words."""
    rule = vocabulary.cleaning, vocabulary.tokens
    lengths = [len(tokenize(caption, *rule)) for captions in split.references[:1000] for caption in captions]
    tokens = sum(lengths) / len(lengths)
    if tokens <= 2 and vocabulary.tokens != "characters":
        log.warning(
            "captions have %.1f tokens each; if their words are not separated by blanks, set "
            "vocabulary.tokens = 'characters'", tokens,
        )  # fmt: skip


def encoder_passes(
    splits: list[Split], identity: EncoderIdentity, mirror: bool
) -> Iterator[tuple[list[Split], EncoderIdentity]]:
    """Yield the splits to encode with each encoder: all with ``identity``; with ``mirror`` train mirrored as well."""
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
    """Return the features of splits, cached or computed now; each rank computes a shard.

    With ``features.mirror`` the train features include those of the mirrored photos. ``recompute`` replaces the cached
    features.
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
            part = cached.slice(start, start + len(split.photos))
            features[split.name] = features[split.name].with_mirrored(part) if encoder.is_mirrored else part
            start += len(split.photos)
    return features


def _paths(splits: list[Split]) -> list[Path]:
    return [path for split in splits for path in split.paths()]


def _cache_by_shards(
    paths: list[Path], cache: FeatureCache, load: Callable[[], Encoder], batch_size: int, world: World
) -> Features:
    """Return features as :func:`cache_features`; each rank computes a shard into its own file, rank 0 merges them."""
    digests = [bytes(row) for row in world.broadcast(lambda: _as_tensor(digest_photos(paths))).numpy()]
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
