"""A training small enough for a second: photos whose features tell what their captions say."""

import warnings
from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from capexp.captioning.captioner import Captioner
from capexp.data.batches import CaptionBatches
from capexp.data.captions import Split
from capexp.data.features import Features
from capexp.data.vgg16 import EncoderIdentity
from capexp.data.vocabulary import build_vocabulary
from capexp.distributed import ALONE, World
from capexp.settings import (
    DecodingConfig,
    FeaturesConfig,
    ModelConfig,
    Order,
    Pool,
    SplitName,
    TrainingConfig,
    VocabularyConfig,
)
from capexp.training.checkpoints import Checkpoints
from capexp.training.loop import Epoch, Training, fit
from capexp.training.teacher_forcing import CrossEntropy

CPU = torch.device("cpu")
COLOURS, THINGS = ("red", "blue", "green", "black"), ("dog", "cat", "car", "ball", "bird")
CONFIG = TrainingConfig(epochs=4, patience=4, batch_size=16, learning_rate=0.01, precision="float32", device="cpu")
Kind = Literal["merge", "attention"]


def identity(pool: Pool, size: int = 224) -> EncoderIdentity:
    """That of an encoder which nobody has."""
    return EncoderIdentity("conv5_3", pool, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "0" * 64, "none", size)


def data(name: SplitName, photos: int, seed: int, pool: Pool = "mean") -> tuple[Split, Features]:
    """Photos whose features tell a colour and a thing, in a grid at a place of its own, with captions that say them."""
    rng = np.random.default_rng(seed)
    colours, things = rng.integers(0, 4, photos), rng.integers(0, 5, photos)
    positions, _ = FeaturesConfig(layer="conv5_3", pool=pool, weights="IMAGENET1K_FEATURES").shape
    features = np.zeros((photos, positions, 512), np.float16)
    places = rng.integers(0, positions, photos)
    features[np.arange(photos), places, colours] = 1
    features[np.arange(photos), places, 4 + things] = 1
    texts = tuple(
        (f"a {COLOURS[c]} {THINGS[t]}", f"the {THINGS[t]} is {COLOURS[c]}")
        for c, t in zip(colours, things, strict=True)
    )
    names = tuple(f"{name}{i}.jpg" for i in range(photos))
    return Split(name, Path(), names, texts), Features(features, np.arange(photos))


class Noise:
    """Photos of random features, most with a mirrored view, and of some random captions each, which differ in length.

    ``captions`` and ``words`` are the largest numbers of captions of a photo, and of words of a caption.
    """

    def __init__(
        self, decoder: str, photos: int, captions: int, words: int, entries: int, dropout: float = 0.0
    ) -> None:
        rng = np.random.default_rng(0)
        known = [f"word{i}" for i in range(entries)]
        texts = tuple(
            tuple(" ".join(rng.choice(known, rng.integers(1, words + 1))) for _ in range(rng.integers(1, captions + 1)))
            for _ in range(photos)
        )
        self.vocabulary = build_vocabulary((one for photo in texts for one in photo), VocabularyConfig(minimum_count=1))
        self.split = Split("train", Path(), tuple(f"{i}.jpg" for i in range(photos)), texts)
        places = 9 if decoder == "attention" else 1
        plain, mirrored = (
            Features(rng.random((photos, places, 512), np.float32).astype(np.float16), np.arange(photos))
            for _ in range(2)
        )
        self.features = plain.with_view(mirrored)
        self.encoder = identity("max3", 144) if decoder == "attention" else identity("mean")
        self.model = ModelConfig.model_validate(
            {"decoder": decoder, "embedding_size": 24, "lstm_units": 24, "attention_size": 8, "dropout": dropout}
        )

    def captioner(self, maximum_length: int = 30) -> Captioner:
        """An untrained one."""
        decoding = DecodingConfig(maximum_length=maximum_length)
        return Captioner.fresh(self.model, self.vocabulary, self.encoder, decoding, seed=1)


def small(decoder: Kind = "merge", order: Order = "captions", dropout: float = 0.2, batch_size: int = 16) -> Training:
    """A training by ``CONFIG`` that has not begun; a new one at each call."""
    pool: Pool = "mean" if decoder == "merge" else "max2"
    train, train_features = data("train", 80, 1, pool)
    dev, dev_features = data("dev", 20, 2, pool)
    words = build_vocabulary((text for photo in train.references for text in photo), VocabularyConfig(minimum_count=1))
    model = ModelConfig(decoder=decoder, embedding_size=16, lstm_units=16, dropout=dropout)
    return Training(
        Captioner.fresh(model, words, identity(pool), DecodingConfig(), seed=1),
        CaptionBatches(train, words, train_features, batch_size, order),
        CaptionBatches(dev, words, dev_features, batch_size, order),
        CONFIG,
        seed=1,
        device=CPU,
    )


def checkpoints_in(folder: Path, keep: int = 1) -> Checkpoints:
    """A run's checkpoints, in a folder that is made where it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    return Checkpoints(folder, keep)


def started(
    training: Training, checkpoints: Checkpoints, config: TrainingConfig = CONFIG, seed: int = 1, world: World = ALONE
) -> Generator[Epoch, None, None]:
    """Trains with cross-entropy; rank 0 has checkpoints."""
    training = replace(training, config=config, seed=seed, world=world)
    return fit(training, CrossEntropy(training), checkpoints if world.is_main else None)


def with_epochs(epochs: int, **others: object) -> TrainingConfig:
    """``CONFIG`` for so many epochs, with other settings too."""
    return TrainingConfig.model_validate(CONFIG.model_dump() | {"epochs": epochs, "patience": epochs} | others)


def losses(epochs: list[Epoch]) -> list[tuple[float, float]]:
    """Train and dev loss of each epoch."""
    return [(epoch.train_loss, epoch.dev_loss) for epoch in epochs]


def waits_for_gpu(work: Callable[[], object]) -> list[str]:
    """The places where the CPU waits for the GPU while some work is done."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [one for one in found if "called a synchronizing" in str(one.message)]
    return [f"{Path(one.filename).name}:{one.lineno}" for one in waits]
