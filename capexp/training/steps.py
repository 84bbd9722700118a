"""The steps of teacher forcing: batches read, differentiated and learnt from, one after another.

Shapes: N photos, K captions of each, B captions, M targets, T steps of the longest caption, H hidden.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from capexp.captioning.decoder import Decoder, RecurrentDecoder
from capexp.data.batches import CaptionBatches, on_device
from capexp.data.vgg16 import use_bfloat16
from capexp.distributed import ALONE, Ranks
from capexp.training.config import SelfCriticalConfig, TrainingConfig

_PADDED = 5
"""Words of rectangles for each real one. Flickr8k's captions, 64 or 128 a batch, make it 2 to 3."""


@dataclass(frozen=True)
class Step:
    """What a step has come to, on the device until it is looked at; to be looked at before the next step is taken."""

    loss: Tensor
    """Nats a target: the mean over this process's targets, before they were learnt from."""
    targets: int
    """Of this process."""
    whole: Tensor
    """The mean over the targets of all processes."""


class Steps(ABC):
    """How a decoder learns from the batches of an epoch."""

    def __init__(
        self,
        decoder: RecurrentDecoder,
        batches: CaptionBatches,
        config: TrainingConfig,
        device: torch.device,
        rate: float | Tensor,
        capturable: bool = False,
    ) -> None:
        self.decoder, self.batches, self.config, self.device = decoder, batches, config, device
        self.optimizer = torch.optim.AdamW(
            [value for value in decoder.parameters() if value.requires_grad],
            lr=rate,
            eps=1e-7,  # Keras's value
            weight_decay=config.weight_decay,
            fused=True,
            capturable=capturable,
        )

    @abstractmethod
    def of_epoch(self, seed: int, number: int, done: int = 0) -> Iterator[Step]:
        """Takes the steps of an epoch but those that are done, each as it is asked for."""

    def load_optimizer(self, state: dict[str, object]) -> None:
        """Goes on with the state of an optimizer, whichever way its steps were taken.

        Raises:
            ValueError: it is of other parameters.
        """
        own = [(group["lr"], group["capturable"]) for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state)
        for group, (rate, capturable) in zip(self.optimizer.param_groups, own, strict=True):
            group["lr"], group["capturable"] = rate, capturable

    def rate(self, number: int, step: int) -> float:
        """The learning rate of a step of an epoch, both from 1."""
        return learning_rate(self.config, number - 1 + (step - 1) / len(self.batches))

    def autocast(self) -> torch.autocast:
        """The precision that products of matrices are in."""
        is_lower = use_bfloat16(self.device, self.config.precision)
        return torch.autocast(self.device.type, torch.bfloat16, enabled=is_lower)


class PackedSteps(Steps):
    """Batches without padding, each put together ahead of need; of several processes each takes its share."""

    def __init__(
        self,
        decoder: RecurrentDecoder,
        batches: CaptionBatches,
        config: TrainingConfig,
        device: torch.device,
        ranks: Ranks = ALONE,
    ) -> None:
        super().__init__(decoder, batches, config, device, config.learning_rate)
        self._ranks = ranks

    def of_epoch(self, seed: int, number: int, done: int = 0) -> Iterator[Step]:
        """Takes the steps, as :meth:`Steps.of_epoch`."""
        ranks, vocabulary = self._ranks, self.decoder.vocabulary
        left = self.batches.epoch(seed, number, ranks.rank, ranks.count, done)
        for step, batch in enumerate(left, start=done + 1):
            seed_step(seed, number, step, ranks.rank)
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate(number, step)
            here = batch.to(self.device)
            with self.autocast():
                outputs = self.decoder.outputs(here.features, here.photos, here.words, here.counts)  # (M, H)
                loss, smoothed = vocabulary.cross_entropy(outputs, here.targets, self.config.label_smoothing)
            self.optimizer.zero_grad()
            torch.autograd.backward(smoothed * batch.share)
            whole = ranks.add_gradients(self.decoder, loss * batch.share)
            # To look at a GPU's loss is to wait for it.
            if self.device.type != "cpu" or math.isfinite(whole.item()):
                clip(self.decoder, self.config.clip_norm)
                self.optimizer.step()
            yield Step(loss, len(outputs) if batch.share else 0, whole)


