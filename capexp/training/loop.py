"""The training loop: train and evaluate epoch by epoch with an objective, save checkpoints, yield the epochs."""

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
"""A function that saves the training state within an epoch."""


@dataclass(frozen=True)
class Training:
    """Everything that a training depends on: captioner, data, settings, seed, device and ranks."""

    captioner: Captioner
    train: CaptionBatches
    dev: CaptionBatches
    config: TrainingConfig
    seed: int
    device: torch.device
    world: World = ALONE

    @property
    def decoder(self) -> RecurrentDecoder:
        """The captioner's decoder, which is evaluated and saved; with ``training.average`` it has the EMA weights."""
        decoder = self.captioner.decoder
        assert isinstance(decoder, RecurrentDecoder), "an ensemble is not trained as one"
        return decoder

    def autocast(self) -> torch.autocast:
        """Return the context in which matrix products have the configured precision."""
        is_lower = use_bfloat16(self.device, self.config.precision)
        return torch.autocast(self.device.type, torch.bfloat16, enabled=is_lower)

    def fork_rng(self) -> AbstractContextManager[None]:
        """Return a context that restores torch's random generators at its end."""
        forked: AbstractContextManager[None] = torch.random.fork_rng(
            [self.device] if self.device.type == "cuda" else []
        )
        return forked

    def dev_loss(self) -> float:
        """Compute a shard of the dev loss on each rank; return the loss over all ranks, in nats per token."""
        shard = cross_entropy(self.decoder, self.dev.in_order(world=self.world))
        total, targets = self.world.sum(shard.total, shard.targets)
        return total / targets


@dataclass(frozen=True)
class Epoch:
    """The results of an epoch: one pass over the train captions, or in the self-critical phase over the train photos.

    Losses are in nats per token.
    """

    number: int
    """The number of the epoch, counted from 1 over both phases."""
    train_loss: float
    """The running mean over the epoch in training mode (dropout on), as Keras reports it. In the self-critical phase it
    is the loss of the sampled captions."""
    dev_loss: float
    """The loss on the dev split after the epoch, in evaluation mode and without label smoothing."""
    learning_rate: float
    """The learning rate at the first step of the epoch."""
    seconds: float
    """The duration of training and evaluation together."""
    tokens_per_second: float
    """Train targets per second of training; in the self-critical phase the targets are the sampled tokens."""
    improved: bool
    """Whether the epoch is better than all earlier ones of its phase, by the objective's measure."""
    ended_at: int
    """The time of its end, in milliseconds since 1970."""
    reward: float | None = None
    """In the self-critical phase: the mean CIDEr-D, from 0 to 10, of the sampled captions; EOS counts as a word."""
    dev_cider: float | None = None
    """In the self-critical phase: the CIDEr-D, from 0 to 10, of the dev captions after the epoch."""


@dataclass(frozen=True)
class Update:
    """A finished epoch, and the run that it belongs to."""

    run: str
    """The label of the run if it is one of several, such as "seed 3"; else empty."""
    epoch: Epoch


@dataclass(frozen=True)
class TrainStats:
    """The results of training for one epoch."""

    loss: Loss
    """The loss over the targets of all ranks."""
    learning_rate: float
    """The learning rate at the first step."""
    reward: float | None = None
    """In the self-critical phase: the reward, as in :class:`Epoch`."""


@dataclass(frozen=True)
class DevStats:
    """The results of evaluating a captioner on the dev split."""

    loss: float
    """The dev loss, in nats per token."""
    cider: float | None = None
    """In the self-critical phase: the CIDEr-D, from 0 to 10."""


