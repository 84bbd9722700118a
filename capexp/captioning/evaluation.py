"""Evaluates captioners on a split: cross-entropy, scores of captions, the image-blind baseline, a paired comparison.

The image-blind baseline is the same captioner with the photos shuffled among the captions. The difference from it shows
how much the captioner gains from the photo.
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
from capexp.data.cache import Identity
from capexp.data.captions import Split, read_splits, read_texts
from capexp.data.dataset import Dataset
from capexp.data.feature_files import FileIdentity
from capexp.data.features import Features
from capexp.errors import InputError
from capexp.experiment import replace_settings
from capexp.metrics.java import Unavailable, meteor, spice
from capexp.metrics.scores import Difference, PhotoScores, paired_difference, score, tokenize, tutorial_bleu
from capexp.settings import NO_FILE, UNKNOWN_WEIGHTS, WEIGHTS, Experiment, SplitName, TokenRule

log = logging.getLogger(__name__)

_PART = 512  # photos whose features are in memory at once


@dataclass(frozen=True)
class Loss:
    """The cross-entropy of the next word over all targets of a split, EOS included."""

    total: float
    """In nats."""
    targets: int

    @property
    def per_token(self) -> float:
        """The mean cross-entropy in nats per token."""
        return self.total / self.targets

    @property
    def perplexity(self) -> float:
        """The exponential of the nats per token."""
        return perplexity(self.per_token)


def perplexity(nats_per_token: float) -> float:
    """Return the exponential of a cross-entropy in nats per token, capped at exp(709): a float overflows soon after."""
    return math.exp(min(nats_per_token, 709.0))


@torch.inference_mode()
def cross_entropy(decoder: Decoder, batches: Iterable[Batch]) -> Loss:
    """Return the decoder's loss in evaluation mode and float32, summed over all targets."""
    decoder.eval()
    device = next(decoder.parameters()).device
    total, targets = 0.0, 0
    for batch in batches:
        moved = batch.to(device)
        nats = decoder.cross_entropy(moved.features, moved.photos, moved.words, moved.targets, moved.counts)
        total += float(nats) * len(moved.targets)
        targets += len(moved.targets)
    return Loss(total, targets)


def blind_cross_entropy(decoder: Decoder, batches: CaptionBatches, seed: int) -> Loss:
    """Return the loss of the image-blind baseline: each photo's captions are scored given another photo.

    The photos are shuffled so that none keeps its own captions (a cycle in random order).
    """
    return cross_entropy(decoder, batches.in_order(_shuffled(len(batches.split.photos), seed)))


SCORE_NAMES = {
    "bleu_1": "BLEU-1", "bleu_2": "BLEU-2", "bleu_3": "BLEU-3", "bleu_4": "BLEU-4",
    "rouge_l": "ROUGE-L", "cider": "CIDEr",
}  # fmt: skip
"""The scores that papers report: maps keys of ``PhotoScores.corpus`` to the names used in papers."""


@dataclass(frozen=True)
class CaptionScores:
    """The scores of a captioner's captions of a split."""

    photos: PhotoScores
    """The scores of each photo, from which corpus scores, intervals and comparisons are computed."""
    blind: PhotoScores
    """The image-blind baseline: the same captions, each scored against another photo's references."""
    summary: dict[str, float]
    """The corpus scores and statistics, keyed by the names under which they are reported."""


def score_captions(
    captions: list[Caption],
    split: Split,
    seed: int,
    train: Iterable[str] | None = None,
    rule: TokenRule = "words",
) -> CaptionScores:
    """Score captions of a split's photos against its references, whose words are not limited to any vocabulary.

    ``rule`` says how captions and references are split into tokens; pass the captioner's ``vocabulary.tokens``.

    The summary contains BLEU, ROUGE-L and CIDEr, and

    * ``cider_plain``: CIDEr without clipping and length penalty;
    * ``cider_blind``: CIDEr with each caption scored against another photo's references;
    * ``distinct_captions``: the number of distinct captions divided by the number of captions;
    * ``words_used``: the number of distinct words in all captions;
    * ``mean_length``: the mean number of tokens per caption;
    * ``copied_from_train``, only with the ``train`` captions: the share of captions that occur in them word for word;
    * ``tutorial_bleu_1`` to ``4``: the tutorial's own protocol, comparable with the tutorial only.
    """
    texts = [caption.text for caption in captions]
    scores = score(texts, split.references, rule)
    tokens = [tokenize(text, rule) for text in texts]
    order = _shuffled(len(texts), seed)
    summary = scores.corpus()
    blind = score([texts[other] for other in order], split.references, rule)
    summary["cider_blind"] = blind.corpus()["cider"]
    summary["distinct_captions"] = len(set(tokens)) / len(tokens)
    summary["words_used"] = len({token for caption in tokens for token in caption})
    summary["mean_length"] = sum(map(len, tokens)) / len(tokens)
    if train is not None:
        known = {tokenize(caption, rule) for caption in train}
        summary["copied_from_train"] = sum(caption in known for caption in tokens) / len(tokens)
    return CaptionScores(scores, blind, summary | tutorial_bleu(texts, split.references))


