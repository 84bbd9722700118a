"""The cross-entropy objective: learn to predict the next word of reference captions; the lowest dev loss is best."""

import copy
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from capexp.captioning.decoder import RecurrentDecoder
from capexp.captioning.evaluation import Loss
from capexp.settings import TrainingConfig
from capexp.training.checkpoints import EpochProgress, TrainingState
from capexp.training.loop import DevStats, Epoch, Objective, Save, Training, TrainStats
from capexp.training.steps import Steps, choose_steps, learning_rate

_CHECK_STEPS = 100  # steps between two checks of the loss on a GPU


class CrossEntropy(Objective):
    """Teacher forcing. With ``training.average`` the EMA of the weights is evaluated and saved."""

    section, batch_setting = "training", "training.batch_size"

    def __init__(
        self, training: Training, make_steps: Callable[[Training, RecurrentDecoder], Steps] = choose_steps
    ) -> None:
        super().__init__(training)
        # With an EMA, the captioner's decoder has the EMA weights, and the steps train a copy of it.
        decoder = training.decoder
        self._decoder = copy.deepcopy(decoder) if training.config.average else decoder
        self.steps = make_steps(training, self._decoder)

    @property
    def learning_rate(self) -> float:
        """The configured learning rate."""
        return self.training.config.learning_rate

    def is_done(self, history: Sequence[Epoch]) -> bool:
        """Return whether all epochs are done, or the last ``patience`` epochs were no improvements."""
        return is_done(history, self.training.config)

    def baseline(self) -> DevStats | None:
        """Return None: every first epoch is an improvement."""
        return None

    def train_epoch(
        self, number: int, progress: EpochProgress = EpochProgress(), save: Save = lambda progress: None
    ) -> TrainStats:
        """Train an epoch; the loss is the running mean in training mode."""
        training, steps, config = self.training, self.steps, self.training.config
        step_count, on_cpu = len(training.train), training.device.type == "cpu"
        self._decoder.train()
        start = time.perf_counter() - progress.seconds
        # Rank 0 has the sums of all ranks over the steps before an interruption.
        nats, targets_before = progress.sums if progress.steps and training.world.is_main else (0.0, 0.0)
        total, targets = torch.full((), nats, dtype=torch.float64, device=training.device), int(targets_before)
        # Dropout uses torch's global generator, whose state is restored afterwards for other code.
        with training.fork_rng():
            for number_of_step, step in enumerate(steps.of_epoch(number, progress.steps), start=progress.steps + 1):
                total.add_(step.loss, alpha=step.targets)
                targets += step.targets
                # Reading the loss on a GPU means waiting for the GPU, so it is not checked at each step.
                is_saved = number_of_step % config.save_steps == 0 and number_of_step < step_count
                is_checked = on_cpu or number_of_step % _CHECK_STEPS == 0 or is_saved or number_of_step == step_count
                if is_checked and training.world.is_main:
                    value = (step.mean if on_cpu else total).item()
                    if not math.isfinite(value):
                        raise self.diverged(f"the loss is {value} at step {number_of_step} of epoch {number}")
                if config.average:
                    self._update_average((number - 1) * step_count + number_of_step)
                if is_saved:
                    sums = tuple(training.world.sum(total.item(), targets))
                    save(EpochProgress(number_of_step, sums, time.perf_counter() - start))
        nats, all_targets = training.world.sum(total.item(), targets)
        return TrainStats(Loss(nats, int(all_targets)), learning_rate(config, number - 1))

    def evaluate(self) -> DevStats:
        """Return the dev loss."""
        return DevStats(self.training.dev_loss())

    def improves(self, new: DevStats, best: DevStats) -> bool:
        """Return whether the dev loss is lower."""
        return new.loss < best.loss

    def state_dict(self) -> dict[str, Any]:
        """Return the states of the trained decoder and its optimizer, and the EMA of the weights if there is one."""
        average = self.training.decoder.state_dict() if self.training.config.average else None
        optimizer = self.steps.optimizer.state_dict()
        return {"decoder": self._decoder.state_dict(), "optimizer": optimizer, "average": average}

    def load_state_dict(self, state: TrainingState) -> None:
        """Load a state to continue from."""
        self._decoder.load_state_dict(state.decoder)
        self.training.decoder.load_state_dict(state.average or state.decoder)
        self.steps.optimizer.load_other(state.optimizer)

    @torch.no_grad()
    def _update_average(self, steps: int) -> None:
        """Update the EMA with the weights after ``steps`` steps.

        The decay starts low and rises to ``training.average``, so that the EMA soon forgets the first weights.
        """
        decay = min(self.training.config.average, (1 + steps) / (10 + steps))
        averages: list[torch.Tensor] = list(self.training.decoder.parameters())
        weights: list[torch.Tensor] = list(self._decoder.parameters())
        torch._foreach_lerp_(averages, weights, 1 - decay)


def is_done(history: Sequence[Epoch], config: TrainingConfig) -> bool:
    """Return whether training ends after these epochs: all are done, or the last ``patience`` were no improvements."""
    if len(history) >= config.epochs:
        return True
    best = max((epoch.number for epoch in history if epoch.improved), default=0)
    return len(history) - best >= config.patience