class CapturedSteps(Steps):
    """Batches on a GPU that holds captions and features: a step is captured once, and then replayed by one call.

    What a step is made of takes the processor longer to ask for than the GPU to do. Captured (CUDA graphs: Ng et al.,
    "Accelerating PyTorch with CUDA graphs", 2021), it is of one size: so a batch is a rectangle here, of as many
    captions a photo and words a caption as any, or as many words as the next of few lengths; what is behind a caption's
    end is read and does not count. There is a graph for each length, of which the first step is taken without one.

    On another device the same is done without graphs.
    """

    def __init__(
        self, decoder: RecurrentDecoder, batches: CaptionBatches, config: TrainingConfig, device: torch.device
    ) -> None:
        self._rate = torch.full((), config.learning_rate, device=device)
        self._uses_graphs = device.type == "cuda"
        super().__init__(decoder, batches, config, device, self._rate, capturable=self._uses_graphs)
        self._rectangles = batches.rectangles(device)
        self._table = self._rectangles.epoch(0, 0)  # written anew for each epoch, where graphs know it to be
        self._rates = torch.empty(len(batches), device=device)
        self._next = torch.zeros(1, dtype=torch.int64, device=device)
        self._loss = torch.zeros((), device=device)
        self._graphs: dict[int, torch.cuda.CUDAGraph | None] = {}
        if self._uses_graphs:
            self._pool = torch.cuda.graph_pool_handle()
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def of_epoch(self, seed: int, number: int, done: int = 0) -> Iterator[Step]:
        """Takes the steps, as :meth:`Steps.of_epoch`."""
        table = self._rectangles.epoch(seed, number)
        self._table.photos.copy_(table.photos)
        self._table.captions.copy_(table.captions)
        rates = [self.rate(number, step) for step in range(1, len(table.targets) + 1)]
        self._rates.copy_(on_device(torch.tensor(rates), self.device))
        self._next.fill_(done)
        seeds = np.random.SeedSequence([seed, number]).generate_state(len(rates), np.uint64).tolist()
        generator = (
            torch.cuda.default_generators[self.device.index or 0] if self._uses_graphs else torch.default_generator
        )
        for step in range(done, len(rates)):
            generator.manual_seed(seeds[step])
            self._take(_rounded(table.longest[step], self._rectangles.longest))
            yield Step(self._loss, table.targets[step], self._loss)

    def _take(self, length: int) -> None:
        if not self._uses_graphs:
            self._work(length)
            return
        graph = self._graphs.get(length)
        if length in self._graphs and graph is None:
            graph = self._graphs[length] = self._capture(length)
        if graph is not None:
            graph.replay()
            return
        self._graphs[length] = None
        here = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):
            self._work(length)
        here.wait_stream(self._stream)

    def _capture(self, length: int) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        self.optimizer.zero_grad()  # gradients are to come from the graph's own memory
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()  # what the step took without a graph, which the graph's own memory cannot have
        with torch.cuda.stream(self._stream):
            graph.capture_begin(self._pool, capture_error_mode="thread_local")
            try:
                self._work(length)
            finally:
                graph.capture_end()
        return graph

    def _work(self, length: int) -> None:
        """The next step of the table, of whose captions the longest has at most ``length`` words to read."""
        table = self._table.photos, self._table.captions, self._rates
        photos, captions, rate = (rows.index_select(0, self._next).squeeze(0) for rows in table)
        self._rate.copy_(rate)
        features, words, targets, real = self._rectangles.batch(photos, captions, length)
        with self.autocast():
            state = self.decoder.start(features).repeat(len(captions) // len(features))
            outputs, _ = self.decoder.read(state, words, (len(captions),) * length)  # (M, H)
            loss, smoothed = self.decoder.vocabulary.cross_entropy(outputs, targets, self.config.label_smoothing, real)
        self.optimizer.zero_grad()
        torch.autograd.backward(smoothed)
        clip(self.decoder, self.config.clip_norm)
        self.optimizer.step()
        self._loss.copy_(loss)
        self._next.add_(1)


def _rounded(length: int, longest: int) -> int:
    """The next of few lengths: of those between two powers of two there are four."""
    unit = max(2, 1 << max(length.bit_length() - 3, 0))
    return min(-(-length // unit) * unit, longest)


def steps_of(
    decoder: RecurrentDecoder,
    batches: CaptionBatches,
    config: TrainingConfig,
    device: torch.device,
    ranks: Ranks = ALONE,
) -> Steps:
    """The steps that are fastest on a device: captured on a GPU that holds the features, in a process that is alone.

    But packed where captions or photos are so unlike that rectangles would be padding for the most part.
    """
    is_held = device.type == "cuda" and batches.hold(device)
    if is_held and ranks.count == 1 and batches.padding() < _PADDED:
        return CapturedSteps(decoder, batches, config, device)
    return PackedSteps(decoder, batches, config, device, ranks)


def seed_step(seed: int, number: int, step: int, rank: int) -> None:
    """Seeds torch's generators for what is drawn at random in a step of an epoch, by one of several processes."""
    (value,) = np.random.SeedSequence([seed, number, step, rank]).generate_state(1, np.uint64)
    torch.manual_seed(int(value))


def clip(decoder: Decoder, most: float) -> None:
    """Cuts the gradient's norm to ``most``."""
    learnt = [value for value in decoder.parameters() if value.grad is not None]
    norm = nn.utils.get_total_norm([value.grad for value in learnt if value.grad is not None])
    if norm.device.type != "cpu" or norm > most:  # a GPU is not waited for
        nn.utils.clip_grads_with_norm_(learnt, most, norm)


def learning_rate(config: TrainingConfig | SelfCriticalConfig, epochs_done: float) -> float:
    """The learning rate when so many epochs, and parts of one, are done."""
    if config.schedule == "constant":
        return config.learning_rate
    return config.learning_rate * (1 + math.cos(math.pi * min(epochs_done / config.epochs, 1.0))) / 2
