"""A captioner on a split: cross-entropy, perplexity, scores of its captions, and the photo-blind baseline.

Shapes: M targets, H hidden.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from capexp.captioning.captioner import Caption
from capexp.captioning.decoder import Decoder
from capexp.data.batches import Batch, CaptionBatches
from capexp.data.captions import Split
from capexp.metrics.scores import PhotoScores, score, tokenize, tutorial_bleu


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
def cross_entropy(decoder: Decoder, batches: Iterable[Batch]) -> Loss:
    """The decoder's loss in evaluation mode, in float32, summed over all targets."""
    decoder.eval()
    device = next(decoder.parameters()).device
    total, targets = 0.0, 0
    for batch in batches:
        here = batch.to(device)
        nats = decoder.cross_entropy(here.features, here.photos, here.words, here.targets, here.counts)
        total += float(nats) * len(here.targets)
        targets += len(here.targets)
    return Loss(total, targets)


def blind_cross_entropy(decoder: Decoder, batches: CaptionBatches, photos: int, seed: int) -> Loss:
    """The loss where each photo's captions are read beside another photo: what the photo is not worth.

    The photos are shuffled so that none stays in its place (a cycle in random order).
    """
    return cross_entropy(decoder, batches.in_order(_shuffled(photos, seed)))


SCORE_NAMES = {
    "bleu_1": "BLEU-1", "bleu_2": "BLEU-2", "bleu_3": "BLEU-3", "bleu_4": "BLEU-4",
    "rouge_l": "ROUGE-L", "cider": "CIDEr",
}  # fmt: skip
"""What papers report, by the names of ``PhotoScores.corpus``."""


@dataclass(frozen=True)
class CaptionScores:
    """What a captioner's captions of a split are worth."""

    photos: PhotoScores
    """Of each photo: for corpus scores, intervals and comparisons."""
    blind: PhotoScores
    """The same captions, each held against another photo's references."""
    summary: dict[str, float]
    """By the names under which they are reported."""


def score_captions(
    captions: list[Caption], split: Split, seed: int, train: Iterable[str] | None = None
) -> CaptionScores:
    """Scores captions of a split's photos against its references, which no vocabulary has cut.

    Beside BLEU, ROUGE-L and CIDEr: ``cider_blind``, where each caption is held against another photo's references;
    ``distinct_captions``, the share of captions that are unlike all before them; ``words_used``, how many words occur
    at all; ``mean_length`` in tokens; with the train captions, ``copied_from_train``, the share of captions that stand
    in it word for word; and the tutorial's own protocol, which compares with the tutorial only.

    Raises:
        InputError: no photos.
    """
    texts = [caption.text for caption in captions]
    scores = score(texts, split.references)
    tokens = [tokenize(text) for text in texts]
    order = _shuffled(len(texts), seed)
    summary = scores.corpus()
    blind = score([texts[other] for other in order], split.references)
    summary["cider_blind"] = blind.corpus()["cider"]
    summary["distinct_captions"] = len(set(tokens)) / len(tokens)
    summary["words_used"] = len({token for caption in tokens for token in caption})
    summary["mean_length"] = sum(map(len, tokens)) / len(tokens)
    if train is not None:
        known = {tokenize(caption) for caption in train}
        summary["copied_from_train"] = sum(caption in known for caption in tokens) / len(tokens)
    return CaptionScores(scores, blind, summary | tutorial_bleu(texts, split.references))


def _shuffled(photos: int, seed: int) -> NDArray[np.int64]:
    """An order in which no photo stays in its place, as one alone must: a cycle through all of them."""
    order = np.random.default_rng(seed).permutation(photos)
    shuffled = np.empty_like(order)
    shuffled[order] = np.roll(order, 1)
    return shuffled
