"""The steps of the self-critical phase: sample captions of some photos, reward them, and learn from them.

Shapes: N photos, K captions per photo, B = N * K, T steps, M targets, V vocabulary, P grid positions, F features,
H hidden.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from capexp.captioning.decoder import Packed, RecurrentDecoder
from capexp.captioning.decoding import finished_samples, sample_by_step, sample_captions
from capexp.data.batches import on_device
from capexp.data.vocabulary import BOS, EOS, PAD, Vocabulary
from capexp.training.graphs import Graphs
from capexp.training.loop import Training
from capexp.training.optimizer import AdamW
from capexp.training.reward import Reward, advantages
from capexp.training.steps import can_pad, clip, learning_rate, padded_outputs, rounded_length, seed_step


class PolicyStep(NamedTuple):
    """The results of a step on this rank; zeros if it only repeats a photo of another rank's."""

    nats: float
    """The summed cross-entropy of the sampled targets."""
    targets: int
    """The number of sampled targets."""
    rewards: float
    """The sum of the rewards, the captions' CIDEr-D."""
    captions: int
    """The number of sampled captions."""


_NOT_OWN = PolicyStep(0.0, 0, 0.0, 0)


class PolicySteps(ABC):
    """The base class of the two kinds of steps, packed and captured."""

    def __init__(self, training: Training, before: int, rate: Tensor | None = None, capturable: bool = False) -> None:
        """``before`` is the number of epochs before this phase; ``rate`` and ``capturable`` are as in ``Steps``."""
        self.training, self.settings = training, training.config.self_critical
        self._before = before
        self.optimizer = AdamW(
            [value for value in training.decoder.parameters() if value.requires_grad],
            lr=self.settings.learning_rate if rate is None else rate,
            weight_decay=0,
            fused=True,
            capturable=capturable,
        )
        self.reward = Reward(training.train.split.references, training.captioner.vocabulary)

    @property
    def count(self) -> int:
        """The number of steps in an epoch."""
        return -(-len(self.training.train.features) // self.settings.photos)

    @abstractmethod
    def of_epoch(self, number: int, done: int = 0) -> Iterator[PolicyStep]:
        """Yield the steps of an epoch without the first ``done``; each step is computed when it is requested.

        Raises FloatingPointError if logits or the loss are not finite.
        """

    def rate(self, number: int, done: int = 0) -> float:
        """Return the learning rate after ``done`` steps of an epoch; the schedule begins with this phase."""
        return learning_rate(self.settings, number - 1 - self._before + done / self.count)

    def check(self, loss: float) -> None:
        """Raise FloatingPointError on rank 0 if the loss of all ranks is not finite."""
        if self.training.world.is_main and not np.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss}")


class PackedPolicySteps(PolicySteps):
    """Steps on packed captions, which have no padding; features are prefetched; each rank takes its shard."""

    def of_epoch(self, number: int, done: int = 0) -> Iterator[PolicyStep]:
        """Yield the steps, as :meth:`PolicySteps.of_epoch`."""
        training, world = self.training, self.training.world
        shards = training.train.photo_batches(self.settings.photos, training.seed, number, world, done)
        for step, (photos, features, is_own) in enumerate(shards, start=done + 1):
            seed_step(training.seed, number, step, world.rank)
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate(number, step - 1)
            yield self._take(number, photos, features.to(training.device), is_own)

    def _take(self, number: int, photos: NDArray[np.int64], features: Tensor, is_own: bool) -> PolicyStep:
        """Take one step on some photos and their features ``(N, P, F)``.

        If ``is_own`` is False, another rank has the same photos. This rank then only keeps in step with the others: its
        losses have the weight 0.
        """
        training, settings, world = self.training, self.settings, self.training.world
        decoder, vocabulary = training.decoder, training.captioner.vocabulary
        with training.autocast():
            # Sample without dropout. Sampling with the dropout masks of the gradient has given worse results.
            decoder.eval()
            samples = sample_captions(
                decoder, features, vocabulary, settings.samples, training.captioner.decoding.maximum_length
            )
            rewards = self.reward.of(photos.repeat(settings.samples).tolist(), samples.tolist())  # (B,)
            # Learn with dropout. Without it the decoder soon overfits to the train photos.
            decoder.train()
            nats, loss = policy_loss(decoder, features, samples, advantages(rewards, settings.samples), vocabulary)
            reference_loss, reference_count = loss.new_zeros(()), 0
            if settings.cross_entropy:
                reference_loss, reference_count = self._cross_entropy(number, photos)
        # Both losses are means over this rank's targets. Weight them by this rank's share of the targets of all ranks,
        # because gradients are summed over the ranks.
        sampled, references = (int((samples != PAD).sum()), reference_count) if is_own else (0, 0)
        all_sampled, all_references = world.sum(sampled, references)
        loss = loss * (sampled / all_sampled) + settings.cross_entropy * reference_loss * (
            references / max(all_references, 1)
        )
        self.optimizer.zero_grad()
        torch.autograd.backward(loss)
        self.check(float(world.sum_gradients(decoder, loss.detach())))
        clip(decoder, training.config.clip_norm)
        self.optimizer.step()
        return PolicyStep(float(nats) * sampled, sampled, float(rewards.sum()), len(rewards)) if is_own else _NOT_OWN

    def _cross_entropy(self, number: int, photos: NDArray[np.int64]) -> tuple[Tensor, int]:
        """Return the mean cross-entropy of the photos' reference captions in nats, and the number of targets."""
        training = self.training
        batch = training.train.captions_of(photos, training.seed, number).to(training.device)
        decoder = training.decoder
        outputs = decoder.outputs(batch.features, batch.photos, batch.words, batch.counts)
        return decoder.vocabulary.cross_entropy(outputs, batch.targets)[1], len(batch.targets)


