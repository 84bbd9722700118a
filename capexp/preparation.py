"""From an experiment to what it trains on or is measured on: data read, checked, and made into features."""

import hashlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from capexp.captioning.decoding import refuse_wide
from capexp.captioning.model import outline_decoder
from capexp.data.batches import CaptionBatches, Order
from capexp.data.cache import FeatureCache, cache_features
from capexp.data.captions import Split, SplitName, read_splits
from capexp.data.features import Features
from capexp.data.photos import digest_photos
from capexp.data.vgg16 import Encoder, EncoderIdentity, identify, load_encoder
from capexp.data.vocabulary import Vocabulary, build_vocabulary
from capexp.distributed import ALONE, Ranks
from capexp.errors import InputError
from capexp.experiment import Experiment
from capexp.members import members_of
from capexp.training.config import TrainingConfig, choose_device

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """What an experiment trains on: everything that can be wrong with its input has been checked."""

    splits: dict[SplitName, Split]
    features: dict[SplitName, Features]
    vocabulary: Vocabulary
    encoder: EncoderIdentity
    decoder_parameters: int
    _batches: dict[SplitName, tuple[tuple[int, Order], CaptionBatches]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def batches(self, split: SplitName, training: TrainingConfig) -> CaptionBatches:
        """A split's captions as batches, encoded once for all that asks for the same ones: a run, trials, seeds."""
        kind = training.batch_size, training.order
        if split not in self._batches or self._batches[split][0] != kind:
            made = CaptionBatches(self.splits[split], self.vocabulary, self.features[split], *kind)
            self._batches[split] = kind, made
        return self._batches[split][1]

    def data_digest(self) -> str:
        """Hexadecimal SHA-256 over the photos and captions of all splits."""
        return data_digest(self.splits)


@dataclass(frozen=True)
class Read:
    """An experiment's data, read and checked, without its features."""

    splits: dict[SplitName, Split]
    vocabulary: Vocabulary
    encoder: EncoderIdentity
    decoder_parameters: int

    def lacking(self, experiment: Experiment) -> int:
        """How many photos have no features in the cache, or not all."""
        lacking: set[Path] = set()
        for splits, identity in passes(list(self.splits.values()), self.encoder, experiment.features.mirror):
            paths = [path for split in splits for path in split.paths()]
            rows = FeatureCache(experiment.features.cache, identity).lookup(digest_photos(paths))
            lacking |= {path for path, row in zip(paths, rows, strict=True) if row < 0}
        return len(lacking)


def read(experiment: Experiment) -> Read:
    """Reads and checks the data.

    Raises:
        InputError: anything wrong with the input, but for pictures that cannot be decoded.
    """
    splits = read_splits(experiment.captions, ("train", "dev"))
    captions = (caption for captions in splits["train"].references for caption in captions)
    vocabulary = build_vocabulary(captions, experiment.vocabulary)
    choose_device(experiment.training.device)
    refuse_wide(experiment.decoding, vocabulary)
    model = tuple(one.model for one in members_of(experiment)) if experiment.is_ensemble else experiment.model
    decoder = outline_decoder(model, experiment.features.shape, len(vocabulary))  # refuses what does not fit
    identity = identify(experiment.features)
    return Read(splits, vocabulary, identity, decoder.parameter_count())


def prepare(experiment: Experiment, data: Read | None = None, ranks: Ranks = ALONE) -> Prepared:
    """Reads and checks the data, and computes the features that the cache lacks, each process its share.

    Raises:
        InputError: anything wrong with the input; nothing has been written but features.
    """
    data = data or read(experiment)
    splits, mirror = list(data.splits.values()), experiment.features.mirror
    features = read_features(experiment, splits, data.encoder, mirror=mirror, ranks=ranks)
    return Prepared(data.splits, features, data.vocabulary, data.encoder, data.decoder_parameters)


def read_features(
    experiment: Experiment,
    splits: list[Split],
    identity: EncoderIdentity,
    *,
    mirror: bool = False,
    anew: bool = False,
    ranks: Ranks = ALONE,
) -> dict[SplitName, Features]:
    """The features of some splits, from the cache or computed now, all in one pass; ``anew``: all computed now.

    With ``mirror``, those of train hold those of its mirrored photos too, which take a pass of their own. Of several
    processes each computes its share.
    """
    device = choose_device(experiment.training.device)
    features: dict[SplitName, Features] = {}
    for some, encoder in passes(splits, identity, mirror):

        def load(encoder: EncoderIdentity = encoder) -> Encoder:
            log.info("computing features with %s on %s", encoder, device)
            made = load_encoder(experiment.features, encoder.is_mirrored)
            return made.prepare(device, experiment.features.precision)

        cache = FeatureCache(experiment.features.cache, encoder)
        paths = [path for split in some for path in split.paths()]
        if ranks.count > 1:
            assert not anew, "refused by the command"
            whole = _features_together(paths, cache, load, experiment.features.batch_size, ranks)
        else:
            whole = cache_features(paths, cache, load, experiment.features.batch_size, anew)
        start = 0
        for split in some:
            part = whole.part(start, start + len(split.photos))
            features[split.name] = features[split.name].with_mirrored(part) if encoder.is_mirrored else part
            start += len(split.photos)
    return features


def passes(
    splits: list[Split], identity: EncoderIdentity, mirror: bool
) -> Iterator[tuple[list[Split], EncoderIdentity]]:
    """Which splits' photos are encoded, and by which encoder: all, and then those of train mirrored where asked for."""
    yield splits, identity
    train = [split for split in splits if split.name == "train"]
    if mirror and train:
        yield train, identity.mirrored()


def _features_together(
    paths: list[Path], cache: FeatureCache, encoder: Callable[[], Encoder], batch_size: int, ranks: Ranks
) -> Features:
    """As ``cache_features``: each process computes a share into a file of its own, the first puts them together.

    Raises:
        InputError: pictures of this process's share that cannot be read, or each process has a cache of its own.
    """
    digests = [bytes(row) for row in ranks.from_first(lambda: _as_rows(digest_photos(paths))).numpy()]
    if ranks.is_first:
        cache.tidy()
    ranks.wait()
    rows = cache.lookup(digests)
    lacking = {digest: path for digest, path, row in zip(digests, paths, rows, strict=True) if row < 0}
    own = list(lacking.items())[ranks.rank :: ranks.count]
    fault: InputError | None = None
    if own:
        try:
            cache.of_rank(ranks.rank).extend(
                [path for _, path in own], [digest for digest, _ in own], encoder(), batch_size
            )
        except InputError as error:
            fault = error
    ranks.wait()
    if fault is not None:
        raise fault
    if ranks.is_first:
        cache.absorb()
    ranks.wait()
    found = cache.find(digests)
    if found is None:
        raise InputError(
            f"features.cache = '{cache.path.parent}': lacks what other processes have computed; "
            "give a folder that all machines share"
        )
    return found


def _as_rows(digests: list[bytes]) -> Tensor:
    return torch.frombuffer(bytearray(b"".join(digests)), dtype=torch.uint8).view(len(digests), -1)


def comparable(experiment: Experiment, data: Read) -> dict[str, str]:
    """All that must be equal for two trials' losses to compare, and for a study to draw on."""
    space = experiment.tune.search
    free = {"training.device", "training.keep", *space}
    settings = {
        name: value
        for name, value in experiment.flat().items()
        if name not in free and name.split(".")[0] in ("name", "seed", "model", "training", "vocabulary")
    }
    # Optuna cannot go on with other choices, or another kind of numbers, under the same name.
    kinds = {f"tune.search {name}": drawn.kind for name, drawn in space.items()}
    return settings | kinds | {"encoder": data.encoder.key(), "data digest": data_digest(data.splits)[:16]}


def data_digest(splits: dict[SplitName, Split]) -> str:
    """Hexadecimal SHA-256 over the photos and captions of all splits."""
    return hashlib.sha256("".join(split.digest() for split in splits.values()).encode()).hexdigest()
