"""One pass over the train captions: its steps, and what is told of it."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from capexp.captioning.decoder import Decoder, RecurrentDecoder
from capexp.captioning.evaluation import Loss, cross_entropy
from capexp.data.batches import CaptionBatches
from capexp.distributed import ALONE, Ranks
from capexp.errors import InputError
from capexp.training.checkpoints import Progress
from capexp.training.steps import Steps

_UNSEEN = 100  # steps that a GPU does before its loss is looked at
_BEGINNING = Progress()
Save = Callable[[Progress], None]
"""Puts on disk how far an epoch is."""


@dataclass(frozen=True)
class Epoch:
    """One pass over the train captions; in the self-critical phase over the train photos. Losses are nats per token."""

    number: int
    """From 1."""
    train_loss: float
    """Running mean over the epoch in training mode (dropout on), as Keras reports it; in the self-critical phase of the
    captions drawn."""
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


def train_epoch(
    steps: Steps,
    average: RecurrentDecoder,
    seed: int,
    number: int,
    ranks: Ranks = ALONE,
    progress: Progress = _BEGINNING,
    save: Save = lambda progress: None,
) -> Loss:
    """One pass over the batches of epoch ``number``: the running mean of the loss in training mode, in nats.

    ``average`` is the decoder that holds the mean of the weights, or that of the steps itself where there is none. Of
    several processes each gives its share of every batch. The pass goes on after ``progress``, and tells ``save`` how
    far it is as often as the configuration says.

    Raises:
        InputError: the loss is not finite any more.
    """
    decoder, config, count, on_cpu = steps.decoder, steps.config, len(steps.batches), steps.device.type == "cpu"
    decoder.train()
    start = time.perf_counter() - progress.seconds
    before, done = progress.sums if progress.steps and ranks.is_first else (0.0, 0.0)
    total, targets = torch.full((), before, dtype=torch.float64, device=steps.device), int(done)
    # Dropout draws from torch's global generator: put back for whoever else uses it.
    with torch.random.fork_rng():
        for number_of_step, step in enumerate(steps.of_epoch(seed, number, progress.steps), start=progress.steps + 1):
            total.add_(step.loss, alpha=step.targets)
            targets += step.targets
            # To look at a GPU's loss is to wait for it.
            is_saved = number_of_step % config.save_steps == 0 and number_of_step < count
            is_looked_at = on_cpu or number_of_step % _UNSEEN == 0 or is_saved or number_of_step == count
            if is_looked_at and ranks.is_first and not math.isfinite(value := (step.whole if on_cpu else total).item()):
                raise InputError(
                    f"the loss is {value} at step {number_of_step} of epoch {number}; the best captioner before it is "
                    f"kept: lower training.learning_rate = {config.learning_rate}"
                )
            if average is not decoder:
                _average(average, decoder, config.average, (number - 1) * count + number_of_step)
            if is_saved:
                sums = tuple(ranks.add(total.item(), targets))
                save(Progress(number_of_step, sums, time.perf_counter() - start))
    nats, all_targets = ranks.add(total.item(), targets)
    return Loss(nats, int(all_targets))


def shared_cross_entropy(decoder: Decoder, batches: CaptionBatches, ranks: Ranks) -> float:
    """The loss in evaluation mode in nats per token, of which each process computes a share."""
    own = cross_entropy(decoder, batches.in_order(rank=ranks.rank, ranks=ranks.count))
    total, targets = ranks.add(own.total, own.targets)
    return total / targets


@torch.no_grad()
def _average(average: RecurrentDecoder, decoder: RecurrentDecoder, share: float, steps: int) -> None:
    """Takes the weights after so many steps into their mean; the first steps, far off still, are soon forgotten."""
    share = min(share, (1 + steps) / (10 + steps))
    torch._foreach_lerp_(list(average.parameters()), list(decoder.parameters()), 1 - share)