class CapturedPolicySteps(PolicySteps):
    """Steps on padded captions, on a GPU that holds all features; their work is replayed as CUDA graphs.

    There are three kinds of work: sampling; the gradient of the reference captions, which the GPU computes while the
    CPU computes the rewards; and the gradient of the sampled captions with the update. A step waits for the GPU twice:
    for the samples, and for the loss at its end. With the same weights, full batches give the captions that packed
    steps sample; dropout masks are others.

    Every photo is padded to the largest number of captions per photo, and batches to the same number of photos. Lengths
    are rounded up, as in :class:`capexp.training.steps.CapturedSteps`. The all-reduce is part of a graph, which all
    ranks must replay together. So with several ranks sampled captions are padded to the largest possible length.

    On other devices the same steps run without graphs.
    """

    def __init__(self, training: Training, before: int) -> None:
        device, settings = training.device, training.config.self_critical
        self._rate = torch.full((), settings.learning_rate, device=device)
        self._graphs = Graphs(device)
        super().__init__(training, before, self._rate, capturable=self._graphs.is_used)
        # All graphs add to the same gradients, whose addresses therefore stay the same.
        for group in self.optimizer.param_groups:
            for value in group["params"]:
                value.grad = torch.zeros_like(value)
        self._batches = training.train.padded(device)
        self._forbidden = torch.tensor(training.captioner.vocabulary.never_emitted, device=device)
        self._longest = training.captioner.decoding.maximum_length
        # Overwritten in place, because graphs read from fixed addresses:
        self._epoch = self._batches.epoch(0, 0, training.world, settings.photos)
        rows = self._epoch.views.shape[1] * settings.samples  # B
        self._next = torch.zeros(1, dtype=torch.int64, device=device)
        self._samples = torch.zeros(self._longest, rows, dtype=torch.int64, device=device)
        self._is_finite = torch.ones((), dtype=torch.bool, device=device)
        # Copies in memory of the CPU that a GPU can write to while the CPU goes on:
        self._host_samples, self._host_is_finite = (
            torch.empty_like(value, device="cpu", pin_memory=self._graphs.is_used)
            for value in (self._samples, self._is_finite)
        )
        self._advantages = torch.zeros(rows, device=device)
        self._share = torch.zeros((), device=device)  # of this rank's sampled targets in those of all ranks
        self._reference_loss = torch.zeros((), device=device)  # with its share and weight
        self._losses = torch.zeros(2, device=device)  # cross-entropy of this rank's samples; the loss over all ranks

    def of_epoch(self, number: int, done: int = 0) -> Iterator[PolicyStep]:
        """Yield the steps, as :meth:`PolicySteps.of_epoch`."""
        training, settings, world = self.training, self.settings, self.training.world
        epoch = self._batches.epoch(training.seed, number, world, settings.photos)
        self._epoch.views.copy_(epoch.views)
        self._epoch.captions.copy_(epoch.captions)
        self._epoch.shares.copy_(epoch.shares)
        self._next.fill_(done)
        for step, photos in enumerate(epoch.photos[done:], start=done):
            seed_step(training.seed, number, step + 1, world.rank)
            self._rate.fill_(self.rate(number, step))
            self._graphs.run("sample", self._sample)
            self._host_samples.copy_(self._samples, non_blocking=True)
            self._host_is_finite.copy_(self._is_finite, non_blocking=True)
            wait_for_samples = self._graphs.mark()
            if settings.cross_entropy:
                length = rounded_length(epoch.lengths[step], self._batches.longest)
                self._graphs.run(("references", length), partial(self._learn_references, length))
            wait_for_samples()
            samples = finished_samples(self._host_samples, self._host_is_finite)[: len(photos) * settings.samples]
            rewards = self.reward.of(np.repeat(photos, settings.samples).tolist(), samples.tolist())
            self._advantages[: len(rewards)].copy_(on_device(advantages(rewards, settings.samples), training.device))
            is_own = epoch.targets[step] > 0
            sampled = int((samples != PAD).sum()) if is_own else 0
            self._share.fill_(sampled / world.sum(sampled)[0])
            length = rounded_length(samples.shape[1], self._longest) if world.size == 1 else self._longest
            self._graphs.run(("samples", length), partial(self._learn_samples, length))
            nats, loss = self._losses.tolist()
            self.check(loss)
            yield PolicyStep(nats * sampled, sampled, float(rewards.sum()), len(rewards)) if is_own else _NOT_OWN

    def _batch(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the views ``(N,)`` of the next batch, its reference captions, and this rank's share of these."""
        epoch = self._epoch.views, self._epoch.captions, self._epoch.shares
        views, captions, share = (rows.index_select(0, self._next).squeeze(0) for rows in epoch)
        return views, captions, share

    def _sample(self) -> None:
        """Sample captions of the next photos, without dropout; reset the gradients."""
        self.optimizer.zero_grad(set_to_none=False)
        self._reference_loss.zero_()
        decoder = self.training.decoder.eval()
        features = self._batches.features[self._batch()[0]].float()
        with self.training.autocast():
            samples, is_finite = sample_by_step(
                decoder, features, self._forbidden, self.settings.samples, self._longest, fixed=True
            )
        self._samples.copy_(samples)
        self._is_finite.copy_(is_finite)

    def _learn_references(self, length: int) -> None:
        """Add the gradient of the next photos' reference captions, which have at most ``length`` inputs."""
        decoder = self.training.decoder.train()
        views, captions, share = self._batch()
        features, words, targets, real = self._batches.gather(views, captions, length)
        with self.training.autocast():
            outputs = padded_outputs(decoder, features, words, length)
            loss = decoder.vocabulary.cross_entropy(outputs, targets, real=real)[1]
        loss = loss * share * self.settings.cross_entropy
        torch.autograd.backward(loss)
        self._reference_loss.copy_(loss.detach())

    def _learn_samples(self, length: int) -> None:
        """Add the gradient of the sampled captions, which have at most ``length`` words, and update the weights."""
        training = self.training
        decoder = training.decoder.train()
        views, captions, _ = self._batch()
        samples = self._samples[:length]  # (T, B)
        words = torch.cat([torch.full_like(samples[:1], BOS), samples[:-1]])
        # A photo that fills up the batch has no captions.
        is_photo = (self._batches.lengths[captions].view(len(views), -1) > 0).any(1)  # (N,)
        real = (samples != PAD) & is_photo.repeat_interleave(self.settings.samples)  # (T, B)
        with training.autocast():
            features = self._batches.features[views].float()
            outputs = padded_outputs(decoder, features, words.flatten(), length)
            nats, loss = decoder.vocabulary.cross_entropy(
                outputs,
                samples.flatten(),
                real=real.flatten(),
                weights=self._advantages.repeat(length),
                forbidden=self._forbidden,
            )
        loss = loss * self._share
        torch.autograd.backward(loss)
        total = training.world.sum_gradients(decoder, loss + self._reference_loss)
        clip(decoder, training.config.clip_norm)
        self.optimizer.step()
        self._losses.copy_(torch.stack([nats, total.detach()]))
        self._next.add_(1)


def choose_policy_steps(training: Training, before: int) -> PolicySteps:
    """Return the fastest steps, on the same conditions as :func:`capexp.training.steps.choose_steps`."""
    kind = CapturedPolicySteps if can_pad(training, training.config.self_critical.photos) else PackedPolicySteps
    return kind(training, before)


def policy_loss(
    decoder: RecurrentDecoder, features: Tensor, samples: Tensor, advantage: Tensor, vocabulary: Vocabulary
) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy of sampled captions, and the policy loss: its mean with weights, the advantages.

    ``samples`` ``(B, T)`` are captions in the order of the photos, the same number per photo, and ``advantage`` is
    ``(B,)``. Both means are over targets, in nats. The probabilities are normalised over the entries that may be
    emitted. Only the policy loss is differentiable.

    Its gradient is that of the expected reward, up to sign and scale (REINFORCE: Williams, 1992), if all batches have
    the same number of targets and captions are sampled from the model that learns. The second condition does not hold
    exactly: the decoder samples without dropout and learns with it. A caption that is often sampled and has a low
    reward can become less probable without limit. So this loss is for a few epochs only.
    """
    device = samples.device
    photos = torch.arange(len(features), device=device).repeat_interleave(len(samples) // len(features))
    inputs = torch.cat([torch.full_like(samples[:, :1], BOS), samples[:, :-1]], 1)
    packed = Packed.of(inputs.where(inputs != EOS, PAD))
    outputs = decoder.outputs(features, photos[packed.order], packed.words, packed.counts)  # (M, H)
    return decoder.vocabulary.cross_entropy(
        outputs,
        samples[packed.rows, packed.steps],
        weights=advantage.to(device)[packed.rows],
        forbidden=torch.tensor(vocabulary.never_emitted, device=device),
    )
