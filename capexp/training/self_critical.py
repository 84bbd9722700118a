"""The self-critical objective: sample captions, and make those with a high CIDEr-D more probable.

This is self-critical sequence training (Rennie et al., CVPR 2017) with a different baseline: not the reward of a greedy
caption, but the mean reward of the photo's other samples (Luo, 2020).
"""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from capexp.captioning.captioner import Captioner
from capexp.captioning.evaluation import Loss, caption_all
from capexp.data.captions import Split
from capexp.data.features import Features
from capexp.metrics.scores import score
from capexp.training.checkpoints import EpochProgress, TrainingState
from capexp.training.loop import DevStats, Epoch, Objective, Save, Training, TrainStats
from capexp.training.policy_steps import PolicySteps, choose_policy_steps


class SelfCritical(Objective):
    """REINFORCE with the CIDEr-D of sampled captions as reward; the best epoch has the highest dev CIDEr-D.

    Each rank samples and rewards the captions of its shard of every batch, with its own random seed. So results depend
    on the number of ranks. Only rank 0 decodes the dev captions.
    """

    section, batch_setting = "training.self_critical", "training.self_critical.photos"

    def __init__(
        self,
        training: Training,
        before: int,
        make_steps: Callable[[Training, int], PolicySteps] = choose_policy_steps,
    ) -> None:
        """``before`` is the number of epochs before this phase."""
        super().__init__(training)
        decoder = training.decoder
        decoder.load_state_dict(training.world.broadcast(decoder.state_dict))
        self._before = before
        self._settings = training.config.self_critical
        self.steps = make_steps(training, before)

    @property
    def learning_rate(self) -> float:
        """The configured learning rate."""
        return self._settings.learning_rate

    def is_done(self, history: Sequence[Epoch]) -> bool:
        """Return whether all epochs of this phase are done."""
        return len(history) >= self._before + self._settings.epochs

    def baseline(self) -> DevStats:
        """Return the dev CIDEr-D of the captioner that this phase starts from; only rank 0 needs that captioner."""
        return DevStats(math.nan, self._dev_cider())  # no loss: only CIDEr-D decides what is an improvement

    def evaluate(self) -> DevStats:
        """Return the dev loss and the dev CIDEr-D."""
        cider = self._dev_cider()
        return DevStats(self.training.dev_loss(), cider)

    def improves(self, new: DevStats, best: DevStats) -> bool:
        """Return whether the dev CIDEr-D is higher."""
        assert new.cider is not None and best.cider is not None
        return new.cider > best.cider

    def state_dict(self) -> dict[str, Any]:
        """Return the states of the decoder and the optimizer."""
        return {"decoder": self.training.decoder.state_dict(), "optimizer": self.steps.optimizer.state_dict()}

    def load_state_dict(self, state: TrainingState) -> None:
        """Load a state to continue from."""
        self.training.decoder.load_state_dict(state.decoder)
        self.steps.optimizer.load_other(state.optimizer)

    def train_epoch(
        self, number: int, progress: EpochProgress = EpochProgress(), save: Save = lambda progress: None
    ) -> TrainStats:
        """Train an epoch; return the loss of the sampled captions in nats per token, and their mean reward."""
        training, world = self.training, self.training.world
        start, count = time.perf_counter() - progress.seconds, self.steps.count
        is_resumed = progress.steps > 0 and world.is_main
        # The sums of a PolicyStep's values; after a resume, rank 0 begins with the saved sums.
        sums = np.array(progress.sums if is_resumed else (0.0, 0.0, 0.0, 0.0))
        with training.fork_rng():
            try:
                for step, result in enumerate(self.steps.of_epoch(number, progress.steps), start=progress.steps + 1):
                    sums += result
                    if step % training.config.save_steps == 0 and step < count:
                        save(EpochProgress(step, tuple(world.sum(*sums.tolist())), time.perf_counter() - start))
            except FloatingPointError as error:
                raise self.diverged(f"{error} in epoch {number}") from None
        nats, targets, rewards, captions = world.sum(*sums.tolist())
        return TrainStats(Loss(nats, int(targets)), self.steps.rate(number), rewards / captions)

    def _dev_cider(self) -> float:
        """Compute the dev CIDEr-D on rank 0 and broadcast it."""
        dev = self.training.dev
        return self.training.world.broadcast(lambda: dev_cider(self.training.captioner, dev.split, dev.features))


def dev_cider(captioner: Captioner, split: Split, features: Features) -> float:
    """Return the CIDEr-D, from 0 to 10, of a captioner's captions of a split, decoded with its own settings."""
    texts = [caption.text for caption in caption_all(captioner, features)]
    return score(texts, split.references, captioner.vocabulary.tokens).corpus()["cider"]
