"""The training loop: teacher forcing, dev loss watched, one ``Epoch`` yielded after another.

Shapes: M targets, H hidden.
"""

import copy
import math
import os
import re
import time
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from capexp.captioning.captioner import Captioner, TrainingRecord
from capexp.captioning.decoder import Decoder, RecurrentDecoder
from capexp.data.batches import CaptionBatches, Order
from capexp.data.errors import InputError
from capexp.data.features import Precision, use_bfloat16
from capexp.scoring.evaluation import Loss, cross_entropy
from capexp.training.checkpoints import Checkpoints, TrainingState
from capexp.training.ranks import ALONE, Ranks, place

_UNSEEN = 100  # steps that a GPU does before its loss is looked at


class SelfCriticalConfig(BaseModel):
    """The second phase, on the captions' scores: see :mod:`capexp.training.self_critical`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    epochs: int = Field(default=0, ge=0, le=1_000_000)
    """0: there is none."""
    learning_rate: float = Field(default=5e-5, gt=0, allow_inf_nan=False)
    photos: int = Field(default=25, ge=1, le=1_000_000)
    """A batch."""
    samples: int = Field(default=5, ge=2, le=1000)
    """Captions drawn of a photo."""


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
    self_critical: SelfCriticalConfig = SelfCriticalConfig()


@dataclass(frozen=True)
class Epoch:
    """One pass over the train captions; in the self-critical phase over the train photos. Losses are nats per token."""

    number: int
    """From 1."""
    train_loss: float
    """Running mean over the epoch in training mode (dropout on), as Keras reports it; in the self-critical phase of the
    captions drawn, without dropout."""
    dev_loss: float
    """After the epoch, in evaluation mode, never smoothed."""
    learning_rate: float
    """At the epoch's first step."""
    seconds: float
    """Of training and dev loss together."""
    tokens_per_second: float
    """Train targets by seconds of training."""
    improved: bool
    ended_at: int
    """Milliseconds since 1970."""
    reward: float | None = None
    """Of the self-critical phase: mean CIDEr-D, times ten, of the captions drawn, their end counted as a word."""
    dev_cider: float | None = None
    """Of the self-critical phase: CIDEr-D of the dev captions after the epoch."""


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


