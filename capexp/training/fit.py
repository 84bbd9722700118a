"""The training loop: teacher forcing, dev loss watched, one ``Epoch`` yielded after another."""

import copy
import math
import time
from collections.abc import Generator
from dataclasses import asdict
from typing import Any

import torch

from capexp.captioning.bundle import TrainingRecord
from capexp.captioning.captioner import Captioner
from capexp.captioning.decoder import RecurrentDecoder
from capexp.data.batches import CaptionBatches
from capexp.distributed import ALONE, Ranks
from capexp.errors import InputError
from capexp.training.checkpoints import Checkpoints, Progress, TrainingState
from capexp.training.config import TrainingConfig
from capexp.training.epoch import Epoch, shared_cross_entropy, train_epoch
from capexp.training.steps import learning_rate, steps_of


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
    their record, and training goes on after them, or within the next: the caller sees the same sequence either
    way. The order of the captions follows from seed and epoch number alone, the dropout masks of a step from these
    and its number, so a stopped and resumed training gives the losses of an undisturbed one. On a GPU it does where
    there is room for the features both times: steps that are captured draw other masks.

    Of several processes all call this and get the same epochs; the first alone has a folder, and reads and writes it.
    What they come to is what one comes to, but for rounding and the dropout masks, which each draws for its own share.

    Raises:
        InputError: the loss is not finite any more, or the GPU's memory does not suffice.
    """
    decoder = captioner.decoder.to(device)
    assert isinstance(decoder, RecurrentDecoder), "an ensemble is not trained as one"
    trained = copy.deepcopy(decoder) if config.average else decoder
    steps = steps_of(trained, train, config, device, ranks)
    if device.type == "cuda":
        dev.hold(device)
    history: list[Epoch] = []
    progress = Progress()

    def save(progress: Progress) -> None:
        if ranks.is_first:
            past, mean = [vars(epoch) for epoch in history], decoder.state_dict() if config.average else None
            checkpoints.save_state(
                TrainingState(trained.state_dict(), steps.optimizer.state_dict(), past, mean, progress)
            )

    state = state_of_first(checkpoints, ranks)
    if state is not None:
        try:
            trained.load_state_dict(state.decoder)
            decoder.load_state_dict(state.average or state.decoder)
            steps.load_optimizer(state.optimizer)
            history = [Epoch(**record) for record in state.history]
            progress = state.progress
        except (RuntimeError, TypeError, ValueError, KeyError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(
                f"{checkpoints.folder}: the state does not fit the settings ({reason}); restore both, or train anew"
            ) from None
        yield from history
    best = min((epoch.dev_loss for epoch in history), default=float("inf"))
    while not is_finished(history, config):
        number = len(history) + 1
        start = time.perf_counter() - progress.seconds
        try:
            train_loss = train_epoch(steps, decoder, seed, number, ranks, progress, save)
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
            learning_rate=learning_rate(config, number - 1),
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
        progress = Progress()
        save(progress)
        yield epoch


def state_of_first(checkpoints: Checkpoints, ranks: Ranks) -> TrainingState | None:
    """The state that the first process goes on from; the others are sent it."""

    def record() -> dict[str, Any] | None:
        state = checkpoints.go_back()
        return None if state is None else asdict(state)

    held = ranks.from_first(record)
    return None if held is None else TrainingState.of(held)


def is_finished(history: list[Epoch], config: TrainingConfig) -> bool:
    """Whether training ends after these epochs: all are done, or patience is at its end."""
    if len(history) >= config.epochs:
        return True
    best = max((epoch.number for epoch in history if epoch.improved), default=0)
    return len(history) - best >= config.patience
