"""A captioner on a split: cross-entropy, scores of its captions, the image-blind baseline, and two compared.

Image-blind is a captioner whose photos are shuffled among the captions: what it loses is what the photo is worth.

Shapes: M targets, H hidden.
"""

import logging
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from capexp.captioning.captioner import Caption, Captioner
from capexp.captioning.decoder import Decoder
from capexp.data.batches import Batch, CaptionBatches
from capexp.data.captions import Split, read_splits, read_texts
from capexp.data.dataset import Dataset
from capexp.data.features import Features
from capexp.errors import InputError
from capexp.experiment import replace_settings
from capexp.metrics.java import Unavailable, meteor, spice
from capexp.metrics.scores import Difference, PhotoScores, paired_difference, score, tokenize, tutorial_bleu
from capexp.settings import Experiment, SplitName

log = logging.getLogger(__name__)

_PART = 512  # photos whose features are in memory at once


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


def blind_cross_entropy(decoder: Decoder, batches: CaptionBatches, seed: int) -> Loss:
    """The loss where each photo's captions are read beside another photo: what the photo is not worth.

    The photos are shuffled so that none stays in its place (a cycle in random order).
    """
    return cross_entropy(decoder, batches.in_order(_shuffled(len(batches.split.photos), seed)))


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


@dataclass(frozen=True)
class Evaluation:
    """A trained captioner on a split, in all that a run reports."""

    blind: Loss
    """Image-blind."""
    captions: list[Caption]
    scores: CaptionScores

    def metrics(self) -> dict[str, float]:
        """Return the values by the names under which MLflow has those of dev."""
        return {f"dev_{name}": value for name, value in self.scores.summary.items()} | {
            "dev_loss_blind": self.blind.per_token
        }


def evaluate_dev(captioner: Captioner, batches: CaptionBatches, train: Iterable[str], seed: int) -> Evaluation:
    """Evaluate a captioner on dev ``batches``; ``train`` are the train captions, to count what is copied from them."""
    blind = blind_cross_entropy(captioner.decoder, batches, seed)
    captions = caption_all(captioner, batches.features)
    return Evaluation(blind, captions, score_captions(captions, batches.split, seed, train))


def caption_all(captioner: Captioner, features: Features) -> list[Caption]:
    """Caption each photo; the features are read a part at a time."""
    return [caption for part in features.parts(_PART) for caption in captioner.caption_features(part)]


def require_trained_on(experiment: Experiment, captioner: Captioner) -> None:
    """Refuse a captioner that was trained beside another dev split than that of an experiment nobody named."""
    digest = read_splits(experiment.captions, ("dev",))["dev"].digest()
    if captioner.record is None or captioner.record.dev_digest != digest:
        raise InputError(
            f"the captioner was not trained on the data of {experiment.name}; name its own with --experiment"
        )


def evaluate(experiment: Experiment, captioner: Captioner, split: SplitName, java: bool = False) -> dict[str, object]:
    """Return the losses of a captioner on a split of an experiment's data, and the scores of its captions.

    With ``java`` METEOR and SPICE too: None where they cannot be had, with the reason in the log.
    """
    data = Dataset.read(experiment, (split,), captioner.vocabulary)
    if data.encoder.key() != captioner.encoder_identity.key():
        raise InputError(
            f"the captioner takes features of {captioner.encoder_identity}, experiment {experiment.name} gives those "
            f"of {data.encoder}; name the experiment it was trained with, or set features.layer, pool, size and weights"
        )
    batches = data.with_features(experiment).batches(split, experiment.training)
    loss = cross_entropy(captioner.decoder, batches.in_order())
    blind = blind_cross_entropy(captioner.decoder, batches, experiment.seed)
    start = time.perf_counter()
    captions = caption_all(captioner, batches.features)
    seconds = time.perf_counter() - start
    scores = score_captions(captions, batches.split, experiment.seed, read_texts(experiment.captions, "train"))
    return {
        "experiment": experiment.name,
        "captions": str(experiment.captions.root.absolute()),
        "split": split,
        "split_digest": batches.split.digest(),
        "vocabulary_digest": captioner.vocabulary.digest(),
        "photos": len(captions),
        "targets": loss.targets,
        "cross_entropy": loss.per_token,
        "perplexity": loss.perplexity,
        "cross_entropy_blind": blind.per_token,
        **scores.summary,
        **(_java_scores(captions, batches.split) if java else {}),
        "intervals": scores.photos.intervals(seed=experiment.seed),
        "decoding": captioner.decoding.model_dump(),
        "captions_per_second": len(captions) / seconds,
    }


def _java_scores(captions: list[Caption], split: Split) -> dict[str, float | None]:
    texts = [caption.text for caption in captions]
    found: dict[str, float | None] = {}
    for name, metric in (("meteor", meteor), ("spice", spice)):
        value = metric(texts, split.references)
        if isinstance(value, Unavailable):
            log.warning("%s: left out: %s", name, value.reason)
        found[name] = None if isinstance(value, Unavailable) else value
    return found


@dataclass(frozen=True)
class PhotoDifference:
    """A photo of which two captioners say things of different worth."""

    photo: str
    captions: tuple[str, str]
    cider: tuple[float, float]


@dataclass(frozen=True)
class Comparison:
    """Two captioners on the same photos."""

    photos: int
    scores: tuple[dict[str, float], dict[str, float]]
    differences: dict[str, Difference]
    """By score: that of the second minus that of the first, with interval and p."""
    most: tuple[PhotoDifference, ...]
    """Photos from the one where the second is most ahead in CIDEr to the one where the first is."""


def compare(experiment: Experiment, captioners: tuple[Captioner, Captioner], split: SplitName) -> Comparison:
    """Compare two captioners on a split of an experiment's data, each decoded by its own settings (paired bootstrap).

    Each gets the features of its own layer, pool and size.
    """
    hypotheses = []
    for captioner in captioners:
        encoder = captioner.encoder_identity
        taken = {"features.layer": encoder.layer, "features.pool": encoder.pool, "features.size": encoder.size}
        own = replace_settings(experiment, taken)
        data = Dataset.read(own, (split,), captioner.vocabulary)
        if data.encoder.key() != encoder.key():
            raise InputError(f"a captioner takes features of {encoder}, not of {data.encoder}; set features.weights")
        hypotheses.append(caption_all(captioner, data.with_features(own).features[split]))
    photos, references = data.splits[split].photos, data.splits[split].references
    first, second = (score([caption.text for caption in captions], references) for captions in hypotheses)
    order = np.argsort(first.cider - second.cider, kind="stable")
    most = tuple(
        PhotoDifference(
            photos[photo],
            (hypotheses[0][photo].text, hypotheses[1][photo].text),
            (float(first.cider[photo]), float(second.cider[photo])),
        )
        for photo in order
        if hypotheses[0][photo].text != hypotheses[1][photo].text
    )
    differences = paired_difference(second, first, seed=experiment.seed)
    return Comparison(len(photos), (first.corpus(), second.corpus()), differences, most)
