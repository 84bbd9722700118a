"""The self-critical objective: sample captions, and make those with a high CIDEr-D more probable.

This is self-critical sequence training (Rennie et al., CVPR 2017) with a different baseline: not the reward of a greedy
caption, but the mean reward of the photo's other samples (Luo, 2020).

Shapes: N photos, K captions per photo, B = N * K, T steps, M targets, V vocabulary,
P grid positions, F features.
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
from capexp.captioning.decoder import Packed, RecurrentDecoder
from capexp.captioning.decoding import sample_captions
from capexp.captioning.evaluation import Loss, caption_all
from capexp.data.captions import Split
from capexp.data.features import Features
from capexp.data.vocabulary import BOS, EOS, PAD, Vocabulary
from capexp.metrics.cider import CiderReferences
from capexp.metrics.scores import is_split_alone, score, tokenize
from capexp.training.checkpoints import EpochProgress, TrainingState
from capexp.training.loop import DevStats, Epoch, Objective, Save, Training, TrainStats
from capexp.training.optimizer import AdamW
from capexp.training.steps import clip, learning_rate, seed_step

_END = ""  # a token for the end of a caption, which is rewarded too: otherwise captions learn to end with "in a"


class Reward:
    """The reward of a caption: its CIDEr-D, with the end as a token. The references' n-grams are counted once."""

    def __init__(self, references: Sequence[Sequence[str]], vocabulary: Vocabulary) -> None:
        rule, words = vocabulary.tokens, enumerate(vocabulary.words, start=vocabulary.first_word)
        self._vocabulary = vocabulary
        self._references = CiderReferences(
            [[(*tokenize(caption, rule), _END) for caption in captions] for captions in references]
        )
        self._end = self._references.token_ids([_END])
        # The scorer's tokens of each entry whose tokens do not depend on the entries beside it.
        self._tokens: dict[int, list[int]] = {EOS: [], PAD: []} | {
            entry: self._references.token_ids(tokenize(word, rule))
            for entry, word in words
            if is_split_alone(word, rule)
        }

    def of(self, photos: Sequence[int], captions: Sequence[Sequence[int]]) -> Tensor:
        """Return the CIDEr-D, from 0 to 10, of captions given as entries of the vocabulary, PAD and EOS included.

        ``photos`` are the positions of their photos in the split.
        """
        scores = self._references.score(photos, [self._token_ids(caption) for caption in captions])
        return torch.from_numpy(scores[:, 0].astype(np.float32))

    def _token_ids(self, caption: Sequence[int]) -> list[int]:
        tokens = self._tokens
        if all(entry in tokens for entry in caption):
            return [token for entry in caption for token in tokens[entry]] + self._end
        text = self._vocabulary.decode(entry for entry in caption if entry not in (EOS, PAD))
        return self._references.token_ids(tokenize(text, self._vocabulary.tokens)) + self._end