def fit(
    captioner: Captioner,
    train: CaptionBatches,
    dev: CaptionBatches,
    config: TrainingConfig,
    *,
    seed: int,
    device: torch.device,
    dev_digest: str,
    checkpoints: Checkpoints,
    ranks: Ranks = ALONE,
) -> Generator[Epoch, None, None]:
    """Trains a captioner; yields each epoch when its checkpoint is on disk.

    Where ``checkpoints`` holds the state of an earlier call, the epochs it had done are yielded again, from
    their record, and training goes on after them: the caller sees the same sequence either way. The order of
    the captions and the dropout masks of an epoch follow from seed and epoch number alone, so a stopped and
    resumed training gives the losses of an undisturbed one.

    Of several processes all call this and get the same epochs; the first alone has a folder, and reads and writes it.
    What they come to is what one comes to, but for rounding and the dropout masks, which each draws for its own share.

    Raises:
        InputError: the loss is not finite any more, or the GPU's memory does not suffice.
    """
    decoder = captioner.decoder.to(device)
    assert isinstance(decoder, RecurrentDecoder), "an ensemble is not trained as one"
    trained = copy.deepcopy(decoder) if config.average else decoder
    optimizer = torch.optim.AdamW(
        [value for value in trained.parameters() if value.requires_grad],
        lr=config.learning_rate,
        eps=1e-7,  # Keras's value
        weight_decay=config.weight_decay,
        fused=True,
    )
    if device.type == "cuda":
        train.hold(device)
        dev.hold(device)
    history: list[Epoch] = []
    state = state_of_first(checkpoints, ranks)
    if state is not None:
        try:
            trained.load_state_dict(state.decoder)
            decoder.load_state_dict(state.average or state.decoder)
            optimizer.load_state_dict(state.optimizer)
            history = [Epoch(**record) for record in state.history]
        except (RuntimeError, TypeError, ValueError, KeyError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(
                f"{checkpoints.folder}: the state does not fit the settings ({reason}); restore both, or train anew"
            ) from None
        yield from history
    best = min((epoch.dev_loss for epoch in history), default=float("inf"))
    while not is_finished(history, config):
        number = len(history) + 1
        start = time.perf_counter()
        try:
            train_loss = train_epoch(trained, decoder, optimizer, train, config, seed, number, device, ranks)
            middle = time.perf_counter()
            dev_loss = shared_cross_entropy(decoder, dev, ranks)
        except torch.OutOfMemoryError:
            raise InputError(
                f"{device} has too little memory for training.batch_size = {config.batch_size}; "
                "lower training.batch_size, or set training.device = 'cpu'"
            ) from None
        if ranks.is_first and not math.isfinite(dev_loss):
            raise InputError(
                f"the dev loss is {dev_loss} after epoch {number}; the best captioner before it is kept: "
                f"lower training.learning_rate = {config.learning_rate}"
            )
        epoch = Epoch(
            number=number,
            train_loss=train_loss.per_token,
            dev_loss=dev_loss,
            learning_rate=_learning_rate(config, number - 1),
            seconds=time.perf_counter() - start,
            tokens_per_second=train_loss.targets / (middle - start),
            improved=dev_loss < best,
            ended_at=time.time_ns() // 1_000_000,
        )
        history.append(epoch)
        if epoch.improved:
            best = dev_loss
            captioner.training = TrainingRecord(
                epoch=number, train_loss=epoch.train_loss, dev_loss=dev_loss, dev_digest=dev_digest
            )
            if ranks.is_first:
                checkpoints.save_captioner(captioner)
        if ranks.is_first:
            checkpoints.save_state(
                TrainingState(
                    trained.state_dict(),
                    optimizer.state_dict(),
                    [vars(past) for past in history],
                    decoder.state_dict() if config.average else None,
                )
            )
        yield epoch


def state_of_first(checkpoints: Checkpoints, ranks: Ranks) -> TrainingState | None:
    """The state that the first process goes on from; the others are sent it."""

    def record() -> dict[str, Any] | None:
        state = checkpoints.go_back()
        return None if state is None else vars(state)

    held = ranks.from_first(record)
    return None if held is None else TrainingState(**held)


def is_finished(history: list[Epoch], config: TrainingConfig) -> bool:
    """Whether training ends after these epochs: all are done, or patience is at its end."""
    if len(history) >= config.epochs:
        return True
    best = max((epoch.number for epoch in history if epoch.improved), default=0)
    return len(history) - best >= config.patience


def train_epoch(
    decoder: RecurrentDecoder,
    average: RecurrentDecoder,
    optimizer: torch.optim.Optimizer,
    batches: CaptionBatches,
    config: TrainingConfig,
    seed: int,
    number: int,
    device: torch.device,
    ranks: Ranks = ALONE,
) -> Loss:
    """One pass over the batches of epoch ``number``: the running mean of the loss in training mode, in nats.

    ``average`` is the decoder that holds the mean of the weights, or ``decoder`` itself where there is none. Of several
    processes each gives its share of every batch.

    Raises:
        InputError: the loss is not finite any more.
    """
    decoder.train()
    total, targets = torch.zeros((), dtype=torch.float64, device=device), 0
    # Dropout draws from torch's global generator: seeded for this epoch, and put back for whoever else uses it.
    with torch.random.fork_rng():
        torch.manual_seed(seed * 1_000_003 + number + ranks.rank * 2**52)
        for step, batch in enumerate(batches.epoch(seed, number, ranks.rank, ranks.count), start=1):
            for group in optimizer.param_groups:
                group["lr"] = _learning_rate(config, number - 1 + (step - 1) / len(batches))
            here = batch.to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=use_bfloat16(device, config.precision)):
                outputs = decoder.outputs(here.features, here.photos, here.words, here.counts)  # (M, H)
                loss, smoothed = decoder.vocabulary.cross_entropy(outputs, here.targets, config.label_smoothing)
            if batch.share:
                total += loss.double() * len(outputs)
                targets += len(outputs)
            optimizer.zero_grad()
            torch.autograd.backward(smoothed * batch.share)
            loss = ranks.add_gradients(decoder, loss * batch.share)
            # To look at a GPU's loss is to wait for it.
            is_looked_at = device.type == "cpu" or step % _UNSEEN == 0 or step == len(batches)
            if (
                is_looked_at
                and ranks.is_first
                and not math.isfinite(value := (loss if device.type == "cpu" else total).item())
            ):
                raise InputError(
                    f"the loss is {value} at step {step} of epoch {number}; the best captioner before it is kept: "
                    f"lower training.learning_rate = {config.learning_rate}"
                )
            clip(decoder, config.clip_norm)
            optimizer.step()
            if average is not decoder:
                _average(average, decoder, config.average, (number - 1) * len(batches) + step)
    nats, count = ranks.add(total.item(), targets)
    return Loss(nats, int(count))


def shared_cross_entropy(decoder: Decoder, batches: CaptionBatches, ranks: Ranks) -> float:
    """The loss in evaluation mode in nats per token, of which each process computes a share."""
    own = cross_entropy(decoder, batches.in_order(rank=ranks.rank, ranks=ranks.count))
    total, targets = ranks.add(own.total, own.targets)
    return total / targets


def clip(decoder: Decoder, most: float) -> None:
    """Cuts the gradient's norm to ``most``."""
    learnt = [value for value in decoder.parameters() if value.grad is not None]
    norm = nn.utils.get_total_norm([value.grad for value in learnt if value.grad is not None])
    if norm.device.type != "cpu" or norm > most:  # a GPU is not waited for
        nn.utils.clip_grads_with_norm_(learnt, most, norm)


@torch.no_grad()
def _average(average: RecurrentDecoder, decoder: RecurrentDecoder, share: float, steps: int) -> None:
    """Takes the weights after so many steps into their mean; the first steps, far off still, are soon forgotten."""
    share = min(share, (1 + steps) / (10 + steps))
    torch._foreach_lerp_(list(average.parameters()), list(decoder.parameters()), 1 - share)


def _learning_rate(config: TrainingConfig, epochs_done: float) -> float:
    """The learning rate when so many epochs, and parts of one, are done."""
    if config.schedule == "constant":
        return config.learning_rate
    return config.learning_rate * (1 + math.cos(math.pi * min(epochs_done / config.epochs, 1.0))) / 2
