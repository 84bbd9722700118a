"""Every setting of an experiment: its type, bounds, default and meaning. The manual that ``--help`` prints.

A setting has one name everywhere: ``training.learning_rate`` is the key in the TOML file, the flag on the command
line, the param in MLflow and the parameter of a study. Imports nothing but the standard library and pydantic.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, field_validator, model_validator

SplitName = Literal["train", "dev", "test"]
Cleaning = Literal["tutorial", "standard"]
Unknown = Literal["drop", "token"]
Layer = Literal["fc2", "conv5_3"]
Pool = Literal["none", "max2", "max3", "mean"]
Precision = Literal["auto", "float32", "bfloat16"]
Order = Literal["captions", "photos"]
Schedule = Literal["constant", "cosine"]
Metric = Literal["dev_loss", "dev_cider"]

NAME: Final = r"^\w[\w .-]{0,99}$"
"""Names of experiments, models and studies: no separator of paths, URIs or lines."""
PHOTO_SIZE: Final = 224
"""The side of the square that VGG16 was trained on, in pixels."""
WEIGHTS: Final[Mapping[str, tuple[Layer, ...]]] = {
    "IMAGENET1K_V1": ("fc2", "conv5_3"),
    "IMAGENET1K_FEATURES": ("conv5_3",),
}
"""Published VGG16 weights by torchvision's names, with the layers that each holds."""

_CELL = 16  # pixels that one position of conv5_3's grid stands for
_POOLED: Mapping[Pool, int] = {"none": 1, "max2": 2, "max3": 3, "mean": 1}  # positions to a side that become one
_MOST_STEPS = 1_000_000  # between the ends of a range of a study

PhotoSize = Annotated[int, Field(ge=6 * _CELL, le=64 * _CELL, multiple_of=_CELL)]


class Section(BaseModel):
    """A section of settings: immutable, and a name that it does not know is an error."""

    # Deferred: --help reads the fields alone, and to build the validators takes longer than all else that it does.
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, defer_build=True)


def _as_tuple(values: object) -> object:
    """Strict validation takes a list of JSON for a tuple, but not one that a validator has passed on."""
    return tuple(values) if isinstance(values, list) else values


def _dotted(settings: object, ends: frozenset[str] = frozenset()) -> object:
    """TOML reads ``training.epochs = 3`` as nested tables: back to dotted names.

    A table that has one of the keys ``ends`` is a value.
    """
    if not isinstance(settings, Mapping):
        return settings
    flat: dict[str, object] = {}
    waiting = list(settings.items())
    while waiting:
        name, value = waiting.pop(0)
        if isinstance(value, Mapping) and not ends & value.keys():
            waiting += [(f"{name}.{inner}", deeper) for inner, deeper in value.items()]
        else:
            flat[name] = value
    return flat


class CaptionsConfig(Section):
    """Where photos and captions lie; the other paths are relative to ``root``."""

    root: Path
    """Folder of the data."""
    photos: Path = Path("Flicker8k_Dataset")
    """Folder of the photos."""
    captions: Path = Path("Flickr8k.token.txt")
    """File of the captions: Flickr8k's format, or JSON in COCO's or Karpathy's."""
    splits: Literal["lists", "karpathy"] = "lists"
    """``karpathy`` takes a photo's split from its ``split`` in the captions file: train and restval, val, test."""
    train: Path = Path("Flickr_8k.trainImages.txt")
    """List of the train photos, one file name a line."""
    dev: Path = Path("Flickr_8k.devImages.txt")
    """List of the dev photos."""
    test: Path = Path("Flickr_8k.testImages.txt")
    """List of the test photos."""

    def list_of(self, split: SplitName) -> Path:
        """Return the file that tells a split's photos."""
        if self.splits == "karpathy":
            return self.root / self.captions
        lists = {"train": self.train, "dev": self.dev, "test": self.test}
        return self.root / lists[split]