def _shuffled(photos: int, seed: int) -> NDArray[np.int64]:
    """Return a random cyclic permutation: no photo keeps its position (unless there is only one)."""
    order = np.random.default_rng(seed).permutation(photos)
    shuffled = np.empty_like(order)
    shuffled[order] = np.roll(order, 1)
    return shuffled


@dataclass(frozen=True)
class Evaluation:
    """The evaluation of a trained captioner on a split, as a run reports it."""

    blind: Loss
    """The loss of the image-blind baseline."""
    captions: list[Caption]
    scores: CaptionScores

    def metrics(self) -> dict[str, float]:
        """Return the metrics to log, keyed by their MLflow names (``dev_...``)."""
        return {f"dev_{name}": value for name, value in self.scores.summary.items()} | {
            "dev_loss_blind": self.blind.per_token
        }


def evaluate_dev(captioner: Captioner, batches: CaptionBatches, train: Iterable[str], seed: int) -> Evaluation:
    """Evaluate a captioner on dev ``batches``; ``train`` are the train captions, for ``copied_from_train``."""
    blind = blind_cross_entropy(captioner.decoder, batches, seed)
    captions = caption_all(captioner, batches.features)
    scores = score_captions(captions, batches.split, seed, train, captioner.vocabulary.tokens)
    return Evaluation(blind, captions, scores)


def caption_all(captioner: Captioner, features: Features) -> list[Caption]:
    """Return a caption of each photo; only a part of the features is in memory at a time."""
    return [caption for part in features.parts(_PART) for caption in captioner.caption_features(part)]


def require_trained_on(experiment: Experiment, captioner: Captioner) -> None:
    """Raise InputError if this experiment's dev split is not the one that was used in the captioner's training.

    Commands call this if the user has not named the experiment.
    """
    with_photos = experiment.features.from_photos
    digest = read_splits(experiment.captions, ("dev",), captioner.splits, with_photos)["dev"].digest()
    if captioner.record is None or captioner.record.dev_digest != digest:
        raise InputError(
            f"the captioner was not trained on the data of experiment {experiment.name} (its dev split differs or is "
            "not recorded); give the experiment that it was trained on: --experiment NAME"
        )


def evaluate(experiment: Experiment, captioner: Captioner, split: SplitName, java: bool = False) -> dict[str, object]:
    """Return a captioner's losses on a split, scores of its captions with intervals, decoding settings, and speed.

    With ``java`` also METEOR and SPICE. If one of them cannot run, its value is None and the log gives the reason.
    """
    if experiment.captions.splits == "random" and captioner.splits is None:
        log.warning(
            "the captioner was not trained on random splits: photos of this random split may be among its train photos"
        )
    _require_file(experiment, captioner.encoder_identity)
    data = _read(experiment, captioner, split)
    if data.encoder.key() != captioner.encoder_identity.key():
        raise InputError(
            f"the captioner takes features of {captioner.encoder_identity}, experiment {experiment.name} gives those "
            f"of {data.encoder}; name the experiment it was trained with, or set features.layer, pool, size, resize "
            "and weights, or features.file"
        )
    batches = _with_features(data, captioner).batches(split, experiment.training)
    loss = cross_entropy(captioner.decoder, batches.in_order())
    blind = blind_cross_entropy(captioner.decoder, batches, experiment.seed)
    start = time.perf_counter()
    captions = caption_all(captioner, batches.features)
    seconds = time.perf_counter() - start
    train = read_texts(experiment.captions, "train", captioner.splits)
    scores = score_captions(captions, batches.split, experiment.seed, train, captioner.vocabulary.tokens)
    return {
        "experiment": experiment.name,
        "captions": str(experiment.captions.root.absolute()),
        "split": split,
        "split_digest": batches.split.digest(),
        "vocabulary_digest": captioner.vocabulary.digest(),
        "tokens": captioner.vocabulary.tokens,
        "photos": len(captions),
        "targets": loss.targets,
        "cross_entropy": loss.per_token,
        "perplexity": loss.perplexity,
        "cross_entropy_blind": blind.per_token,
        **scores.summary,
        **(_java_scores(captions, batches.split, captioner.vocabulary.tokens) if java else {}),
        "intervals": scores.photos.intervals(seed=experiment.seed),
        "decoding": captioner.decoding.model_dump(),
        "captions_per_second": len(captions) / seconds,
    }


