"""From a trained captioner to a registered version: its bundle, its card, its claim to be champion."""

import logging

from capexp.captioning.captioner import Captioner, TrainingRecord
from capexp.data.errors import InputError
from capexp.data.features import NETS, State, encoder_at_hand, load_encoder
from capexp.experiment import Experiment
from capexp.measurement import Measured
from capexp.preparation import Prepared
from capexp.scoring.evaluation import perplexity
from capexp.tracking import registry
from capexp.tracking.registry import Score, Version
from capexp.tracking.run import TrackedRun, git_commit
from capexp.tracking.store import undisturbed

log = logging.getLogger(__name__)


def register(
    tracked: TrackedRun,
    experiment: Experiment,
    prepared: Prepared,
    captioner: Captioner,
    measured: Measured,
    promote: bool,
    encoder: State | None,
) -> Version:
    """Registers a captioner under its run, with its card and score, and moves ``champion`` if it earns it.

    The encoder's weights travel with it where they are given. An interrupt waits until all is done.
    """
    assert captioner.training is not None
    name = experiment.registry.model
    with undisturbed():
        number = registry.registered_version(name, tracked.run_id, captioner)
        if number is None:
            number = registry.log_captioner(tracked.run_id, captioner, encoder, register_as=name)
            assert number is not None
        score = Score(
            experiment.registry.metric,
            captioner.training.dev_loss,
            prepared.splits["dev"].digest(),
            prepared.vocabulary.digest(),
        )
        card = _card(experiment, prepared, captioner.training, measured)
        tags = score.tags() | {"experiment": experiment.name, "git_commit": git_commit()}
        registry.describe_version(name, number, captioner, card, tags)
        version = registry.crown(name, number, score, force=promote)
        said = {"registered_version": f"{name}/{number}", "champion": f"{version.champion}: {version.reason}"}
        tracked.set_tags(said)
    log.debug("registered %s", version.describe())
    return version


def encoder_weights(experiment: Experiment) -> State | None:
    """The layers of VGG16 that the captioner needs, where they are at hand: nothing is fetched for this.

    Raises:
        InputError: a weights file that the settings name cannot be read.
    """
    config = experiment.features
    if not encoder_at_hand(config):
        return None
    try:
        return load_encoder(config).weights()
    except InputError as error:
        if config.weights not in NETS:
            raise
        log.warning("%s; the model will be registered without VGG16's weights", error)
        return None


def _card(experiment: Experiment, prepared: Prepared, best: TrainingRecord, measured: Measured) -> str:
    train, dev = prepared.splits["train"], prepared.splits["dev"]
    captions = sum(map(len, train.references))
    nats = best.dev_loss
    intervals = measured.scores.photos.intervals(seed=experiment.seed)

    def told(key: str) -> str:
        low, high = intervals[key]
        return f"{measured.scores.summary[key]:.3f} (95% {low:.3f} to {high:.3f})"

    rows = {
        "dev loss": f"{nats:.4f} nats per token (perplexity {perplexity(nats):.2f}), epoch {best.epoch}",
        "dev loss, photos shuffled": f"{measured.blind.per_token:.4f}",
        "dev captions": f"BLEU-4 {told('bleu_4')}, CIDEr {told('cider')}, by {_decoding(experiment)}",
        "CIDEr, photos shuffled": f"{measured.scores.summary['cider_blind']:.3f}",
        "train loss": f"{best.train_loss:.4f} (dropout on)",
        "trained on": f"{len(train.photos)} photos, {captions} captions of `{experiment.captions.root.name}`",
        "measured on": f"{len(dev.photos)} dev photos; the test split was not read",
        "vocabulary": f"{len(prepared.vocabulary)} entries, cleaning `{experiment.vocabulary.cleaning}`",
        "parameters": f"{prepared.decoder_parameters:,} trainable",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return f"""**{experiment.name}**: {experiment.model.decoder} decoder on {prepared.encoder}.

| | |
| --- | --- |
{table}

All settings are the params of the run, and `experiment.toml` among its artifacts.
Load it with `mlflow.pyfunc.load_model("models:/{experiment.registry.model}@champion")`.
"""


def _decoding(experiment: Experiment) -> str:
    decoding = experiment.decoding
    return f"beam search of width {decoding.beam_width}" if decoding.method == "beam" else decoding.method