class VocabularyConfig(Section):
    """How captions become tokens, and which tokens get an entry."""

    cleaning: Cleaning = "standard"
    """``standard``: lower-case, split at blanks, tokens without a letter or digit dropped; ``tutorial``: punctuation
    off, then only words of two letters or more that hold nothing but letters."""
    minimum_count: int = Field(default=5, ge=1)
    """Words that occur less often in the train captions have no entry."""
    unknown: Unknown = "token"
    """Words without an entry are replaced by UNK (``token``) or left out (``drop``)."""


def grid_shape(layer: Layer, pool: Pool, size: int) -> tuple[int, int]:
    """Return (P, F): grid positions of a photo of ``size`` pixels, and features at each."""
    if layer == "fc2":
        return 1, 4096
    return (1 if pool == "mean" else (size // _CELL // _POOLED[pool]) ** 2), 512


def pooled(pool: Pool) -> int:
    """Return how many positions, to either side, max-pooling makes one of; 1: none."""
    return _POOLED[pool]


def check_grid(layer: Layer, pool: Pool, size: int) -> None:
    """Raise ValueError where a photo of that size has no features of that layer and pool."""
    if layer == "fc2" and size != PHOTO_SIZE:
        raise ValueError(f"features.size = {size}: fc2 takes photos of {PHOTO_SIZE} pixels alone; use layer conv5_3")
    if layer == "fc2" and pool != "none":
        raise ValueError(f"features.pool = '{pool}': fc2 has no grid to pool; use 'none', or layer conv5_3")
    least = _CELL * _POOLED[pool]
    if size % least:
        raise ValueError(
            f"features.pool = '{pool}': would leave out the edge of a photo of features.size = {size} pixels; "
            f"give a size that {least} divides"
        )


class FeaturesConfig(Section):
    """Which VGG16 features of a photo are used, from which weights, and where they are cached."""

    layer: Layer = "fc2"
    """``fc2``: the 4096 values of the last hidden layer (the tutorial's); ``conv5_3``: a grid of 512 values a place."""
    pool: Pool = "none"
    """Pooling of conv5_3's grid: 2x2 maxima (``max2``), 3x3 maxima (``max3``), the average (``mean``), or none."""
    size: PhotoSize = PHOTO_SIZE
    """Side of the square that a photo is squashed to, in pixels."""
    weights: str = "IMAGENET1K_V1"
    """Torchvision's name of published weights, fetched at first use, or the path of a file of VGG16 weights."""
    cache: Path = Field(default_factory=lambda: _cache_home() / "features")
    """Folder of the cached features."""
    precision: Precision = "auto"
    """Precision of the extraction; ``auto`` is bfloat16 where the device has instructions for it."""
    batch_size: int = Field(default=32, ge=1, le=100_000)
    """Photos in a batch of the extraction."""
    mirror: bool = False
    """Whether an epoch sees each train photo as it is or mirrored, by chance."""

    @property
    def shape(self) -> tuple[int, int]:
        """(P, F): grid positions and features at each."""
        return grid_shape(self.layer, self.pool, self.size)

    @model_validator(mode="after")
    def _layer_fits(self) -> "FeaturesConfig":
        if self.layer not in WEIGHTS.get(self.weights, WEIGHTS["IMAGENET1K_FEATURES"]):
            raise ValueError(
                f"features.layer = '{self.layer}' needs the fully connected layers, which "
                f"features.weights = '{self.weights}' does not hold; use IMAGENET1K_V1, or layer conv5_3"
            )
        check_grid(self.layer, self.pool, self.size)
        return self


def _cache_home() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "capexp"


class ModelConfig(Section):
    """The decoder and its sizes; by default the tutorial's."""

    decoder: Literal["merge", "attention"] = "merge"
    """``merge``: the tutorial's, one vector a photo; ``attention``: looks at the places of a grid, word by word."""
    embedding_size: int = Field(default=256, ge=1, le=8192)
    """Width of the word embedding."""
    lstm_units: int = Field(default=256, ge=1, le=8192)
    """Width of the LSTM."""
    attention_size: int = Field(default=256, ge=1, le=8192)
    """Width of the attention decoder's queries and keys."""
    dropout: float = Field(default=0.5, ge=0, lt=1)
    """Dropout on photo and word embedding."""
    output_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout before the vocabulary layer, which the tutorial has none of."""
    photo_norm: Literal["none", "unit", "standard"] = "none"
    """Scales each vector of a photo's features to length 1 (``unit``) or to mean 0 and variance 1 (``standard``)."""


class SelfCriticalConfig(Section):
    """The second phase: REINFORCE on the CIDEr-D of sampled captions (:mod:`capexp.training.self_critical`)."""

    epochs: int = Field(default=0, ge=0, le=1_000_000)
    """Epochs of this phase; 0: there is none."""
    learning_rate: float = Field(default=5e-5, gt=0, allow_inf_nan=False)
    """Learning rate of Adam."""
    schedule: Schedule = "constant"
    """``cosine`` lowers the learning rate from step to step, to zero at the end of this phase."""
    photos: int = Field(default=25, ge=1, le=1_000_000)
    """Photos in a batch."""
    samples: int = Field(default=5, ge=2, le=1000)
    """Captions sampled for each photo."""
    cross_entropy: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Weight of the cross-entropy of the photos' own captions in the loss: it keeps samples from narrowing to a few
    phrases."""


class TrainingConfig(Section):
    """How long, how fast and where a captioner is trained."""

    epochs: int = Field(default=20, ge=1, le=1_000_000)
    """Maximum number of epochs."""
    patience: int = Field(default=3, ge=1, le=1_000_000)
    """Training stops after this many epochs without a better dev loss."""
    batch_size: int = Field(default=64, ge=1, le=1_000_000)
    """Captions in a batch."""
    order: Order = "captions"
    """``photos`` puts all captions of a photo into one batch: its features are read and projected once an epoch."""
    learning_rate: float = Field(default=1e-3, gt=0, allow_inf_nan=False)
    """Learning rate of AdamW."""
    schedule: Schedule = "constant"
    """``cosine`` lowers the learning rate from step to step, to zero at the end of ``epochs``."""
    clip_norm: float = Field(default=5.0, gt=0, allow_inf_nan=False)
    """Gradients of a larger norm are scaled down to it."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Label smoothing of the loss that is minimised; losses are reported without it."""
    weight_decay: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Weight decay of AdamW."""
    average: float = Field(default=0.0, ge=0, lt=1)
    """EMA decay of the weights; 0 turns it off. The EMA weights are evaluated and saved."""
    precision: Precision = "auto"
    """Precision of matrix products; ``auto`` is bfloat16 where the device has instructions for it."""
    device: str = "auto"
    """Device to train on: ``cpu``, ``cuda``, ``cuda:1``; ``auto`` is a GPU where there is one."""
    keep: int = Field(default=1, ge=1, le=1_000_000)
    """Number of best captioners that stay on disk; one more while an older state may need it."""
    save_steps: int = Field(default=1000, ge=1, le=1_000_000_000)
    """Steps between saved states within an epoch: what a kill costs at most."""
    self_critical: SelfCriticalConfig = Field(default_factory=SelfCriticalConfig)


class MemberConfig(Section):
    """Captioners of one experiment at some seeds."""

    experiment: str = Field(pattern=r"^[^\x00-\x1f\x7f]+$")
    """A name under ``experiments/``, or the path of a TOML file."""
    seeds: tuple[int, ...] = Field(default=(1,), min_length=1)
    """One member is trained at each seed."""
    settings: Mapping[str, str | int | float | bool] = {}
    """Settings in place of those of the file, by dotted name."""

    @field_validator("seeds", mode="before")
    @classmethod
    def _seeds_as_tuple(cls, seeds: object) -> object:
        return _as_tuple(seeds)

    @field_validator("settings", mode="before")
    @classmethod
    def _dotted_settings(cls, settings: object) -> object:
        return _dotted(settings)


class EnsembleConfig(Section):
    """Captioners that decode together; none: the experiment trains a captioner of its own."""

    members: tuple[MemberConfig, ...] = ()
    """Tables with ``experiment``, ``seeds`` and ``settings``."""

    @field_validator("members", mode="before")
    @classmethod
    def _members_as_tuple(cls, members: object) -> object:
        return _as_tuple(members)


class DecodingConfig(Section):
    """How captions are decoded."""

    method: Literal["greedy", "beam", "sample", "consensus"] = "greedy"
    """``consensus``: of beam search's hypotheses the one that they and sampled captions agree with most."""
    beam_width: int = Field(default=3, ge=1, le=10_000)
    """Hypotheses that beam search keeps for each photo."""
    samples: int = Field(default=40, ge=0, le=1000)
    """Captions that consensus samples for each photo."""
    length_penalty: float = Field(default=0.0, ge=0, le=10)
    """Beam search ranks by log-probability divided by length to this power: 0 prefers short captions, 1 takes the
    mean over the words."""
    temperature: float = Field(default=1.0, ge=1e-4, le=100)
    """Temperature of sampling: below 1 nearer to the most probable words."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sampling draws from the most probable words that hold this much probability together."""
    seed: int = Field(default=1, ge=0, lt=2**31)
    """Seed of sampling: the same photo gets the same caption, in whatever batch."""
    repeat_trigrams: bool = True
    """Whether a caption may hold three words in a row twice."""
    maximum_length: int = Field(default=30, ge=1, le=1000)
    """Maximum number of words in a caption."""

    def describe(self) -> str:
        """Return the method in words."""
        words = {
            "greedy": "greedy decoding",
            "beam": f"beam search of width {self.beam_width}",
            "sample": "sampling",
            "consensus": f"the consensus of a beam of {self.beam_width} and {self.samples} samples",
        }
        return words[self.method]


class RegistryConfig(Section):
    """Under which name the best model is registered, and what makes it the champion."""

    model: str = Field(pattern=NAME)
    """Name of the registered model; one name a data set, so that its versions compare."""
    metric: Metric = "dev_loss"
    """``dev_loss``: lower is better, compared among captioners of the same vocabulary; ``dev_cider``: higher is
    better, of captions decoded as each captioner decodes."""


Value = int | float | str
Finite = Annotated[float, Field(allow_inf_nan=False)]
Whole = Annotated[int, Field(ge=-(2**53), le=2**53)]


class Range(Section):
    """Numbers from ``low`` to ``high``, whole ones where both are whole."""

    low: Whole | Finite
    high: Whole | Finite
    log: bool = False
    step: Annotated[Whole, Field(gt=0)] | Annotated[Finite, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _in_order(self) -> "Range":
        if self.low >= self.high:
            raise ValueError(f"tune.search: low = {self.low} is not below high = {self.high}")
        if isinstance(self.step, float) and isinstance(self.low, int) and isinstance(self.high, int):
            raise ValueError(f"tune.search: step = {self.step} between whole numbers; give a whole step")
        if self.log and (self.low <= 0 or self.step is not None):
            raise ValueError("tune.search: log = true needs low above 0, and takes no step")
        if self.step is not None and not 1 <= (self.high - self.low) / self.step <= _MOST_STEPS:
            span = f"from {self.low} to {self.high}"
            raise ValueError(f"tune.search: step = {self.step} {span}; give one of 1 to {_MOST_STEPS:,} steps")
        return self

    @property
    def is_whole(self) -> bool:
        """Whether whole numbers are drawn."""
        return isinstance(self.low, int) and isinstance(self.high, int)

    @property
    def kind(self) -> str:
        """What must stay as it is while a study goes on; low, high and step may change."""
        return f"{'whole' if self.is_whole else 'real'} numbers{' by logarithm' if self.log else ''}"


class Choices(Section):
    """One of some values."""

    choices: tuple[Value, ...] = Field(min_length=2)

    @field_validator("choices", mode="before")
    @classmethod
    def _choices_as_tuple(cls, choices: object) -> object:
        return _as_tuple(choices)

    @property
    def kind(self) -> str:
        """What must stay as it is while a study goes on."""
        return f"one of {', '.join(map(repr, self.choices))}"


def _which(space: object) -> str:
    choices = "choices" in space if isinstance(space, Mapping) else isinstance(space, Choices)
    return "Choices" if choices else "Range"


Space = Annotated[Annotated[Range, Tag("Range")] | Annotated[Choices, Tag("Choices")], Discriminator(_which)]
"""A range or choices; a key tells which, so that an error names that one alone."""


def _default_search() -> dict[str, Space]:
    return {
        "model.embedding_size": Range(low=64, high=512, log=True),
        "model.lstm_units": Range(low=64, high=512, log=True),
        "model.dropout": Range(low=0.2, high=0.7),
    }


class TuneConfig(Section):
    """What a study searches, how, and for how long."""

    trials: int = Field(default=20, ge=1)
    """Trials that the study runs, finished and pruned ones together."""
    sampler: Literal["tpe", "random"] = "tpe"
    """Optuna's sampler."""
    pruner: Literal["median", "hyperband", "none"] = "median"
    """Optuna's pruner."""
    heartbeat: int = Field(default=20, ge=1, le=3600)
    """Seconds between a trial's heartbeats in a database; after three missed ones it is taken for lost."""
    search: Mapping[str, Space] = Field(default_factory=_default_search, min_length=1)
    """The search space: a setting by dotted name, with ``{low, high, log, step}`` or ``{choices}``."""

    @field_validator("search", mode="before")
    @classmethod
    def _dotted_search(cls, search: object) -> object:
        return _dotted(search, frozenset({"low", "high", "choices"}))


_OF_ENSEMBLES = ("training.batch_size", "training.order", "training.device")


class Experiment(Section):
    """Everything that decides what a run does."""

    name: str = Field(pattern=NAME)
    """Name of the run and of MLflow's experiment."""
    seed: int = Field(default=1, ge=0, lt=2**31)
    """Seed of initial weights, dropout and the order of an epoch: the same seed gives the same losses."""
    captions: CaptionsConfig
    vocabulary: VocabularyConfig = Field(default_factory=VocabularyConfig)
    features: FeaturesConfig = Field(default_factory=FeaturesConfig)
    model: ModelConfig = Field(default_factory=ModelConfig)
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    ensemble: EnsembleConfig = Field(default_factory=EnsembleConfig)
    decoding: DecodingConfig = Field(default_factory=DecodingConfig)
    registry: RegistryConfig
    tune: TuneConfig = Field(default_factory=TuneConfig)

    @model_validator(mode="after")
    def _ensemble_trains_nothing(self) -> "Experiment":
        if self.is_ensemble:
            own = flatten(self.model_dump(include={"model", "training"}))
            usual = flatten({"model": ModelConfig().model_dump(), "training": TrainingConfig().model_dump()})
            for name, value in own.items():
                if value != usual[name] and name not in _OF_ENSEMBLES:
                    raise ValueError(
                        f"{name} = {value!r} decides nothing in an ensemble, whose members are trained by themselves; "
                        "set it in their experiments, or in settings of ensemble.members"
                    )
        return self

    @property
    def is_ensemble(self) -> bool:
        """Whether it decodes captioners of other experiments together, instead of training one."""
        return bool(self.ensemble.members)

    @property
    def has_second_phase(self) -> bool:
        """Whether self-critical training follows."""
        return self.training.self_critical.epochs > 0

    def flat(self) -> dict[str, str]:
        """Return every setting that has an effect by its dotted name, as text; the study's own settings left out."""
        settings = flatten(self.model_dump(mode="json", exclude={"tune"}))
        if self.is_ensemble:
            unused = {name for name in settings if name.startswith(("model.", "training."))} - set(_OF_ENSEMBLES)
        else:
            unused = {"ensemble.members"}
        return {name: str(value) for name, value in settings.items() if name not in unused}


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings by dotted name."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat
