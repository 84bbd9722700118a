"""Every setting of an experiment: its type, bounds, default and meaning.

A setting has one name everywhere: ``training.learning_rate`` is the key in the TOML file, the flag on the command
line, the param in MLflow and the parameter of a study. ``--help`` prints the docstrings of sections and fields. The
module imports only the standard library and pydantic.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, field_validator, model_validator

SplitName = Literal["train", "dev", "test"]
CaptionsFormat = Literal["auto", "flickr8k", "descriptions", "csv", "json", "coco", "karpathy"]
Cleaning = Literal["tutorial", "standard"]
TokenRule = Literal["words", "characters", "whitespace"]
Unknown = Literal["drop", "token"]
Layer = Literal["fc2", "conv5_3"]
Pool = Literal["none", "max2", "max3", "mean"]
PhotoResize = Literal["bilinear", "nearest"]
NetName = Literal["caffe", "torchvision"]
NetSetting = Literal["auto", "caffe", "torchvision"]
Precision = Literal["auto", "float32", "bfloat16"]
Order = Literal["captions", "photos"]
Schedule = Literal["constant", "cosine"]
Metric = Literal["dev_loss", "dev_cider"]

NAME: Final = r"^\w[\w .-]{0,99}$"
"""Pattern of the names of experiments, models and studies: no characters that separate paths, URIs or lines."""
PHOTO_SIZE: Final = 224
"""The side of the square that VGG16 was trained on, in pixels."""
WEIGHTS: Final[Mapping[str, tuple[Layer, ...]]] = {
    "IMAGENET1K_V1": ("fc2", "conv5_3"),
    "IMAGENET1K_FEATURES": ("conv5_3",),
    "KERAS": ("fc2", "conv5_3"),
}
"""The layers that each set of published VGG16 weights contains, by its name."""
NO_FILE: Final = "none"
"""The value of ``features.file`` if features are computed from photos."""
UNKNOWN_WEIGHTS: Final = "unknown"
"""The value of ``features.weights`` for features from a file whose encoder is not known."""

_STRIDE = 16  # pixels from one position of conv5_3's grid to the next
# Side of the max-pooling window in grid positions; 1 if there is no max-pooling.
_POOLED: Mapping[Pool, int] = {"none": 1, "max2": 2, "max3": 3, "mean": 1}
_MOST_STEPS = 1_000_000  # from low to high of a range in a study

PhotoSize = Annotated[int, Field(ge=6 * _STRIDE, le=64 * _STRIDE, multiple_of=_STRIDE)]


class Section(BaseModel):
    """A section of settings. It is immutable, and an unknown name is an error."""

    # defer_build: --help needs only the fields, and building the validators would take longer than the rest of it.
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, defer_build=True)


def _as_tuple(values: object) -> object:
    """Convert a list to a tuple; return other values unchanged.

    In strict mode pydantic accepts a JSON array for a tuple only if no validator in Python runs before. A field with a
    "before" validator needs a tuple.
    """
    return tuple(values) if isinstance(values, list) else values


def _dotted(settings: object, ends: frozenset[str] = frozenset()) -> object:
    """Flatten nested tables to dotted names, because TOML parses ``training.epochs = 3`` as nested tables.

    A table that has one of the keys in ``ends`` is a value and is not flattened. Values that are no table are returned
    unchanged.
    """
    if not isinstance(settings, Mapping):
        return settings
    flat: dict[str, object] = {}
    queue = list(settings.items())
    while queue:
        name, value = queue.pop(0)
        if isinstance(value, Mapping) and not ends & value.keys():
            queue += [(f"{name}.{key}", inner) for key, inner in value.items()]
        else:
            flat[name] = value
    return flat


class CaptionsConfig(Section):
    """Paths of photos, captions and splits; all but ``root`` are relative to ``root``."""

    root: Path
    """Folder of the data."""
    photos: Path = Path("Flicker8k_Dataset")
    """Folder of the photos."""
    captions: Path = Path("Flickr8k.token.txt")
    """Captions file."""
    format: CaptionsFormat = "auto"
    """Form of the captions file. ``auto`` recognises it: ``flickr8k`` (lines ``photo.jpg#0<TAB>caption``),
    ``descriptions`` (lines ``photo caption``), ``csv`` (a table with a header; comma, semicolon, tab or bar between the
    columns), ``json`` (JSON lines, or a list of records), ``coco``, ``karpathy``."""
    splits: Literal["lists", "karpathy", "random", "files"] = "lists"
    """``lists``: the files ``train``, ``dev`` and ``test`` list the photos of each split; ``karpathy``: the field
    ``split`` in the captions file gives each photo's split (train and restval are train, val is dev, test is test);
    ``random``: photos are drawn at random; ``files``: ``train``, ``dev`` and ``test`` are a captions file each."""
    train: Path = Path("Flickr_8k.trainImages.txt")
    """List of the train photos, one file name per line; with ``splits = "files"`` the captions file of train."""
    dev: Path = Path("Flickr_8k.devImages.txt")
    """List of the dev photos, or captions file of dev."""
    test: Path = Path("Flickr_8k.testImages.txt")
    """List of the test photos, or captions file of test."""
    train_photos: Path = Path()
    """Folder of the train photos, with ``splits = "files"``; ``.`` is the folder that the captions file is in."""
    dev_photos: Path = Path()
    """Folder of the dev photos, with ``splits = "files"``."""
    test_photos: Path = Path()
    """Folder of the test photos, with ``splits = "files"``."""
    dev_fraction: float = Field(default=0.1, gt=0, lt=1)
    """Share of the photos that become dev photos, with ``splits = "random"``; at least one photo."""
    test_fraction: float = Field(default=0.1, ge=0, lt=1)
    """Share of the photos that become test photos, with ``splits = "random"``."""
    split_seed: int = Field(default=1, ge=0, lt=2**31)
    """Seed of the random splits. Runs with another ``seed`` have the same splits."""

    def list_of(self, split: SplitName) -> Path:
        """Return the file that assigns photos to a split."""
        if self.splits in ("karpathy", "random"):
            return self.root / self.captions
        return self.root / {"train": self.train, "dev": self.dev, "test": self.test}[split]

    def captions_of(self, split: SplitName) -> Path:
        """Return the captions file of a split."""
        return self.list_of(split) if self.splits == "files" else self.root / self.captions

    def photos_of(self, split: SplitName) -> Path:
        """Return the folder of a split's photos."""
        if self.splits != "files":
            return self.root / self.photos
        folder = {"train": self.train_photos, "dev": self.dev_photos, "test": self.test_photos}[split]
        return self.list_of(split).parent if folder == Path() else self.root / folder

    def fractions(self) -> dict[SplitName, float]:
        """Return the shares of dev and test photos in random splits."""
        return {"dev": self.dev_fraction, "test": self.test_fraction}

    @model_validator(mode="after")
    def _fractions_fit(self) -> "CaptionsConfig":
        if self.dev_fraction + self.test_fraction >= 1:
            raise ValueError(
                f"captions.dev_fraction = {self.dev_fraction} and captions.test_fraction = {self.test_fraction} leave "
                "no train photos; lower one"
            )
        return self


class VocabularyConfig(Section):
    """How captions are split into tokens, and which tokens get an entry in the vocabulary."""

    cleaning: Cleaning = "standard"
    """``standard``: lower-case, split by ``tokens``, drop tokens without a letter or digit; ``tutorial``: lower-case,
    split at whitespace, remove punctuation, keep only words of two or more letters and nothing else."""
    tokens: TokenRule = "words"
    """What captions are split into, for the vocabulary and for BLEU, ROUGE-L and CIDEr. ``words``: the tokens of COCO's
    scorer, which splits off punctuation and endings such as 's; ``characters``: for languages without blanks between
    words; ``whitespace``: words as they are written (the rule of runs from before there was a choice)."""
    minimum_count: int = Field(default=5, ge=1)
    """Words that occur less often than this in the train captions have no entry."""
    unknown: Unknown = "token"
    """Words without an entry are replaced by UNK (``token``) or left out (``drop``)."""

    @model_validator(mode="after")
    def _tokens_fit(self) -> "VocabularyConfig":
        if self.cleaning == "tutorial" and self.tokens == "characters":
            raise ValueError("vocabulary.tokens = 'characters': tutorial cleaning drops them; use cleaning 'standard'")
        return self


def grid_shape(layer: Layer, pool: Pool, size: int) -> tuple[int, int]:
    """Return (P, F): the number of grid positions of a photo of ``size`` pixels, and of features at each position."""
    if layer == "fc2":
        return 1, 4096
    return (1 if pool == "mean" else (size // _STRIDE // _POOLED[pool]) ** 2), 512


def pooled(pool: Pool) -> int:
    """Return the side of the max-pooling window in grid positions; 1 if there is no max-pooling."""
    return _POOLED[pool]


def check_grid(layer: Layer, pool: Pool, size: int) -> None:
    """Raise ValueError if ``layer`` and ``pool`` cannot be computed from a photo of ``size`` pixels."""
    if layer == "fc2" and size != PHOTO_SIZE:
        raise ValueError(f"features.size = {size}: fc2 takes photos of {PHOTO_SIZE} pixels alone; use layer conv5_3")
    if layer == "fc2" and pool != "none":
        raise ValueError(f"features.pool = '{pool}': fc2 has no grid to pool; use 'none', or layer conv5_3")
    divisor = _STRIDE * _POOLED[pool]
    if size % divisor:
        raise ValueError(
            f"features.pool = '{pool}': would leave out the edge of a photo of features.size = {size} pixels; "
            f"give a size that {divisor} divides"
        )


class FeaturesConfig(Section):
    """Which VGG16 features are used, how they are computed, and where they are cached."""

    layer: Layer = "fc2"
    """``fc2``: the 4096 values of the last hidden layer (used by the tutorial); ``conv5_3``: a grid with 512 values at
    each position."""
    pool: Pool = "none"
    """Pooling of conv5_3's grid: 2x2 max-pooling (``max2``), 3x3 max-pooling (``max3``), the mean over all positions
    (``mean``), or ``none``."""
    size: PhotoSize = PHOTO_SIZE
    """Side in pixels of the square that a photo is resized to (aspect ratio not kept)."""
    resize: PhotoResize = "bilinear"
    """How photos are resized: ``bilinear``, with antialiasing; ``nearest``: nearest neighbour, as Keras's ``load_img``
    does (used by the tutorial)."""
    weights: str = "IMAGENET1K_V1"
    """Published weights by name, downloaded at first use: ``IMAGENET1K_V1`` (torchvision's own net),
    ``IMAGENET1K_FEATURES`` (the Caffe net's convolutions, for conv5_3) or ``KERAS`` (the whole Caffe net, used by the
    tutorial); or a file of VGG16's weights that PyTorch or Keras has written. With ``file`` the default is ``unknown``;
    if weights are given and photos are at hand, the file is checked against them."""
    net: NetSetting = "auto"
    """Which net a file of weights holds, and so its preprocessing: ``caffe``, the net of VGG16's authors, which Keras
    has too, or ``torchvision``. ``auto`` recognises published weights; the net of others must be named."""
    file: str = NO_FILE
    """``none``, or a file of features that were computed elsewhere, to use instead of photos: the tutorial's
    ``features.pkl``, MATLAB, ``.npz``, ``.npy`` with a list of names, HDF5 or safetensors, with an array per photo."""
    cache: Path = Field(default_factory=lambda: cache_home() / "features")
    """Folder of the cached features."""
    precision: Precision = "auto"
    """Precision of the extraction; ``auto``: bfloat16 if the device has instructions for it, else float32."""
    batch_size: int = Field(default=32, ge=1, le=100_000)
    """Photos per batch of the extraction."""
    mirror: bool = False
    """Whether each train photo's mirror image (left to right) is a further view of it. An epoch takes one view of each
    photo by chance: itself, its mirror image, or one of its crops."""
    crops: int = Field(default=0, ge=0, le=99)
    """Number of random crops of each train photo that are further views of it: 0.6 to 1 of its area, mirrored with
    probability 1/2, and with brightness, contrast and colour changed by up to a fifth."""

    @property
    def shape(self) -> tuple[int, int]:
        """(P, F) of features that are computed from photos: the number of grid positions, and of features at each."""
        return grid_shape(self.layer, self.pool, self.size)

    @property
    def from_photos(self) -> bool:
        """Whether the features are computed from photos, not read from a file."""
        return self.file == NO_FILE

    @model_validator(mode="before")
    @classmethod
    def _file_of_unknown_encoder(cls, settings: Any) -> Any:
        if isinstance(settings, Mapping) and settings.get("file", NO_FILE) != NO_FILE:
            return {"weights": UNKNOWN_WEIGHTS, **settings}
        return settings

    @model_validator(mode="after")
    def _layer_fits(self) -> "FeaturesConfig":
        if not self.from_photos and self.mirror:
            raise ValueError("features.mirror: the file of features.file has no mirrored photos; set it to false")
        if not self.from_photos and self.crops:
            raise ValueError(f"features.crops = {self.crops}: the file of features.file has no crops; set it to 0")
        if self.weights == UNKNOWN_WEIGHTS:
            if self.from_photos:
                raise ValueError(
                    "features.weights = 'unknown' is for features of a file; set features.file, or weights"
                )
            return self
        if self.weights in WEIGHTS and self.layer not in WEIGHTS[self.weights]:
            raise ValueError(
                f"features.layer = '{self.layer}' needs the fully connected layers, which "
                f"features.weights = '{self.weights}' does not hold; use KERAS or IMAGENET1K_V1, or layer conv5_3"
            )
        check_grid(self.layer, self.pool, self.size)
        return self


def cache_home() -> Path:
    """Return the user's cache folder of the project; ``~/.cache/capexp`` as it stands if there is no home."""
    given = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(given) if given else Path.home() / ".cache") / "capexp"
    except RuntimeError:  # HOME is unset, and the user is not known to the system
        return Path("~/.cache/capexp")


class ModelConfig(Section):
    """Architecture of the decoder; the defaults are those of the tutorial."""

    decoder: Literal["merge", "attention"] = "merge"
    """``merge``: the tutorial's decoder, which uses one vector per photo; ``attention``: attends to the positions of a
    grid, again for each word."""
    embedding_size: int = Field(default=256, ge=1, le=8192)
    """Width of the word embedding."""
    lstm_units: int = Field(default=256, ge=1, le=8192)
    """Width of the LSTM."""
    attention_size: int = Field(default=256, ge=1, le=8192)
    """Width of the attention decoder's queries and keys."""
    dropout: float = Field(default=0.5, ge=0, lt=1)
    """Dropout rate on the photo and word embeddings."""
    output_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout rate before the vocabulary layer; the tutorial uses none there."""
    photo_norm: Literal["none", "unit", "standard"] = "none"
    """Normalisation of each feature vector of a photo: to length 1 (``unit``), to mean 0 and variance 1
    (``standard``), or ``none``."""


class SelfCriticalConfig(Section):
    """Settings of the second phase: REINFORCE with CIDEr-D as the reward (:mod:`capexp.training.self_critical`)."""

    epochs: int = Field(default=0, ge=0, le=1_000_000)
    """Epochs of this phase; 0: there is no second phase."""
    learning_rate: float = Field(default=5e-5, gt=0, allow_inf_nan=False)
    """Learning rate of Adam."""
    schedule: Schedule = "constant"
    """``constant``, or ``cosine``: the learning rate falls at each step and is zero at the end of this phase."""
    photos: int = Field(default=25, ge=1, le=1_000_000)
    """Photos per batch."""
    samples: int = Field(default=5, ge=2, le=1000)
    """Captions sampled per photo and step."""
    cross_entropy: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Weight of the cross-entropy of the reference captions in the loss. It keeps the sampled captions from becoming
    all alike."""


class TrainingConfig(Section):
    """Settings of training, and its device."""

    epochs: int = Field(default=20, ge=1, le=1_000_000)
    """Maximum number of epochs."""
    patience: int = Field(default=3, ge=1, le=1_000_000)
    """The first phase (cross-entropy) stops after this many epochs without a better dev loss. Has no effect on the
    self-critical phase."""
    batch_size: int = Field(default=64, ge=1, le=1_000_000)
    """Captions per batch."""
    order: Order = "captions"
    """``captions`` shuffles single captions; ``photos`` shuffles photos and puts all captions of a photo into one
    batch, so that its features are read and projected once per epoch."""
    learning_rate: float = Field(default=1e-3, gt=0, allow_inf_nan=False)
    """Learning rate of AdamW."""
    schedule: Schedule = "constant"
    """``constant``, or ``cosine``: the learning rate falls at each step and is zero after ``training.epochs``."""
    clip_norm: float = Field(default=5.0, gt=0, allow_inf_nan=False)
    """Maximum norm of the gradients; larger ones are scaled down to it."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Label smoothing of the loss that is minimised; reported losses are without it."""
    weight_decay: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Weight decay of AdamW."""
    average: float = Field(default=0.0, ge=0, lt=1)
    """EMA decay of the weights; 0 turns it off. The EMA weights are evaluated and saved."""
    precision: Precision = "auto"
    """Precision of matrix products; ``auto``: bfloat16 if the device has instructions for it, else float32."""
    device: str = "auto"
    """Device to compute on: ``cpu``, ``cuda``, ``cuda:1``; ``auto``: a GPU if there is one, else the CPU."""
    keep: int = Field(default=1, ge=1, le=1_000_000)
    """Number of best captioners kept on disk. One more is kept while the previous checkpoint may need it."""
    save_steps: int = Field(default=1000, ge=1, le=1_000_000_000)
    """Steps between checkpoints within an epoch. If the process is killed, at most so many steps are lost."""
    self_critical: SelfCriticalConfig = Field(default_factory=SelfCriticalConfig)


class MemberConfig(Section):
    """Members of an ensemble that have the same settings and different seeds."""

    experiment: str = Field(pattern=r"^[^\x00-\x1f\x7f]+$")
    """The members' experiment: a name under ``experiments/``, or the path of a TOML file."""
    seeds: tuple[int, ...] = Field(default=(1,), min_length=1)
    """One member per seed, found in MLflow or trained."""
    settings: Mapping[str, str | int | float | bool] = {}
    """Settings that replace those of the experiment, by dotted name."""

    @field_validator("seeds", mode="before")
    @classmethod
    def _seeds_as_tuple(cls, seeds: object) -> object:
        return _as_tuple(seeds)

    @field_validator("settings", mode="before")
    @classmethod
    def _dotted_settings(cls, settings: object) -> object:
        return _dotted(settings)


class EnsembleConfig(Section):
    """Captioners that decode together. Without members the experiment is no ensemble and trains a captioner."""

    members: tuple[MemberConfig, ...] = ()
    """Members of the ensemble: tables with ``experiment``, ``seeds`` and ``settings``."""

    @field_validator("members", mode="before")
    @classmethod
    def _members_as_tuple(cls, members: object) -> object:
        return _as_tuple(members)


class DecodingConfig(Section):
    """How captions are generated from the decoder's probabilities."""

    method: Literal["greedy", "beam", "sample", "consensus"] = "greedy"
    """``greedy``: the most probable word at each step; ``beam``: beam search; ``sample``: words sampled at random by
    their probability; ``consensus``: the hypothesis of beam search that is most similar to the other hypotheses and to
    sampled captions."""
    beam_width: int = Field(default=3, ge=1, le=10_000)
    """Hypotheses that beam search keeps for each photo."""
    samples: int = Field(default=40, ge=0, le=1000)
    """Captions sampled per photo, for ``consensus``."""
    neighbours: int = Field(default=0, ge=0, le=1000)
    """Number of train photos, those most similar to a photo by their features, whose captions ``consensus`` also
    compares with. The captioner's bundle holds the captions of all train photos; with 0 it holds none."""
    neighbour_weight: float = Field(default=4.0, gt=0, le=100)
    """Weight of the mean similarity to the captions of neighbours, in which n-grams have CIDEr-D's weights; the mean
    similarity to the captioner's own captions has weight 1."""
    copy_neighbours: bool = False
    """Whether ``consensus`` may also choose a caption of a neighbour, as a person has written it."""
    likelihood_weight: float = Field(default=0.0, ge=0, le=100)
    """Weight of a caption's log-probability in ``consensus``, beside its similarity to other captions. Small weights,
    such as 0.01, give shorter captions and higher BLEU."""
    length_penalty: float = Field(default=0.0, ge=0, le=10)
    """Exponent of the length in beam search, which ranks hypotheses by log-probability / length ** exponent. 0 prefers
    short captions; 1 ranks by the mean over the words."""
    temperature: float = Field(default=1.0, ge=1e-4, le=100)
    """Temperature of sampling; below 1, the most probable words are sampled more often."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Top-p sampling: sample only from the most probable words whose probabilities add up to this; 1: from all."""
    seed: int = Field(default=1, ge=0, lt=2**31)
    """Seed of sampling. The same photo gets the same caption in any batch."""
    repeat_trigrams: bool = True
    """Whether the same three words in a row may occur twice in a caption."""
    maximum_length: int = Field(default=30, ge=1, le=1000)
    """Maximum number of tokens in a caption: words, or characters with ``vocabulary.tokens = "characters"``."""

    def describe(self) -> str:
        """Return the method in words, for model cards."""
        words = {
            "greedy": "greedy decoding",
            "beam": f"beam search of width {self.beam_width}",
            "sample": "sampling",
            "consensus": self._describe_consensus(),
        }
        return words[self.method]

    def _describe_consensus(self) -> str:
        own = f"the consensus of a beam of {self.beam_width} and {self.samples} samples"
        if self.likelihood_weight:
            own += f", and their likelihood with weight {self.likelihood_weight:g},"
        if not self.neighbours:
            return own
        copied = ", which may be chosen too" if self.copy_neighbours else ""
        return f"{own} with the captions of {self.neighbours} similar train photos{copied}"


class RegistryConfig(Section):
    """The name under which the best captioner is registered, and the metric that decides which version is champion."""

    model: str = Field(pattern=NAME)
    """Name of the registered model. Use one name per data set, so that all its versions can be compared."""
    metric: Metric = "dev_loss"
    """``dev_loss``: lower is better; only captioners with the same vocabulary are compared; ``dev_cider``: CIDEr-D of
    the dev captions, each captioner with its own decoding settings; higher is better."""


Value = int | float | str
Finite = Annotated[float, Field(allow_inf_nan=False)]
Whole = Annotated[int, Field(ge=-(2**53), le=2**53)]


class Range(Section):
    """A range of numbers: whole numbers if ``low`` and ``high`` are whole, else real numbers."""

    low: Whole | Finite
    """The lowest number."""
    high: Whole | Finite
    """The highest allowed number."""
    log: bool = False
    """Whether the logarithm of the number is sampled uniformly, instead of the number."""
    step: Annotated[Whole, Field(gt=0)] | Annotated[Finite, Field(gt=0)] | None = None
    """The difference between neighbouring numbers, counted from ``low``; by default 1 between whole numbers, and real
    numbers are continuous."""

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
        """Whether the numbers are whole numbers."""
        return isinstance(self.low, int) and isinstance(self.high, int)

    @property
    def kind(self) -> str:
        """The part of the range that may not change when a study continues; low, high and step may change."""
        return f"{'whole' if self.is_whole else 'real'} numbers{' by logarithm' if self.log else ''}"


class Choices(Section):
    """A choice between values."""

    choices: tuple[Value, ...] = Field(min_length=2)
    """The values."""

    @field_validator("choices", mode="before")
    @classmethod
    def _choices_as_tuple(cls, choices: object) -> object:
        return _as_tuple(choices)

    @property
    def kind(self) -> str:
        """The values in words; they may not change when a study continues."""
        return f"one of {', '.join(map(repr, self.choices))}"


def _space_tag(space: object) -> str:
    """Return the tag of the class that validates a space."""
    has_choices = "choices" in space if isinstance(space, Mapping) else isinstance(space, Choices)
    return "Choices" if has_choices else "Range"


Space = Annotated[Annotated[Range, Tag("Range")] | Annotated[Choices, Tag("Choices")], Discriminator(_space_tag)]
"""A range or choices. The key ``choices`` decides which, so that errors are about one of the two classes only."""


def _default_search() -> dict[str, Space]:
    return {
        "model.embedding_size": Range(low=64, high=512, log=True),
        "model.lstm_units": Range(low=64, high=512, log=True),
        "model.dropout": Range(low=0.2, high=0.7),
    }


class TuneConfig(Section):
    """Settings of a study: search space, sampler, pruner and number of trials."""

    trials: int = Field(default=20, ge=1)
    """Number of trials after which the study ends; finished and pruned trials count."""
    sampler: Literal["tpe", "random"] = "tpe"
    """Optuna's sampler: ``tpe`` (tree-structured Parzen estimator) or ``random``."""
    pruner: Literal["median", "hyperband", "none"] = "median"
    """Optuna's pruner, which ends unpromising trials early; ``none``: no trial is pruned."""
    heartbeat: int = Field(default=20, ge=1, le=3600)
    """Seconds between a trial's heartbeats in a PostgreSQL database; after three missed ones the trial is considered
    lost."""
    search: Mapping[str, Space] = Field(default_factory=_default_search, min_length=1)
    """The search space: for each setting, by dotted name, ``{low, high, log, step}`` or ``{choices}``."""

    @field_validator("search", mode="before")
    @classmethod
    def _dotted_search(cls, search: object) -> object:
        return _dotted(search, frozenset({"low", "high", "choices"}))


# The settings of model and training that have an effect on an ensemble; the others may not be set for it.
_USED_BY_ENSEMBLES = ("training.batch_size", "training.order", "training.device")


class Experiment(Section):
    """All settings of an experiment."""

    name: str = Field(pattern=NAME)
    """Name of the run and of the experiment in MLflow."""
    seed: int = Field(default=1, ge=0, lt=2**31)
    """Seed of initial weights, dropout, the order of each epoch, the views of photos, the samples of the self-critical
    phase, the study's sampler, the shuffled (image-blind) baseline and bootstrap intervals. The same seed gives the
    same losses."""
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
            defaults = flatten({"model": ModelConfig().model_dump(), "training": TrainingConfig().model_dump()})
            for name, value in own.items():
                if value != defaults[name] and name not in _USED_BY_ENSEMBLES:
                    raise ValueError(
                        f"{name} = {value!r} decides nothing in an ensemble, whose members are trained by themselves; "
                        "set it in their experiments, or in settings of ensemble.members"
                    )
        return self

    @property
    def is_ensemble(self) -> bool:
        """Whether the experiment decodes with several members together, instead of training one captioner."""
        return bool(self.ensemble.members)

    @property
    def has_second_phase(self) -> bool:
        """Whether there is a second, self-critical phase."""
        return self.training.self_critical.epochs > 0

    def flat(self) -> dict[str, str]:
        """Return the settings that have an effect, as text by dotted name, without those of the study (``tune``)."""
        settings = flatten(self.model_dump(mode="json", exclude={"tune"}))
        if self.is_ensemble:
            unused = {name for name in settings if name.startswith(("model.", "training."))} - set(_USED_BY_ENSEMBLES)
        else:
            unused = {"ensemble.members"}
        return {name: str(value) for name, value in settings.items() if name not in unused}


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested settings: return their values by dotted name."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat
