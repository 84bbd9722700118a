"""What a captioner is worth on an experiment's data."""

import time
from dataclasses import dataclass

import numpy as np

from capexp.captioning.captioner import Caption, Captioner
from capexp.data.batches import CaptionBatches
from capexp.data.captions import SplitName, read_splits
from capexp.data.errors import InputError
from capexp.data.features import identify
from capexp.experiment import Experiment
from capexp.preparation import Prepared, read_features
from capexp.scoring.evaluation import CaptionScores, Loss, blind_cross_entropy, cross_entropy, score_captions


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
    batches = prepared.batches("dev", experiment.training.batch_size)
    blind = blind_cross_entropy(captioner.decoder, batches, len(dev.photos), experiment.seed)
    captions = captioner.caption_features(features.gather(np.arange(len(features))))
    return Measured(blind, captions, score_captions(captions, dev, experiment.seed, prepared.splits["train"]))


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


def evaluate(experiment: Experiment, captioner: Captioner, split: SplitName) -> dict[str, object]:
    """The losses of a captioner on a split of an experiment's data, and the scores of its captions.

    Raises:
        InputError: the captioner's encoder is not the one that the experiment's features come from.
    """
    identity = identify(experiment.features)
    if identity.key() != captioner.encoder_identity.key():
        raise InputError(
            f"the captioner takes features of {captioner.encoder_identity}, experiment {experiment.name} gives those "
            f"of {identity}; name the experiment it was trained with, or set features.layer, pool and weights"
        )
    splits = read_splits(experiment.captions, {split, "train"} if _has_train(experiment) else {split})
    data = splits[split]
    features = read_features(experiment, [data], identity)[split]
    batches = CaptionBatches(data, captioner.vocabulary, features, experiment.training.batch_size)
    loss = cross_entropy(captioner.decoder, batches.in_order())
    blind = blind_cross_entropy(captioner.decoder, batches, len(data.photos), experiment.seed)
    start = time.perf_counter()
    captions = captioner.caption_features(features.gather(np.arange(len(features))))
    seconds = time.perf_counter() - start
    scores = score_captions(captions, data, experiment.seed, splits.get("train"))
    intervals = scores.photos.intervals(seed=experiment.seed)
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
        "intervals": intervals,
        "decoding": captioner.decoding.model_dump(),
        "captions_per_second": len(captions) / seconds,
    }


def _has_train(experiment: Experiment) -> bool:
    """Whether the train captions are here too, to tell copies of them."""
    return experiment.captions.list_of("train").is_file()
