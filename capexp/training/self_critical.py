"""The self-critical objective: captions are sampled, and made more or less probable by their CIDEr-D.

Self-critical sequence training (Rennie et al., CVPR 2017) with, in place of a greedy caption's reward, the mean reward
of the photo's other samples as the baseline (Luo, 2020).

Shapes: N photos, K captions of each, B = N * K, T steps, M targets, V vocabulary.
"""

import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from capexp.captioning.captioner import Captioner
from capexp.captioning.decoder import Decoder, Packed
from capexp.captioning.decoding import sample_captions
from capexp.captioning.evaluation import Loss, caption_all
from capexp.data.captions import Split
from capexp.data.features import Features
from capexp.data.vocabulary import BOS, EOS, PAD, Vocabulary
from capexp.metrics.cider import CiderReferences
from capexp.metrics.scores import score, tokenize
from capexp.training.checkpoints import EpochProgress, TrainingState
from capexp.training.loop import DevStats, Epoch, Objective, Save, Training, TrainStats
from capexp.training.steps import clip, learning_rate, seed_step

_END = ""  # where a caption ends is part of what is rewarded: otherwise captions come to end on "in a"


class Reward:
    """CIDEr-D of captions of a split's photos; the references' n-grams are counted once."""

    def __init__(self, references: Sequence[Sequence[str]]) -> None:
        self._references = CiderReferences([[(*tokenize(one), _END) for one in captions] for captions in references])

    def of(self, photo: int, caption: str) -> float:
        """Return the CIDEr-D, times ten, of a caption of the photo at that position of the split."""
        return self._references.score(photo, (*tokenize(caption), _END))[0]

    def of_samples(self, photos: list[int], samples: Tensor, vocabulary: Vocabulary) -> Tensor:
        """Return the rewards ``(B,)`` of sampled captions ``(B, T)``, as many of each photo."""
        each = len(samples) // len(photos)
        texts = [vocabulary.decode([entry for entry in row if entry not in (EOS, PAD)]) for row in samples.tolist()]
        return torch.tensor([self.of(photos[i // each], text) for i, text in enumerate(texts)])


class SelfCritical(Objective):
    """REINFORCE on the CIDEr-D of sampled captions; an epoch is an improvement by the CIDEr-D of the dev captions.

    Each rank samples and rewards its shard of every batch, from a random generator of its own, so that results depend
    on the number of ranks. Rank 0 alone decodes the dev captions.
    """

    section, batch_setting = "training.self_critical", "training.self_critical.photos"

    def __init__(self, training: Training, before: int) -> None:
        """``before`` is the number of epochs before this phase."""
        super().__init__(training)
        decoder = training.decoder
        decoder.load_state_dict(training.world.broadcast(decoder.state_dict))
        self._before = before
        self._settings = training.config.self_critical
        self._optimizer = torch.optim.Adam(
            [value for value in decoder.parameters() if value.requires_grad],
            lr=self._settings.learning_rate,
            fused=True,
        )
        self._reward = Reward(training.train.split.references)

    @property
    def learning_rate(self) -> float:
        """Of the settings."""
        return self._settings.learning_rate

    def is_done(self, history: Sequence[Epoch]) -> bool:
        """Return whether all epochs of this phase are done."""
        return len(history) >= self._before + self._settings.epochs

    def baseline(self) -> DevStats:
        """Return the dev CIDEr-D of the captioner that this phase begins with; only rank 0 needs to have it."""
        return DevStats(math.nan, self._dev_cider())  # improvements are by CIDEr-D alone

    def evaluate(self) -> DevStats:
        """Return dev loss and dev CIDEr-D."""
        cider = self._dev_cider()
        return DevStats(self.training.dev_loss(), cider)

    def improves(self, new: DevStats, best: DevStats) -> bool:
        """Return whether the dev CIDEr-D is higher."""
        assert new.cider is not None and best.cider is not None
        return new.cider > best.cider

    def state_dict(self) -> dict[str, Any]:
        """Return the state of decoder and optimizer."""
        return {"decoder": self.training.decoder.state_dict(), "optimizer": self._optimizer.state_dict()}

    def load_state_dict(self, state: TrainingState) -> None:
        """Continue from a state."""
        self.training.decoder.load_state_dict(state.decoder)
        self._optimizer.load_state_dict(state.optimizer)

    def train_epoch(
        self, number: int, progress: EpochProgress = EpochProgress(), save: Save = lambda progress: None
    ) -> TrainStats:
        """Train an epoch; the loss is that of the sampled captions, in nats per token, beside their mean reward."""
        training, settings, world = self.training, self._settings, self.training.world
        start, steps = time.perf_counter() - progress.seconds, -(-len(training.train.features) // settings.photos)
        is_resumed = progress.steps > 0 and world.is_main
        # Of nats, targets, rewards and captions.
        sums = np.array(progress.sums if is_resumed else (0.0, 0.0, 0.0, 0.0))
        with training.fork_rng():
            shards = training.train.photo_batches(settings.photos, training.seed, number, world, progress.steps)
            for step, (photos, seen, is_own) in enumerate(shards, start=progress.steps + 1):
                seed_step(training.seed, number, step, world.rank)
                for group in self._optimizer.param_groups:
                    group["lr"] = self._rate(number, (step - 1) / steps)
                sums += self._step(number, photos, seen.to(training.device), is_own)
                if step % training.config.save_steps == 0 and step < steps:
                    save(EpochProgress(step, tuple(world.sum(*sums.tolist())), time.perf_counter() - start))
        nats, targets, rewards, captions = world.sum(*sums.tolist())
        return TrainStats(Loss(nats, int(targets)), self._rate(number), rewards / captions)

    def _step(
        self, number: int, photos: NDArray[np.int64], seen: Tensor, is_own: bool
    ) -> tuple[float, int, float, int]:
        """Take one step on some photos and their features ``(N, P, F)``.

        Returns the sum of the sampled targets' cross-entropies in nats, their number, the sum of the rewards, and the
        number of sampled captions. Where not ``is_own``, the photos only keep
        this rank in step with the others, and count zero.
        """
        training, settings, world = self.training, self._settings, self.training.world
        decoder, vocabulary = training.decoder, training.captioner.vocabulary
        with training.autocast():
            # Sampled without dropout: sampling with the very masks of the gradient has given less.
            decoder.eval()
            try:
                samples = sample_captions(
                    decoder, seen, vocabulary, settings.samples, training.captioner.decoding.maximum_length
                )
            except FloatingPointError as error:
                raise self.diverged(f"{error} in epoch {number}") from None
            rewards = self._reward.of_samples(photos.tolist(), samples, vocabulary)  # (B,)
            # Learnt with dropout, or the train photos' captions are soon known by heart.
            decoder.train()
            chosen = log_probabilities(decoder, seen, samples, vocabulary)  # (B, T)
            loss = policy_loss(chosen, samples, advantages(rewards, settings.samples))
            nats, said = loss.new_zeros(()), 0
            if settings.cross_entropy:
                nats, said = self._cross_entropy(number, photos)
        # Each rank's mean counts by its share of all targets.
        own, own_said = (int((samples != PAD).sum()), said) if is_own else (0, 0)
        whole, whole_said = world.sum(own, own_said)
        loss = loss * (own / whole) + settings.cross_entropy * nats * (own_said / max(whole_said, 1))
        self._optimizer.zero_grad()
        torch.autograd.backward(loss)
        loss = world.sum_gradients(decoder, loss)
        if world.is_main and not bool(loss.isfinite()):
            raise self.diverged(f"the loss is {loss.item()} in epoch {number}")
        clip(decoder, training.config.clip_norm)
        self._optimizer.step()
        if not is_own:
            return 0.0, 0, 0.0, 0
        return -float(chosen.detach().sum()), own, float(rewards.sum()), len(rewards)

    def _cross_entropy(self, number: int, photos: NDArray[np.int64]) -> tuple[Tensor, int]:
        """Return the mean cross-entropy of the photos' own captions, and the number of their targets."""
        training = self.training
        batch = training.train.captions_of(photos, training.seed, number).to(training.device)
        decoder = training.decoder
        outputs = decoder.outputs(batch.features, batch.photos, batch.words, batch.counts)
        return decoder.vocabulary.cross_entropy(outputs, batch.targets)[1], len(batch.targets)

    def _rate(self, number: int, done: float = 0.0) -> float:
        """Return the learning rate when a part ``done`` of an epoch is done; this phase's epochs count from 0."""
        return learning_rate(self._settings, number - 1 - self._before + done)

    def _dev_cider(self) -> float:
        dev = self.training.dev
        return self.training.world.broadcast(lambda: dev_cider(self.training.captioner, dev.split, dev.features))


def dev_cider(captioner: Captioner, split: Split, features: Features) -> float:
    """Return the CIDEr-D of a captioner's captions of a split, decoded by its own settings."""
    texts = [caption.text for caption in caption_all(captioner, features)]
    return score(texts, split.references).corpus()["cider"]


def advantages(rewards: Tensor, samples: int) -> Tensor:
    """Return each reward minus the mean of the photo's other captions, ``(B,)``; those of a photo sum to 0."""
    by_photo = rewards.view(-1, samples)  # (N, K)
    others = (by_photo.sum(1, keepdim=True) - by_photo) / (samples - 1)
    return (by_photo - others).flatten()


def log_probabilities(decoder: Decoder, features: Tensor, targets: Tensor, vocabulary: Vocabulary) -> Tensor:
    """Return the log-probability ``(B, T)`` of each target among the entries that may be emitted; 0 at PAD.

    Targets ``(B, T)`` are captions of the photos in order, as many of each.
    """
    photos = torch.arange(len(features), device=targets.device).repeat_interleave(len(targets) // len(features))
    inputs = torch.cat([torch.full_like(targets[:, :1], BOS), targets[:, :-1]], 1)
    packed = Packed.of(inputs.where(inputs != EOS, PAD))
    logits = decoder.logits(features, photos[packed.order], packed.words, packed.counts)  # (M, V)
    forbidden = torch.tensor(vocabulary.never_emitted, device=targets.device)
    values = logits.float().index_fill(1, forbidden, -torch.inf).log_softmax(1)
    where = packed.rows, packed.steps
    chosen = values.gather(1, targets[where].unsqueeze(1)).squeeze(1)  # (M,)
    return chosen.new_zeros(targets.shape).index_put(where, chosen)


def policy_loss(chosen: Tensor, targets: Tensor, advantage: Tensor) -> Tensor:
    """Return the mean over targets of minus the log-probability ``(B, T)`` times the caption's advantage ``(B,)``.

    Its gradient is that of the expected reward, up to sign and scale (REINFORCE: Williams, 1992), as far as batches
    have equal numbers of targets and captions are sampled from the model that learns. With dropout they are not quite:
    a caption that is often sampled and of little worth may be made less probable without end, so this is for a few
    epochs.
    """
    return -(chosen * advantage.to(chosen.device).unsqueeze(1)).sum() / (targets != PAD).sum()
