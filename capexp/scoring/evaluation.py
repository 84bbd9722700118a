"""Losses of a captioner on a split: cross-entropy, perplexity, and the photo-blind baseline.

Shapes: B batch, T steps, V vocabulary.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from capexp.captioning.model import MergeDecoder
from capexp.data.batches import Batch, CaptionBatches
from capexp.data.vocabulary import PAD


@dataclass(frozen=True)
class Loss:
    """Cross-entropy of the next word over all targets of a split, EOS counted."""

    total: float
    """In nats."""
    targets: int

    @property
    def per_token(self) -> float:
        """Nats per token."""
        return self.total / self.targets

    @property
    def perplexity(self) -> float:
        """exp of nats per token."""
        return perplexity(self.per_token)


def perplexity(nats_per_token: float) -> float:
    """exp of a cross-entropy in nats per token; where that is beyond floats, the largest power below."""
    return math.exp(min(nats_per_token, 709.0))


@torch.inference_mode()
def cross_entropy(decoder: MergeDecoder, batches: Iterable[Batch]) -> Loss:
    """The decoder's loss in evaluation mode, in float32, summed over all targets."""
    decoder.eval()
    device = next(decoder.parameters()).device
    total, targets = 0.0, 0
    for batch in batches:
        on_device = batch.to(device)
        real = on_device.targets != PAD  # (B, T)
        logits = decoder(on_device.features, on_device.inputs, real)  # (N, V)
        total += float(nn.functional.cross_entropy(logits, on_device.targets[real], reduction="sum"))
        targets += len(logits)
    return Loss(total, targets)


def blind_cross_entropy(decoder: MergeDecoder, batches: CaptionBatches, photos: int, seed: int) -> Loss:
    """The loss where each photo's captions are read beside another photo: what the photo is not worth.

    The photos are shuffled so that none stays in its place (a cycle in random order).
    """
    order = np.random.default_rng(seed).permutation(photos)
    shuffled = np.empty_like(order)
    shuffled[order] = np.roll(order, 1)
    return cross_entropy(decoder, batches.in_order(shuffled))
