"""From a trained captioner to a registered version: its bundle, its card, its claim to be champion."""

import logging
import shutil
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from capexp import __version__
from capexp.captioning.bundle import TrainingRecord
from capexp.captioning.captioner import Captioner
from capexp.captioning.evaluation import SCORE_NAMES, perplexity
from capexp.data.vgg16 import encoder_at_hand, load_encoder
from capexp.data.vgg16_weights import NETS, State
from capexp.errors import InputError, Unsent
from capexp.experiment import Experiment
from capexp.measurement import Measured, measure
from capexp.members import member_name, members_of
from capexp.preparation import Prepared
from capexp.tracking import registry
from capexp.tracking.registry import Version
from capexp.tracking.run import PATIENCE, SHORT_PATIENCE, TrackedRun, git_commit
from capexp.tracking.score import Score
from capexp.tracking.store import undisturbed

log = logging.getLogger(__name__)

_BUNDLE = "bundle"  # in the run's folder, until the store has it
_SETTING_LENGTH = 80  # of one on the card, which may hold 5,000 letters in all


@dataclass(frozen=True)
class Claim:
    """What is to become of a captioner that lies in a run's folder: all that a later process needs to know."""

    name: str | None
    """Of the registered model; None where the captioner is only logged."""
    card: str = ""
    tags: dict[str, str] = field(default_factory=dict)
    score: dict[str, Any] = field(default_factory=dict)
    promote: bool = False


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

    Raises:
        Unsent: the server is away; it is to be done later.
    """
    assert captioner.training is not None
    score = Score(
        experiment.registry.metric,
        {"dev_loss": captioner.training.dev_loss, "dev_cider": measured.scores.summary["cider"]},
        prepared.splits["dev"].digest(),
        prepared.vocabulary.digest(),
    )
    card = _card(experiment, prepared, captioner.training, measured)
    tags = score.tags() | {"experiment": experiment.name, "git_commit": git_commit()}
    claim = Claim(experiment.registry.model, card, tags, asdict(score), promote)
    version = _make(tracked, captioner, encoder, claim, PATIENCE)
    assert version is not None
    log.debug("registered %s", version.describe())
    return version


def keep(tracked: TrackedRun, captioner: Captioner, encoder: State | None) -> None:
    """Logs the best captioner of a run that is interrupted, without registering it; now, or with what is sent later."""
    with suppress(Unsent):  # which the run's end tells of
        _make(tracked, captioner, encoder, Claim(None), SHORT_PATIENCE)


def _make(
    tracked: TrackedRun, captioner: Captioner, encoder: State | None, claim: Claim, patience: float
) -> Version | None:
    captioner.save(tracked.folder / _BUNDLE, encoder)
    version = tracked.claim(asdict(claim), lambda: carry_out(tracked, claim), patience)
    clear(tracked.folder)
    return version


def carry_out(tracked: TrackedRun, claim: Claim) -> Version | None:
    """Does what is claimed of the bundle in the run's folder, in as far as it was not done before.

    Raises:
        InputError: the bundle is missing or damaged.
    """
    bundle = tracked.folder / _BUNDLE
    captioner = Captioner.load(bundle)
    version = None
    with undisturbed():
        if claim.name is None:
            registry.log_captioner(tracked.run_id, bundle)
        else:
            number = registry.registered_version(claim.name, tracked.run_id, captioner)
            if number is None:
                model_id = registry.log_captioner(tracked.run_id, bundle)
                number = registry.register_model(model_id, claim.name, captioner)
            registry.describe_version(claim.name, number, captioner, claim.card, claim.tags)
            version = registry.crown(claim.name, number, Score(**claim.score), force=claim.promote)
            said = {"registered_version": f"{claim.name}/{number}", "champion": f"{version.champion}: {version.reason}"}
            tracked.set_tags(said)
    return version


def clear(folder: Path) -> None:
    """Deletes the bundle in a run's folder that waited for the store."""
    shutil.rmtree(folder / _BUNDLE, ignore_errors=True)


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
