"""An experiment's data: splits, vocabulary and features."""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from capexp.data.batches import CaptionBatches
from capexp.data.cache import Identity
from capexp.data.captions import PhotosBySplit, Split, draw_splits, read_splits
from capexp.data.encoder_check import Reference
from capexp.data.features import Features
from capexp.data.sources import FileSource, Source, open_source
from capexp.data.vocabulary import Vocabulary, build_vocabulary, tokenize
from capexp.distributed import ALONE, World
from capexp.settings import Experiment, Order, SplitName, TrainingConfig

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Loaded:
    """The features of all splits, their identity, and what an encoder that is not known can be checked with."""

    features: dict[SplitName, Features]
    identity: Identity
    reference: Reference | None = None


class Dataset:
    """Splits of photos with captions, the vocabulary, the features' identity and the photos' features.

    :meth:`read` reads and checks captions and lists, before anything expensive is computed. :meth:`with_features` reads
    the photos and computes the features that the cache lacks.
    """

    def __init__(
        self,
        splits: dict[SplitName, Split],
        vocabulary: Vocabulary,
        source: Source | Loaded,
        drawn: PhotosBySplit | None = None,
    ) -> None:
        self.splits = splits
        self.vocabulary = vocabulary
        self.drawn = drawn
        """The photos of all splits, if they were drawn at random."""
        self._source = source
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
        splits = read_splits(experiment.captions, names, drawn, with_photos=experiment.features.from_photos)
        if vocabulary is None:
            captions = (caption for captions in splits["train"].references for caption in captions)
            vocabulary = build_vocabulary(captions, experiment.vocabulary)
            _warn_of_long_tokens(splits["train"], vocabulary)
        source = open_source(experiment)
        if isinstance(source, FileSource):
            source.find(list(splits.values()))  # refuses a file that lacks photos
        return cls(splits, vocabulary, source, drawn)

    @cached_property
    def encoder(self) -> Identity:
        """The identity of the features: of the encoder, or of the file that they are from.

        Weights whose digest is not known are read, or fetched first.
        """
        return self._source.identity

    @property
    def features(self) -> dict[SplitName, Features]:
        """The features of each split, after :meth:`with_features`."""
        assert isinstance(self._source, Loaded)
        return self._source.features

    @property
    def reference(self) -> Reference | None:
        """What an encoder can be checked with, for features from a file whose encoder is not known."""
        return self._source.reference if isinstance(self._source, Loaded) else None

    def with_features(self, world: World = ALONE) -> "Dataset":
        """Return the dataset with features, from the cache or computed now; each rank computes a shard."""
        assert isinstance(self._source, Source)
        splits = list(self.splits.values())
        features = self._source.compute(splits, world=world)
        return Dataset(
            self.splits, self.vocabulary, Loaded(features, *self._source.check(splits, features)), self.drawn
        )

    def count_uncached(self) -> int:
        """Return the number of photos whose features the cache lacks."""
        assert isinstance(self._source, Source)
        return self._source.count_uncached(list(self.splits.values()))

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