class SelfCritical(Objective):
    """REINFORCE with the CIDEr-D of sampled captions as reward; the best epoch has the highest dev CIDEr-D.

    Each rank samples and rewards the captions of its shard of every batch, with its own random seed. So results depend
    on the number of ranks. Only rank 0 decodes the dev captions.
    """

    section, batch_setting = "training.self_critical", "training.self_critical.photos"

    def __init__(self, training: Training, before: int) -> None:
        """``before`` is the number of epochs before this phase."""
        super().__init__(training)
        decoder = training.decoder
        decoder.load_state_dict(training.world.broadcast(decoder.state_dict))
        self._before = before
        self._settings = training.config.self_critical
        self._optimizer = AdamW(
            [value for value in decoder.parameters() if value.requires_grad],
            lr=self._settings.learning_rate,
            weight_decay=0,
            fused=True,
        )
        self._reward = Reward(training.train.split.references, training.captioner.vocabulary)

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
        return {"decoder": self.training.decoder.state_dict(), "optimizer": self._optimizer.state_dict()}

    def load_state_dict(self, state: TrainingState) -> None:
        """Load a state to continue from."""
        self.training.decoder.load_state_dict(state.decoder)
        self._optimizer.load_state_dict(state.optimizer)

    def train_epoch(
        self, number: int, progress: EpochProgress = EpochProgress(), save: Save = lambda progress: None
    ) -> TrainStats:
        """Train an epoch; return the loss of the sampled captions in nats per token, and their mean reward."""
        training, settings, world = self.training, self._settings, self.training.world
        start, steps = time.perf_counter() - progress.seconds, -(-len(training.train.features) // settings.photos)
        is_resumed = progress.steps > 0 and world.is_main
        # The sums of losses in nats, targets, rewards and captions; after a resume, rank 0 begins with the saved sums.
        sums = np.array(progress.sums if is_resumed else (0.0, 0.0, 0.0, 0.0))
        with training.fork_rng():
            shards = training.train.photo_batches(settings.photos, training.seed, number, world, progress.steps)
            for step, (photos, features, is_own) in enumerate(shards, start=progress.steps + 1):
                seed_step(training.seed, number, step, world.rank)
                for group in self._optimizer.param_groups:
                    group["lr"] = self._rate(number, (step - 1) / steps)
                sums += self._step(number, photos, features.to(training.device), is_own)
                if step % training.config.save_steps == 0 and step < steps:
                    save(EpochProgress(step, tuple(world.sum(*sums.tolist())), time.perf_counter() - start))
        nats, targets, rewards, captions = world.sum(*sums.tolist())
        return TrainStats(Loss(nats, int(targets)), self._rate(number), rewards / captions)

    def _step(
        self, number: int, photos: NDArray[np.int64], features: Tensor, is_own: bool
    ) -> tuple[float, int, float, int]:
        """Take one step on some photos and their features ``(N, P, F)``.

        Returns the summed cross-entropy of the sampled targets in nats, their number, the sum of the rewards, and the
        number of sampled captions. If ``is_own`` is False, another rank has the same photos. This rank then only keeps
        in step with the others: its losses have the weight 0, and it returns zeros.
        """
        training, settings, world = self.training, self._settings, self.training.world
        decoder, vocabulary = training.decoder, training.captioner.vocabulary
        with training.autocast():
            # Sample without dropout. Sampling with the dropout masks of the gradient has given worse results.
            decoder.eval()
            try:
                samples = sample_captions(
                    decoder, features, vocabulary, settings.samples, training.captioner.decoding.maximum_length
                )
            except FloatingPointError as error:
                raise self.diverged(f"{error} in epoch {number}") from None
            rewards = self._reward.of(photos.repeat(settings.samples).tolist(), samples.tolist())  # (B,)
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
        self._optimizer.zero_grad()
        torch.autograd.backward(loss)
        loss = world.sum_gradients(decoder, loss)
        if world.is_main and not bool(loss.isfinite()):
            raise self.diverged(f"the loss is {loss.item()} in epoch {number}")
        clip(decoder, training.config.clip_norm)
        self._optimizer.step()
        if not is_own:
            return 0.0, 0, 0.0, 0
        return float(nats) * sampled, sampled, float(rewards.sum()), len(rewards)

    def _cross_entropy(self, number: int, photos: NDArray[np.int64]) -> tuple[Tensor, int]:
        """Return the mean cross-entropy of the photos' reference captions in nats, and the number of targets."""
        training = self.training
        batch = training.train.captions_of(photos, training.seed, number).to(training.device)
        decoder = training.decoder
        outputs = decoder.outputs(batch.features, batch.photos, batch.words, batch.counts)
        return decoder.vocabulary.cross_entropy(outputs, batch.targets)[1], len(batch.targets)

    def _rate(self, number: int, done: float = 0.0) -> float:
        """Return the learning rate at the fraction ``done`` of an epoch; the schedule begins with this phase."""
        return learning_rate(self._settings, number - 1 - self._before + done)

    def _dev_cider(self) -> float:
        """Compute the dev CIDEr-D on rank 0 and broadcast it."""
        dev = self.training.dev
        return self.training.world.broadcast(lambda: dev_cider(self.training.captioner, dev.split, dev.features))


def dev_cider(captioner: Captioner, split: Split, features: Features) -> float:
    """Return the CIDEr-D, from 0 to 10, of a captioner's captions of a split, decoded with its own settings."""
    texts = [caption.text for caption in caption_all(captioner, features)]
    return score(texts, split.references, captioner.vocabulary.tokens).corpus()["cider"]


def advantages(rewards: Tensor, samples: int) -> Tensor:
    """Return each reward minus the mean reward of the photo's other captions, ``(B,)``; they sum to 0 per photo."""
    by_photo = rewards.view(-1, samples)  # (N, K)
    others = (by_photo.sum(1, keepdim=True) - by_photo) / (samples - 1)
    return (by_photo - others).flatten()


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
