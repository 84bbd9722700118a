"""The steps of teacher forcing: forward, backward and update for one batch after another.

Shapes: N photos, K captions per photo, B captions, M targets, T steps of the longest caption, H hidden.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from capexp.captioning.decoder import Decoder, RecurrentDecoder
from capexp.data.batches import on_device
from capexp.settings import SelfCriticalConfig, TrainingConfig
from capexp.training.graphs import Graphs
from capexp.training.loop import Training
from capexp.training.optimizer import AdamW

_PADDING_LIMIT = 5
"""The limit of padded batches' words (padding included) per real word. At or above it batches are packed.

Flickr8k has 2 to 3.
"""


@dataclass(frozen=True)
class Step:
    """The losses of a step, as tensors on the device. Read them before the next step, which may overwrite them."""

    loss: Tensor
    """The mean over this rank's targets before the update, in nats per target."""
    targets: int
    """The number of this rank's targets."""
    mean: Tensor
    """The mean over the targets of all ranks, in nats per target."""


class Steps(ABC):
    """The base class of the two kinds of steps, packed and captured."""

    def __init__(
        self,
        training: Training,
        decoder: RecurrentDecoder,
        rate: Tensor | None = None,
        capturable: bool = False,
    ) -> None:
        """``decoder`` is the decoder to train.

        ``rate`` is the learning rate as a tensor, if the optimizer must read it on the device. ``capturable`` is for an
        optimizer whose steps are captured in a CUDA graph.
        """
        self.training, self.decoder = training, decoder
        self.optimizer = AdamW(
            [value for value in decoder.parameters() if value.requires_grad],
            lr=training.config.learning_rate if rate is None else rate,
            eps=1e-7,  # Keras's default
            weight_decay=training.config.weight_decay,
            fused=True,
            capturable=capturable,
        )

    @abstractmethod
    def of_epoch(self, number: int, done: int = 0) -> Iterator[Step]:
        """Yield the steps of an epoch without the first ``done``; each step is computed when it is requested."""

    def rate(self, number: int, step: int) -> float:
        """Return the learning rate of a step of an epoch; both are counted from 1."""
        return learning_rate(self.training.config, number - 1 + (step - 1) / len(self.training.train))


class PackedSteps(Steps):
    """Steps on packed batches, which have no padding and are prefetched; each rank takes its shard."""

    def __init__(self, training: Training, decoder: RecurrentDecoder) -> None:
        super().__init__(training, decoder)

    def of_epoch(self, number: int, done: int = 0) -> Iterator[Step]:
        """Yield the steps, as :meth:`Steps.of_epoch`."""
        training, world, vocabulary = self.training, self.training.world, self.decoder.vocabulary
        config, device, seed = training.config, training.device, training.seed
        for step, host_batch in enumerate(training.train.epoch(seed, number, world, done), start=done + 1):
            seed_step(seed, number, step, world.rank)
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate(number, step)
            batch = host_batch.to(device)
            with training.autocast():
                outputs = self.decoder.outputs(batch.features, batch.photos, batch.words, batch.counts)  # (M, H)
                loss, smoothed = vocabulary.cross_entropy(outputs, batch.targets, config.label_smoothing)
            self.optimizer.zero_grad()
            torch.autograd.backward(smoothed * batch.share)
            mean = world.sum_gradients(self.decoder, loss * batch.share)
            # On the CPU, do not update with a loss that is not finite. On a GPU, reading the loss would mean waiting.
            if device.type != "cpu" or math.isfinite(mean.item()):
                clip(self.decoder, config.clip_norm)
                self.optimizer.step()
            yield Step(loss, len(outputs) if batch.share else 0, mean)


