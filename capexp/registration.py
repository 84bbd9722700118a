"""From a trained captioner to a registered version: its bundle, its card, its claim to be champion."""

import logging
import time
from pathlib import Path

from capexp import __version__
from capexp.captioning.captioner import Captioner, TrainingRecord
from capexp.data.errors import InputError
from capexp.data.features import NETS, State, encoder_at_hand, load_encoder
from capexp.experiment import Experiment
from capexp.measurement import Measured, measure
from capexp.members import member_name, members_of
from capexp.preparation import Prepared
from capexp.scoring.evaluation import SCORE_NAMES, perplexity
from capexp.tracking import registry
from capexp.tracking.registry import Version
from capexp.tracking.run import TrackedRun, git_commit
from capexp.tracking.score import Score
from capexp.tracking.store import undisturbed

log = logging.getLogger(__name__)

_SETTING_LENGTH = 80  # of one on the card, which may hold 5,000 letters in all


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
            {"dev_loss": captioner.training.dev_loss, "dev_cider": measured.scores.summary["cider"]},
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


def register_bundle(
    tracked: TrackedRun, experiment: Experiment, prepared: Prepared, bundle: Path, promote: bool
) -> Version:
    """Measures a captioner that another run has trained, and registers it under a run above that one."""
    captioner = Captioner.load(bundle)
    measured = measure(experiment, prepared, captioner)
    assert captioner.training is not None
    tracked.log_metrics(measured.metrics(), captioner.training.epoch or 0, time.time_ns() // 1_000_000)
    return register(tracked, experiment, prepared, captioner, measured, promote, encoder_weights(experiment))


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
        return f"{measured.scores.summary[key]:.3f} ({low:.3f} to {high:.3f})"

    scores = ", ".join(f"{title} {told(key)}" for key, title in SCORE_NAMES.items())
    epoch = "" if best.epoch is None else f", epoch {best.epoch}"
    rows = {
        "dev loss": f"{nats:.4f} nats per token (perplexity {perplexity(nats):.2f}){epoch}",
        "dev loss, photos shuffled": f"{measured.blind.per_token:.4f}",
        "dev captions": f"{scores}: by {experiment.decoding.describe()}, with 95% bootstrap intervals over photos",
        "CIDEr, photos shuffled": f"{measured.scores.summary['cider_blind']:.3f}",
        "train loss": "" if best.train_loss is None else f"{best.train_loss:.4f} (dropout on)",
        "members": "; ".join(member_name(member) for member in members_of(experiment))
        if experiment.is_ensemble
        else "",
        "trained on": f"{len(train.photos)} photos, {captions} captions of `{experiment.captions.root.name}`",
        "measured on": f"{len(dev.photos)} dev photos; the test split was not read",
        "vocabulary": f"{len(prepared.vocabulary)} entries, cleaning `{experiment.vocabulary.cleaning}`",
        "parameters": f"{prepared.decoder_parameters:,} trainable",
        "seed": str(experiment.seed),
        "code": f"capexp {__version__}, commit {git_commit() or 'unknown'}",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items() if value)
    settings = "\n".join(
        f"{name} = {value[:_SETTING_LENGTH]}"
        for name, value in experiment.flat().items()
        if name.partition(".")[0] in ("vocabulary", "features", "model", "training", "ensemble", "decoding")
    )
    model = experiment.registry.model
    decoders = {one.model.decoder for one in members_of(experiment)} if experiment.is_ensemble else set()
    kind = (
        f"ensemble of {' and '.join(sorted(decoders))} decoders" if decoders else f"{experiment.model.decoder} decoder"
    )
    return f"""**{experiment.name}**: {kind} on {prepared.encoder}.

| | |
| --- | --- |
{table}

It says what it has seen people say of such photos: of others it may be wrong, and sure of it.

```python
mlflow.pyfunc.load_model("models:/{model}@champion").predict(pandas.DataFrame({{"photo": [base64_text]}}))
mlflow.MlflowClient().set_registered_model_alias("{model}", "champion", "1")  # go back to version 1
```

Settings; the whole of them is `experiment.toml` among the run's artifacts:

```
{settings}
```
"""
