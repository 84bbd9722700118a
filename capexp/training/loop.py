"""The one training loop: an objective trains epoch after epoch, improvements and states are saved, epochs yielded."""

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch

from capexp.captioning.bundle import TrainingRecord
from capexp.captioning.captioner import Captioner
from capexp.captioning.decoder import RecurrentDecoder
from capexp.captioning.evaluation import Loss, cross_entropy
from capexp.data.batches import CaptionBatches
from capexp.distributed import ALONE, World, use_bfloat16
from capexp.errors import InputError
from capexp.settings import TrainingConfig
from capexp.training.checkpoints import Checkpoints, EpochProgress, TrainingState

Save = Callable[[EpochProgress], None]
"""Saves the training state in the middle of an epoch."""


@dataclass(frozen=True)
class Training:
    """All that decides what a training does: who learns from what, how, where, and with which ranks."""

    captioner: Captioner
    train: CaptionBatches
    dev: CaptionBatches
    config: TrainingConfig
    seed: int
    device: torch.device
    world: World = ALONE

    @property
    def decoder(self) -> RecurrentDecoder:
        """The captioner's decoder, which is evaluated and saved; with ``training.average`` it holds the EMA weights."""
        decoder = self.captioner.decoder
        assert isinstance(decoder, RecurrentDecoder), "an ensemble is not trained as one"
        return decoder

    def autocast(self) -> torch.autocast:
        """Return the context in which matrix products have the precision of the settings."""
        is_lower = use_bfloat16(self.device, self.config.precision)
        return torch.autocast(self.device.type, torch.bfloat16, enabled=is_lower)

    def fork_rng(self) -> AbstractContextManager[None]:
        """Return the context after which torch's random generators are as before."""
        forked: AbstractContextManager[None] = torch.random.fork_rng(
            [self.device] if self.device.type == "cuda" else []
        )
        return forked

    def dev_loss(self) -> float:
        """Return the dev loss in evaluation mode, in nats per token; each rank computes a shard."""
        shard = cross_entropy(self.decoder, self.dev.in_order(world=self.world))
        total, targets = self.world.sum(shard.total, shard.targets)
        return total / targets


@dataclass(frozen=True)
class Epoch:
    """One pass over the train captions; in the self-critical phase over the train photos. Losses are nats per token."""

    number: int
    """From 1."""
    train_loss: float
    """Running mean over the epoch in training mode (dropout on), as Keras reports it; in the self-critical phase of the
    sampled captions."""
    dev_loss: float
    """After the epoch, in evaluation mode, never smoothed."""
    learning_rate: float
    """At the epoch's first step."""
    seconds: float
    """Of training and evaluation together."""
    tokens_per_second: float
    """Train targets by seconds of training."""
    improved: bool
    """Whether it is better than all epochs before it, by the objective's measure."""
    ended_at: int
    """Milliseconds since 1970."""
    reward: float | None = None
    """Self-critical phase: mean CIDEr-D (times ten) of the sampled captions, EOS counted as a word."""
    dev_cider: float | None = None
    """Self-critical phase: CIDEr-D of the dev captions after the epoch."""


@dataclass(frozen=True)
class Update:
    """An epoch that has ended, and the run that it belongs to."""

    run: str
    """The run's label among several ("seed 3"); empty where it is alone."""
    epoch: Epoch


@dataclass(frozen=True)
class TrainStats:
    """An epoch of training."""

    loss: Loss
    """Over the targets of all ranks."""
    learning_rate: float
    """At the first step."""
    reward: float | None = None


@dataclass(frozen=True)
class DevStats:
    """A captioner on the dev split."""

    loss: float
    """In nats per token."""
    cider: float | None = None


class Objective(ABC):
    """What a training minimises or maximises: how an epoch is trained and evaluated, and what is an improvement."""

    section: ClassVar[str]
    """The settings' section that holds its learning rate, by dotted name."""
    batch_setting: ClassVar[str]
    """The setting that decides how much memory a step takes."""

    def __init__(self, training: Training) -> None:
        self.training = training
        training.decoder.to(training.device)

    @property
    @abstractmethod
    def learning_rate(self) -> float:
        """The learning rate of the settings."""

    @abstractmethod
    def is_done(self, history: Sequence[Epoch]) -> bool:
        """Return whether no epoch follows these."""

    @abstractmethod
    def baseline(self) -> DevStats | None:
        """Return the statistics that the first epoch must improve on; None where any is an improvement."""

    @abstractmethod
    def train_epoch(
        self, number: int, progress: EpochProgress = EpochProgress(), save: Save = lambda progress: None
    ) -> TrainStats:
        """Train epoch ``number``, from 1, on from ``progress``; call ``save`` every ``training.save_steps`` steps."""

    @abstractmethod
    def evaluate(self) -> DevStats:
        """Evaluate the captioner on the dev split."""

    @abstractmethod
    def improves(self, new: DevStats, best: DevStats) -> bool:
        """Return whether an epoch is better than the best before it."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Return ``decoder``, ``optimizer`` and, with an EMA of the weights, ``average``: fields of TrainingState."""

    @abstractmethod
    def load_state_dict(self, state: TrainingState) -> None:
        """Continue from a state; RuntimeError or ValueError where it is of other parameters."""

    def diverged(self, what: str) -> InputError:
        """Return the error that ends a training whose values are not finite any more."""
        return InputError(
            f"{what}; the best captioner before it is kept: lower {self.section}.learning_rate = {self.learning_rate}"
        )