class CapturedSteps(Steps):
    """Steps on padded batches, on a GPU that holds all captions and features; steps are replayed as CUDA graphs.

    A captured step has fixed shapes. So every photo is padded to the largest number of captions per photo, and the
    length of the captions is rounded up to one of a few lengths. The decoder reads the padding, but the loss does not
    count it. There is one graph per length.

    Each rank takes its shard of every batch, and the all-reduce is part of the graph. NCCL requires that all ranks
    capture and replay it together. So the length is that of the longest caption of all ranks.

    On other devices the same steps run without graphs.
    """

    def __init__(self, training: Training, decoder: RecurrentDecoder) -> None:
        device, config, batches = training.device, training.config, training.train
        self._rate = torch.full((), config.learning_rate, device=device)
        self._graphs = Graphs(device)
        super().__init__(training, decoder, self._rate, capturable=self._graphs.is_used)
        self._batches = batches.padded(device)
        # Overwritten in place, because graphs read from fixed addresses:
        self._epoch = self._batches.epoch(0, 0, training.world)
        self._rates = torch.empty(len(batches), device=device)
        self._next = torch.zeros(1, dtype=torch.int64, device=device)
        self._loss, self._mean = torch.zeros((), device=device), torch.zeros((), device=device)

    def of_epoch(self, number: int, done: int = 0) -> Iterator[Step]:
        """Yield the steps, as :meth:`Steps.of_epoch`."""
        seed, device, world = self.training.seed, self.training.device, self.training.world
        epoch = self._batches.epoch(seed, number, world)
        self._epoch.views.copy_(epoch.views)
        self._epoch.captions.copy_(epoch.captions)
        self._epoch.shares.copy_(epoch.shares)
        rates = [self.rate(number, step) for step in range(1, len(epoch.targets) + 1)]
        self._rates.copy_(on_device(torch.tensor(rates), device))
        self._next.fill_(done)
        seeds = np.random.SeedSequence([seed, number, world.rank]).generate_state(len(rates), np.uint64).tolist()
        for step in range(done, len(rates)):
            self._graphs.generator.manual_seed(seeds[step])
            length = rounded_length(epoch.lengths[step], self._batches.longest)
            self._graphs.run(length, partial(self._work, length), release=self.optimizer.zero_grad)
            yield Step(self._loss, epoch.targets[step], self._mean)

    def _work(self, length: int) -> None:
        """Compute the next step of the epoch, of captions with at most ``length`` inputs."""
        epoch = self._epoch.views, self._epoch.captions, self._epoch.shares, self._rates
        views, captions, share, rate = (rows.index_select(0, self._next).squeeze(0) for rows in epoch)
        self._rate.copy_(rate)
        features, words, targets, real = self._batches.gather(views, captions, length)
        with self.training.autocast():
            outputs = padded_outputs(self.decoder, features, words, length)  # (M, H)
            loss, smoothed = self.decoder.vocabulary.cross_entropy(
                outputs, targets, self.training.config.label_smoothing, real
            )
        self.optimizer.zero_grad()
        torch.autograd.backward(smoothed * share)
        mean = self.training.world.sum_gradients(self.decoder, loss * share)
        clip(self.decoder, self.training.config.clip_norm)
        self.optimizer.step()
        self._loss.copy_(loss)
        self._mean.copy_(mean)
        self._next.add_(1)


def padded_outputs(decoder: RecurrentDecoder, features: Tensor, words: Tensor, length: int) -> Tensor:
    """Return the outputs ``(M, H)`` for padded words ``(M,)``, M = T * B, with as many captions for each photo."""
    captions = len(words) // length  # B
    state = decoder.start(features).repeat(captions // len(features))
    return decoder.read(state, words, (captions,) * length)[0]


def rounded_length(length: int, longest: int) -> int:
    """Round a length up, to at most four different lengths between two powers of two, and not above ``longest``.

    Each length needs a graph of its own.
    """
    unit = max(2, 1 << max(length.bit_length() - 3, 0))
    return min(-(-length // unit) * unit, longest)


def choose_steps(training: Training, decoder: RecurrentDecoder) -> Steps:
    """Return the fastest steps: captured ones if the GPU of every rank holds the features; else packed ones.

    Steps are also packed if padded batches would have five or more words, padding included, per real word. That happens
    if the lengths of captions, or the numbers of captions per photo, differ a lot.
    """
    return (CapturedSteps if can_pad(training) else PackedSteps)(training, decoder)


def can_pad(training: Training, photos: int | None = None) -> bool:
    """Return whether the GPU of every rank holds the features, and padded batches do not consist mostly of padding.

    ``photos`` is as in :meth:`capexp.data.batches.CaptionBatches.padding`.
    """
    batches, device, world = training.train, training.device, training.world
    if device.type != "cuda":
        return False
    (preloaded,) = world.sum(batches.preload(device))  # all ranks must take the same kind of steps
    return preloaded == world.size and batches.padding(photos) < _PADDING_LIMIT


def seed_step(seed: int, number: int, step: int, rank: int) -> None:
    """Seed torch's generators for a step of an epoch on one rank."""
    (value,) = np.random.SeedSequence([seed, number, step, rank]).generate_state(1, np.uint64)
    # torch.manual_seed also keeps a stack trace for a GPU that is not in use, which takes longer than all of this.
    torch.default_generator.manual_seed(int(value))
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(int(value))


def clip(decoder: Decoder, most: float) -> None:
    """Scale the gradients down to the norm ``most`` if their norm is larger."""
    parameters = [value for value in decoder.parameters() if value.grad is not None]
    norm = nn.utils.get_total_norm([value.grad for value in parameters if value.grad is not None])
    if norm.device.type != "cpu" or norm > most:  # a GPU's norm is not read: that would mean waiting
        nn.utils.clip_grads_with_norm_(parameters, most, norm)


def learning_rate(config: TrainingConfig | SelfCriticalConfig, epochs_done: float) -> float:
    """Return the learning rate after ``epochs_done`` epochs, which need not be a whole number."""
    if config.schedule == "constant":
        return config.learning_rate
    return config.learning_rate * (1 + math.cos(math.pi * min(epochs_done / config.epochs, 1.0))) / 2
