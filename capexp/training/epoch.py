"""One pass over the train captions: its steps, and what is told of it.

Shapes: M targets, H hidden.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from capexp.captioning.decoder import Decoder, RecurrentDecoder
from capexp.data.batches import CaptionBatches
from capexp.data.errors import InputError
from capexp.data.features import use_bfloat16
from capexp.scoring.evaluation import Loss, cross_entropy
from capexp.training.checkpoints import Progress
from capexp.training.config import TrainingConfig
from capexp.training.ranks import ALONE, Ranks

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
    decoder: RecurrentDecoder,
    average: RecurrentDecoder,
    optimizer: torch.optim.Optimizer,
    batches: CaptionBatches,
    config: TrainingConfig,
    seed: int,
    number: int,
    device: torch.device,
    ranks: Ranks = ALONE,
    progress: Progress = _BEGINNING,
    save: Save = lambda progress: None,
) -> Loss:
    """One pass over the batches of epoch ``number``: the running mean of the loss in training mode, in nats.

    ``average`` is the decoder that holds the mean of the weights, or ``decoder`` itself where there is none. Of several
    processes each gives its share of every batch. The pass goes on after ``progress``, and tells ``save`` how far it is
    as often as the configuration says.

    Raises:
        InputError: the loss is not finite any more.
    """
    decoder.train()
    start = time.perf_counter() - progress.seconds
    before, done = progress.sums if progress.steps and ranks.is_first else (0.0, 0.0)
    total, targets = torch.tensor(before, dtype=torch.float64, device=device), int(done)
    # Dropout draws from torch's global generator: put back for whoever else uses it.
    with torch.random.fork_rng():
        left = batches.epoch(seed, number, ranks.rank, ranks.count, progress.steps)
        for step, batch in enumerate(left, start=progress.steps + 1):
            seed_step(seed, number, step, ranks.rank)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, number - 1 + (step - 1) / len(batches))
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
            is_saved = step % config.save_steps == 0 and step < len(batches)
            is_looked_at = device.type == "cpu" or step % _UNSEEN == 0 or is_saved or step == len(batches)
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
            if is_saved:
                sums = tuple(ranks.add(total.item(), targets))
                save(Progress(step, sums, time.perf_counter() - start))
    nats, count = ranks.add(total.item(), targets)
    return Loss(nats, int(count))


def seed_step(seed: int, number: int, step: int, rank: int) -> None:
    """Seeds torch's generators for what is drawn at random in a step of an epoch, by one of several processes."""
    (value,) = np.random.SeedSequence([seed, number, step, rank]).generate_state(1, np.uint64)
    torch.manual_seed(int(value))


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


def learning_rate(config: TrainingConfig, epochs_done: float) -> float:
    """The learning rate when so many epochs, and parts of one, are done."""
    if config.schedule == "constant":
        return config.learning_rate
    return config.learning_rate * (1 + math.cos(math.pi * min(epochs_done / config.epochs, 1.0))) / 2
