"""Training on the score itself: captions are drawn, and made more or less probable by what they are worth.

Self-critical sequence training (Rennie et al., CVPR 2017), with CIDEr-D as the reward and, in place of a greedy
caption's, the mean reward of the photo's other captions as the baseline (Luo, 2020).

Shapes: N photos, K captions of each, B = N * K, T steps, M targets, V vocabulary.
"""

import math
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from capexp.captioning.captioner import Captioner
from capexp.captioning.decoder import Decoder
from capexp.captioning.decoding import draw
from capexp.data.batches import photo_batches
from capexp.data.cache import Features
from capexp.data.captions import Split
from capexp.data.errors import InputError
from capexp.data.features import Precision, use_bfloat16
from capexp.data.vocabulary import BOS, EOS, PAD, Vocabulary
from capexp.scoring.cider import CiderReferences
from capexp.scoring.metrics import score, tokenize

_END = ""  # where a caption ends is part of what is rewarded: otherwise it comes to end on "in a"
_PART = 512  # dev photos at a time


class SelfCriticalConfig(BaseModel):
    """How a captioner is trained on its captions' scores."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    epochs: int = Field(default=6, ge=1, le=1_000_000)
    photos: int = Field(default=25, ge=1, le=1_000_000)
    """A batch."""
    samples: int = Field(default=5, ge=2, le=1000)
    """Captions drawn of a photo."""
    learning_rate: float = Field(default=5e-5, gt=0, allow_inf_nan=False)
    clip_norm: float = Field(default=5.0, gt=0, allow_inf_nan=False)
    precision: Precision = "auto"


@dataclass(frozen=True)
class RewardEpoch:
    """One pass over the train photos."""

    number: int
    """From 1."""
    reward: float
    """Mean CIDEr-D, times ten, of the captions drawn, their end counted as a word."""
    dev_cider: float
    """Of the captions that the captioner says as it decodes, after the epoch."""
    seconds: float


class Reward:
    """What captions of a split's photos are worth; the references' n-grams are counted once."""

    def __init__(self, references: Sequence[Sequence[str]]) -> None:
        self._people = CiderReferences([[(*tokenize(one), _END) for one in captions] for captions in references])

    def of(self, photo: int, caption: str) -> float:
        """CIDEr-D, times ten, of a caption of the photo in that place of the split."""
        return self._people.score(photo, (*tokenize(caption), _END))[0]


def refine(
    captioner: Captioner,
    train: tuple[Split, Features],
    dev: tuple[Split, Features],
    config: SelfCriticalConfig,
    *,
    seed: int,
    device: torch.device,
) -> Generator[RewardEpoch, None, None]:
    """Goes on with a trained captioner; yields each epoch when the captioner is that of its end.

    Raises:
        InputError: the loss is not finite any more.
    """
    decoder = captioner.decoder.to(device)
    reward = Reward(train[0].references)
    optimizer = torch.optim.Adam(
        [value for value in decoder.parameters() if value.requires_grad], lr=config.learning_rate, fused=True
    )
    for number in range(1, config.epochs + 1):
        start = time.perf_counter()
        total, captions = 0.0, 0
        _train_without_dropout(decoder)
        with torch.random.fork_rng():
            torch.manual_seed(seed * 1_000_003 + number)
            for photos, features in photo_batches(train[1], config.photos, seed, number):
                with torch.autocast(device.type, torch.bfloat16, enabled=use_bfloat16(device, config.precision)):
                    rewards = _step(decoder, optimizer, features.to(device), photos.tolist(), reward, captioner, config)
                total += float(rewards.sum())
                captions += len(rewards)
        yield RewardEpoch(number, total / captions, dev_cider(captioner, *dev), time.perf_counter() - start)


def dev_cider(captioner: Captioner, split: Split, features: Features) -> float:
    """CIDEr-D of a captioner's captions of a split, decoded as it says."""
    texts = [one.text for part in features.parts(_PART) for one in captioner.caption_features(part)]
    return score(texts, split.references).corpus()["cider"]


def _train_without_dropout(decoder: Decoder) -> None:
    """In training mode, which an LSTM on a GPU needs for gradients, but with the probabilities that are drawn from."""
    decoder.train()
    for module in decoder.modules():
        if isinstance(module, nn.Dropout):
            module.eval()


def _step(
    decoder: Decoder,
    optimizer: torch.optim.Optimizer,
    features: Tensor,
    photos: list[int],
    reward: Reward,
    captioner: Captioner,
    config: SelfCriticalConfig,
) -> Tensor:
    """One batch of photos; gives the rewards ``(B,)`` of what was drawn."""
    vocabulary, samples = captioner.vocabulary, config.samples
    targets = draw(decoder, features, vocabulary, samples, captioner.decoding.maximum_length)  # (B, T)
    texts = [vocabulary.decode([entry for entry in row if entry not in (EOS, PAD)]) for row in targets.tolist()]
    rewards = torch.tensor([reward.of(photos[i // samples], text) for i, text in enumerate(texts)])  # (B,)
    loss = policy_loss(decoder, features, targets, advantages(rewards, samples).to(targets.device), vocabulary)
    if not math.isfinite(loss.item()):
        raise InputError("the self-critical loss is not finite any more: lower its learning rate")
    optimizer.zero_grad()
    torch.autograd.backward(loss)
    nn.utils.clip_grad_norm_(decoder.parameters(), config.clip_norm)
    optimizer.step()
    return rewards


def advantages(rewards: Tensor, samples: int) -> Tensor:
    """How much better than the photo's other captions each is, ``(B,)``; those of a photo sum to 0."""
    by_photo = rewards.view(-1, samples)  # (N, K)
    others = (by_photo.sum(1, keepdim=True) - by_photo) / (samples - 1)
    return (by_photo - others).flatten()


def policy_loss(
    decoder: Decoder, features: Tensor, targets: Tensor, advantage: Tensor, vocabulary: Vocabulary
) -> Tensor:
    """Minus the log-probability of each target, by its caption's advantage, mean over targets.

    Its gradient is that of the expected reward, up to sign and scale (REINFORCE: Williams, 1992). Probabilities are
    those that were drawn from: among the entries that may be emitted.
    """
    captions = len(targets)
    photos = torch.arange(len(features), device=targets.device).repeat_interleave(captions // len(features))
    inputs = torch.cat([torch.full_like(targets[:, :1], BOS), targets[:, :-1]], 1)
    inputs = inputs.where(inputs != EOS, PAD)
    real = targets != PAD  # (B, T)
    logits: Tensor = decoder(features, inputs, real, photos)  # (M, V)
    forbidden = torch.tensor(vocabulary.never_emitted, device=targets.device)
    log_probabilities = logits.float().index_fill(1, forbidden, -torch.inf).log_softmax(1)
    chosen = log_probabilities.gather(1, targets[real].unsqueeze(1)).squeeze(1)  # (M,)
    loss: Tensor = -(chosen * advantage.unsqueeze(1).expand_as(targets)[real]).mean()
    return loss