def fit(
    training: Training, objective: Objective, checkpoints: Checkpoints | None, before: Sequence[Epoch] = ()
) -> Generator[Epoch, None, None]:
    """Train a captioner; yield each epoch when its checkpoint is on disk.

    Where ``checkpoints`` holds the state of an earlier call, the epochs done then are yielded again, from their
    record, and training goes on after them, or within the next: the caller sees the same sequence either way. All that
    is random follows from seed, epoch and step, so a stopped and resumed training gives the losses of an undisturbed
    one, on the CPU bit for bit. On a GPU it does only if both sessions use the same kind of steps: captured steps draw
    other dropout masks than packed ones.

    ``before`` are the epochs of an earlier phase, whose best captioner this one begins with; its checkpoints are in a
    folder of their own. All ranks call this and get the same epochs; rank 0 alone has ``checkpoints``.
    """
    world = training.world
    if training.device.type == "cuda":
        training.dev.preload(training.device)
    history, progress = list(before), EpochProgress()

    def save(progress: EpochProgress) -> None:
        if checkpoints is not None:
            records = [vars(epoch) for epoch in history]
            checkpoints.save_state(TrainingState(**objective.state_dict(), history=records, progress=progress))

    # Go on from the state on disk, or begin.
    state = world.broadcast(lambda: _latest_state(checkpoints))
    if state is None:
        best = objective.baseline()
        if before:
            if checkpoints is not None:
                checkpoints.save_captioner(training.captioner)
            save(progress)
    else:
        history, progress, best = _resume(training, objective, TrainingState.of(state), checkpoints, before)
        yield from history[len(before) :]

    while not objective.is_done(history):
        number = len(history) + 1
        start = time.perf_counter() - progress.seconds
        try:
            train = objective.train_epoch(number, progress, save)
            middle = time.perf_counter()
            dev = objective.evaluate()
        except torch.OutOfMemoryError:
            raise InputError(
                f"{training.device} has too little memory; lower {objective.batch_setting}, "
                "or set training.device = 'cpu'"
            ) from None
        if world.is_main and not math.isfinite(dev.loss):
            raise objective.diverged(f"the dev loss is {dev.loss} after epoch {number}")
        epoch = Epoch(
            number=number,
            train_loss=train.loss.per_token,
            dev_loss=dev.loss,
            learning_rate=train.learning_rate,
            seconds=time.perf_counter() - start,
            tokens_per_second=train.loss.targets / (middle - start),
            improved=best is None or objective.improves(dev, best),
            ended_at=time.time_ns() // 1_000_000,
            reward=train.reward,
            dev_cider=dev.cider,
        )
        history.append(epoch)
        if epoch.improved:
            best = dev
            training.captioner.record = TrainingRecord(
                epoch=number, train_loss=epoch.train_loss, dev_loss=dev.loss, dev_digest=training.dev.split.digest()
            )
            if checkpoints is not None:
                checkpoints.save_captioner(training.captioner)
        progress = EpochProgress()
        save(progress)
        yield epoch


def _latest_state(checkpoints: Checkpoints | None) -> dict[str, Any] | None:
    state = None if checkpoints is None else checkpoints.go_back()
    return None if state is None else asdict(state)


def _resume(
    training: Training,
    objective: Objective,
    state: TrainingState,
    checkpoints: Checkpoints | None,
    before: Sequence[Epoch],
) -> tuple[list[Epoch], EpochProgress, DevStats | None]:
    """Load a state; return the epochs done, the progress within the next one, and the best statistics so far."""
    where = "the state" if checkpoints is None else str(checkpoints.folder)
    try:
        history = [Epoch(**record) for record in state.history]
        if training.world.is_main and history[: len(before)] != list(before):
            raise InputError(
                f"{where}: self-critical training began after fewer epochs; delete the folder to do without what it did"
            )
        improvements = [epoch for epoch in history[len(before) :] if epoch.improved]
        if improvements:
            best: DevStats | None = DevStats(improvements[-1].dev_loss, improvements[-1].dev_cider)
        else:
            best = objective.baseline()  # of the captioner that this phase began with
        objective.load_state_dict(state)
    except InputError:
        raise
    except (RuntimeError, TypeError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"{where}: the state does not fit the settings ({reason}); restore both, or train anew"
        ) from None
    return history, state.progress, best
