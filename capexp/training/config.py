"""How a captioner is trained, and on which device."""

import os
import re
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

from capexp.data.batches import Order
from capexp.data.vgg16 import Precision
from capexp.distributed import place
from capexp.errors import InputError


class SelfCriticalConfig(BaseModel):
    """The second phase, on the captions' scores: see :mod:`capexp.training.self_critical`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    epochs: int = Field(default=0, ge=0, le=1_000_000)
    """0: there is none."""
    learning_rate: float = Field(default=5e-5, gt=0, allow_inf_nan=False)
    schedule: Literal["constant", "cosine"] = "constant"
    """``cosine`` lowers the learning rate from step to step, to zero at the end of this phase."""
    photos: int = Field(default=25, ge=1, le=1_000_000)
    """A batch."""
    samples: int = Field(default=5, ge=2, le=1000)
    """Captions drawn of a photo."""
    cross_entropy: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """The cross-entropy of the photos' own captions, in nats per token, is minimised too, times this: it keeps what is
    drawn from narrowing to a few ways to say it."""


class TrainingConfig(BaseModel):
    """How long, how fast and where a captioner is trained."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    epochs: int = Field(default=20, ge=1, le=1_000_000)
    patience: int = Field(default=3, ge=1, le=1_000_000)
    """Epochs without a better dev loss after which training stops."""
    batch_size: int = Field(default=64, ge=1, le=1_000_000)
    """Captions a batch."""
    order: Order = "captions"
    """``photos`` puts all captions of a photo into one batch: its features are read and projected once an epoch."""
    learning_rate: float = Field(default=1e-3, gt=0, allow_inf_nan=False)
    schedule: Literal["constant", "cosine"] = "constant"
    """``cosine`` lowers the learning rate from step to step, to zero at the end of ``epochs``."""
    clip_norm: float = Field(default=5.0, gt=0, allow_inf_nan=False)
    """The gradient's norm is cut to this."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """How much of a target's probability the loss that is minimised spreads over the vocabulary; the losses reported
    are without it."""
    weight_decay: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    average: float = Field(default=0.0, ge=0, lt=1)
    """Above 0 the captioner is the mean of the weights over the steps so far, each counted so much less than the one
    after it; dev loss is of that mean."""
    precision: Precision = "auto"
    device: str = "auto"
    keep: int = Field(default=1, ge=1, le=1_000_000)
    """How many of the last improvements stay on disk; one more while an older state may need it."""
    save_steps: int = Field(default=1000, ge=1, le=1_000_000_000)
    """Within an epoch of more steps the state is saved each time so many are done: what a kill costs at most."""
    self_critical: SelfCriticalConfig = SelfCriticalConfig()


def choose_device(name: str) -> torch.device:
    """The device that a setting names; ``auto`` is CUDA where it is.

    Of the processes of torchrun on a machine, each has a GPU of its own.

    Raises:
        InputError: a device that is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if place().count > 1 and name.startswith("cuda"):
        if name != "cuda":
            raise InputError(f"training.device = '{name}': torchrun gives each process a GPU of its own; use 'cuda'")
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    if not re.fullmatch(r"cpu|cuda(:\d{1,3})?", name):
        raise InputError(f"training.device = '{name}': use 'auto', 'cpu', 'cuda' or 'cuda:0'")
    device = torch.device(name)
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise InputError(f"training.device = '{name}': {count} CUDA devices are here; use 'auto' or 'cpu'")
    return device