def _java_scores(captions: list[Caption], split: Split, rule: TokenRule) -> dict[str, float | None]:
    texts = [caption.text for caption in captions]
    scores: dict[str, float | None] = {}
    for name, metric in (("meteor", meteor), ("spice", spice)):
        value = metric(texts, split.references, rule)
        if isinstance(value, Unavailable):
            log.warning("%s: left out: %s", name, value.reason)
        scores[name] = None if isinstance(value, Unavailable) else value
    return scores


@dataclass(frozen=True)
class PhotoDifference:
    """A photo to which two captioners give different captions, and the CIDEr of each caption."""

    photo: str
    captions: tuple[str, str]
    cider: tuple[float, float]


@dataclass(frozen=True)
class Comparison:
    """The comparison of two captioners on the same photos."""

    photos: int
    scores: tuple[dict[str, float], dict[str, float]]
    differences: dict[str, Difference]
    """For each score, the second captioner's minus the first's, with interval and p-value."""
    most: tuple[PhotoDifference, ...]
    """All photos with different captions, sorted by the second captioner's CIDEr minus the first's, largest first."""


def compare(experiment: Experiment, captioners: tuple[Captioner, Captioner], split: SplitName) -> Comparison:
    """Compare two captioners on a split of an experiment's data, by a paired bootstrap.

    Each captioner has its own decoding settings, and the features of its own layer, pool, size and resize.
    """
    rule = _common_rule(captioners)
    if experiment.captions.splits == "random" and captioners[0].splits != captioners[1].splits:
        raise InputError(
            "the captioners were trained on different random splits; compare captioners that were trained on the same "
            "splits"
        )
    # Caption all photos with each captioner.
    hypotheses = []
    for captioner in captioners:
        own = _with_features_of(experiment, captioner.encoder_identity)
        data = _read(own, captioner, split)
        if data.encoder.key() != captioner.encoder_identity.key():
            raise _other_features(captioner, data)
        hypotheses.append(caption_all(captioner, _with_features(data, captioner).features[split]))
    # Score the captions; sort the photos by the difference in CIDEr.
    photos, references = data.splits[split].photos, data.splits[split].references
    first, second = (score([caption.text for caption in captions], references, rule) for captions in hypotheses)
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


def _read(experiment: Experiment, captioner: Captioner, split: SplitName) -> Dataset:
    """Read a split, and train too if the captioner needs train photos that its bundle does not hold."""
    names: tuple[SplitName, ...] = (split,)
    if _lacks_neighbours(captioner):
        names = tuple(dict.fromkeys((split, "train")))
    experiment = replace_settings(experiment, {"features.mirror": False, "features.crops": 0})  # photos as they are
    return Dataset.read(experiment, names, captioner.vocabulary, captioner.splits)


def _with_features(data: Dataset, captioner: Captioner) -> Dataset:
    """Compute the features, and give the captioner the train photos that it lacks."""
    data = data.with_features()
    if _lacks_neighbours(captioner):
        captioner.take_neighbours(data)
    return data


def _lacks_neighbours(captioner: Captioner) -> bool:
    return captioner.decoding.neighbours > 0 and captioner.neighbours is None


def _with_features_of(experiment: Experiment, identity: Identity) -> Experiment:
    """Return the experiment with the features that a captioner takes: of its own encoder, or of ``features.file``."""
    _require_file(experiment, identity)
    if isinstance(identity, FileIdentity):
        return replace_settings(experiment, {"features.weights": UNKNOWN_WEIGHTS})
    own = {f"features.{name}": getattr(identity, name) for name in ("layer", "pool", "size", "resize")}
    if experiment.features.weights == UNKNOWN_WEIGHTS:
        if identity.weights not in WEIGHTS:
            raise InputError(f"a captioner takes features of {identity}; give its weights with --features.weights")
        own["features.weights"] = identity.weights
    return replace_settings(experiment, own | {"features.file": NO_FILE})


def _require_file(experiment: Experiment, identity: Identity) -> None:
    """Raise InputError if a captioner takes the features of a file and the experiment names none."""
    if isinstance(identity, FileIdentity) and experiment.features.from_photos:
        raise InputError(f"a captioner takes features of {identity}; give that file with --features.file")


def _other_features(captioner: Captioner, data: Dataset) -> InputError:
    setting = "file" if isinstance(captioner.encoder_identity, FileIdentity) else "weights"
    return InputError(
        f"a captioner takes features of {captioner.encoder_identity}, not of {data.encoder}; set features.{setting}"
    )


def _common_rule(captioners: tuple[Captioner, Captioner]) -> TokenRule:
    """Return the token rule with which the captions of both captioners are scored."""
    first, second = (captioner.vocabulary.tokens for captioner in captioners)
    if first == second:
        return first
    if "characters" in (first, second):
        raise InputError(
            f"the captioners' captions are split into {first} and into {second}; compare captioners with the same "
            "vocabulary.tokens"
        )
    log.warning("one vocabulary was split at whitespace; both captioners' captions are scored on COCO's tokens")
    return "words"