class Objective(ABC):
    """What a training minimises or maximises: it trains and evaluates an epoch, and decides what is an improvement."""

    section: ClassVar[str]
    """The dotted name of the section of settings that holds its learning rate."""
    batch_setting: ClassVar[str]
    """The dotted name of the setting that determines the memory a step needs."""

    def __init__(self, training: Training) -> None:
        self.training = training
        training.decoder.to(training.device)

    @property
    @abstractmethod
    def learning_rate(self) -> float:
        """The configured learning rate."""

    @abstractmethod
    def is_done(self, history: Sequence[Epoch]) -> bool:
        """Return whether training ends after these epochs."""

    @abstractmethod
    def baseline(self) -> DevStats | None:
        """Return the results that the first epoch must improve on; None if every first epoch is an improvement."""

    @abstractmethod
    def train_epoch(
        self, number: int, progress: EpochProgress = EpochProgress(), save: Save = lambda progress: None
    ) -> TrainStats:
        """Train epoch ``number`` (from 1), starting at ``progress``; ``save`` every ``training.save_steps`` steps."""

    @abstractmethod
    def evaluate(self) -> DevStats:
        """Evaluate the captioner on the dev split."""

    @abstractmethod
    def improves(self, new: DevStats, best: DevStats) -> bool:
        """Return whether the results ``new`` are better than ``best``, the best ones so far."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Return fields of TrainingState: ``decoder``, ``optimizer`` and, with an EMA of the weights, ``average``."""

    @abstractmethod
    def load_state_dict(self, state: TrainingState) -> None:
        """Load a state to continue from; raise RuntimeError or ValueError if its parameters do not fit."""

    def diverged(self, what: str) -> InputError:
        """Return the error that ends a training whose values are no longer finite."""
        return InputError(
            f"{what}; the best captioner before it is kept: lower {self.section}.learning_rate = {self.learning_rate}"
        )


def fit(
    training: Training, objective: Objective, checkpoints: Checkpoints | None, before: Sequence[Epoch] = ()
) -> Generator[Epoch, None, None]:
    """Train a captioner; yield each epoch after its checkpoint is on disk.

    If ``checkpoints`` has a state of an earlier call, the finished epochs of that call are yielded again, from their
    records. Training continues after them, or within the next epoch. So the caller gets the same sequence of epochs as
    without the interruption.

    All random numbers follow from seed, epoch and step. So a training that is stopped and resumed gives the losses of
    an uninterrupted one, on the CPU bit for bit. On a GPU this needs the same kind of steps in both sessions, because
    captured steps sample different dropout masks from packed steps.

    ``before`` are the epochs of an earlier phase. This phase starts from that phase's best captioner, and has its own
    folder of checkpoints.

    All ranks call this function and get the same losses, but not the same seconds. Only rank 0 has ``checkpoints``.
    """
    world = training.world
    if training.device.type == "cuda":
        training.dev.preload(training.device)
    history, progress = list(before), EpochProgress()

    def save(progress: EpochProgress) -> None:
        if checkpoints is not None:
            records = [vars(epoch) for epoch in history]
            checkpoints.save_state(TrainingState(**objective.state_dict(), history=records, progress=progress))

    # Resume from the state on disk, or start from scratch.
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
            train_end = time.perf_counter()
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
            tokens_per_second=train.loss.targets / (train_end - start),
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
    """Return the newest usable state as a dictionary, if there is one, and delete newer files."""
    state = None if checkpoints is None else checkpoints.go_back()
    return None if state is None else asdict(state)


def _resume(
    training: Training,
    objective: Objective,
    state: TrainingState,
    checkpoints: Checkpoints | None,
    before: Sequence[Epoch],
) -> tuple[list[Epoch], EpochProgress, DevStats | None]:
    """Load a state; return the finished epochs, the progress within the next one, and the best results so far."""
    place = "the state" if checkpoints is None else str(checkpoints.folder)
    try:
        history = [Epoch(**record) for record in state.history]
        if training.world.is_main and history[: len(before)] != list(before):
            raise InputError(
                f"{place}: self-critical training began after fewer epochs; delete the folder to do without what it did"
            )
        improvements = [epoch for epoch in history[len(before) :] if epoch.improved]
        if improvements:
            best: DevStats | None = DevStats(improvements[-1].dev_loss, improvements[-1].dev_cider)
        else:
            best = objective.baseline()  # the results of the captioner with which this phase began
        objective.load_state_dict(state)
    except InputError:
        raise
    except (RuntimeError, TypeError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"{place}: the state does not fit the settings ({reason}); restore both, or start a new run"
        ) from None
    return history, state.progress, best
