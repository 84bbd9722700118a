"""What a captioner is worth on an experiment's data."""

import logging
import time
from dataclasses import dataclass

import numpy as np

from capexp.captioning.captioner import Caption, Captioner
from capexp.captioning.evaluation import CaptionScores, Loss, blind_cross_entropy, cross_entropy, score_captions
from capexp.data.batches import CaptionBatches
from capexp.data.captions import Split, SplitName, read_splits, read_texts
from capexp.data.features import Features
from capexp.data.vgg16 import identify
from capexp.errors import InputError
from capexp.experiment import Experiment, replace
from capexp.metrics.java import Unavailable, meteor, spice
from capexp.metrics.scores import Difference, paired_difference, score
from capexp.preparation import Prepared, read_features

log = logging.getLogger(__name__)

_PART = 512  # photos whose features are in memory at once


@dataclass(frozen=True)
class Measured:
    """What a trained captioner comes to on the dev split."""

    blind: Loss
    """On photos shuffled among captions: its distance to the dev loss is the photo's worth."""
    captions: list[Caption]
    scores: CaptionScores

    def metrics(self) -> dict[str, float]:
        """By the names under which MLflow holds them."""
        return {f"dev_{name}": value for name, value in self.scores.summary.items()} | {
            "dev_loss_blind": self.blind.per_token
        }


def measure(experiment: Experiment, prepared: Prepared, captioner: Captioner) -> Measured:
    """Blind loss, captions and scores on the dev split; the test split is not read."""
    dev, features = prepared.splits["dev"], prepared.features["dev"]
    batches = prepared.batches("dev", experiment.training)
    blind = blind_cross_entropy(captioner.decoder, batches, len(dev.photos), experiment.seed)
    captions = caption_all(captioner, features)
    train = [text for references in prepared.splits["train"].references for text in references]
    return Measured(blind, captions, score_captions(captions, dev, experiment.seed, train))


def caption_all(captioner: Captioner, features: Features) -> list[Caption]:
    """A caption of each photo; the features are read a part at a time."""
    return [caption for part in features.parts(_PART) for caption in captioner.caption_features(part)]


def refuse_other_data(experiment: Experiment, captioner: Captioner) -> None:
    """Keeps an experiment that nobody named from lending its data to another's captioner.

    Raises:
        InputError: the captioner was trained beside another dev split than the experiment's.
    """
    digest = read_splits(experiment.captions, ("dev",))["dev"].digest()
    if captioner.training is None or captioner.training.dev_digest != digest:
        raise InputError(
            f"the captioner was not trained on the data of {experiment.name}; name its own with --experiment"
        )


def evaluate(experiment: Experiment, captioner: Captioner, split: SplitName, java: bool = False) -> dict[str, object]:
    """The losses of a captioner on a split of an experiment's data, and the scores of its captions.

    With ``java`` METEOR and SPICE too: None where they cannot be had, with the reason in the log.

    Raises:
        InputError: the captioner's encoder is not the one that the experiment's features come from.
    """
    identity = identify(experiment.features)
    if identity.key() != captioner.encoder_identity.key():
        raise InputError(
            f"the captioner takes features of {captioner.encoder_identity}, experiment {experiment.name} gives those "
            f"of {identity}; name the experiment it was trained with, or set features.layer, pool, size and weights"
        )
    data = read_splits(experiment.captions, (split,))[split]
    features = read_features(experiment, [data], identity)[split]
    training = experiment.training
    batches = CaptionBatches(data, captioner.vocabulary, features, training.batch_size, training.order)
    loss = cross_entropy(captioner.decoder, batches.in_order())
    blind = blind_cross_entropy(captioner.decoder, batches, len(data.photos), experiment.seed)
    start = time.perf_counter()
    captions = caption_all(captioner, features)
    seconds = time.perf_counter() - start
    scores = score_captions(captions, data, experiment.seed, read_texts(experiment.captions, "train"))
    return {
        "experiment": experiment.name,
        "captions": str(experiment.captions.root.absolute()),
        "split": split,
        "split_digest": data.digest(),
        "vocabulary_digest": captioner.vocabulary.digest(),
        "photos": len(data.photos),
        "targets": loss.targets,
        "cross_entropy": loss.per_token,
        "perplexity": loss.perplexity,
        "cross_entropy_blind": blind.per_token,
        **scores.summary,
        **(_java_scores(captions, data) if java else {}),
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
    """Two captioners on the same split of an experiment's data, each as it decodes, with a paired bootstrap.

    Each gets the features of its own layer, pool and size.

    Raises:
        InputError: a captioner's encoder has other weights than the experiment's features.
    """
    data = read_splits(experiment.captions, (split,))[split]
    said = []
    for captioner in captioners:
        encoder = captioner.encoder_identity
        taken = {"features.layer": encoder.layer, "features.pool": encoder.pool, "features.size": encoder.size}
        own = replace(experiment, taken)
        identity = identify(own.features)
        if identity.key() != encoder.key():
            raise InputError(f"a captioner takes features of {encoder}, not of {identity}; set features.weights")
        features = read_features(own, [data], identity)[split]
        said.append(caption_all(captioner, features))
    first, second = (score([caption.text for caption in captions], data.references) for captions in said)
    order = np.argsort(first.cider - second.cider, kind="stable")
    most = tuple(
        PhotoDifference(
            data.photos[photo],
            (said[0][photo].text, said[1][photo].text),
            (float(first.cider[photo]), float(second.cider[photo])),
        )
        for photo in order
        if said[0][photo].text != said[1][photo].text
    )
    differences = paired_difference(second, first, seed=experiment.seed)
    return Comparison(len(data.photos), (first.corpus(), second.corpus()), differences, most)
