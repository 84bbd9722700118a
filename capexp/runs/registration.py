"""From a trained captioner to a registered version: bundle, model card, and the alias ``champion`` if it earns it."""

import logging
import shutil
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from capexp.captioning.captioner import Captioner
from capexp.captioning.evaluation import Evaluation
from capexp.data.vgg16 import encoder_at_hand, load_encoder
from capexp.data.vgg16_weights import State
from capexp.errors import InputError, Unsent
from capexp.report.model_card import model_card
from capexp.runs.conclusion import evaluate_on_dev
from capexp.runs.lifecycle import OpenRun
from capexp.settings import WEIGHTS, Experiment
from capexp.tracking import registry
from capexp.tracking.known_runs import git_commit
from capexp.tracking.registry import Score, Version
from capexp.tracking.run import PATIENCE, SHORT_PATIENCE, TrackedRun
from capexp.tracking.store import undisturbed

log = logging.getLogger(__name__)

_BUNDLE = "bundle"  # in the run's folder, until the store has it


@dataclass(frozen=True)
class Registration:
    """What is to be done with the bundle in a run's folder: all that a later process needs to know."""

    name: str | None
    """Of the registered model; None where the captioner is only logged."""
    card: str = ""
    tags: dict[str, str] = field(default_factory=dict)
    score: dict[str, Any] = field(default_factory=dict)
    promote: bool = False


def register(run: OpenRun, captioner: Captioner, evaluation: Evaluation, encoder: State | None) -> Version:
    """Register a captioner under its run, with card and score, and move ``champion`` to it if it earns it.

    ``encoder`` are VGG16's weights, which travel with it where they are given. An interrupt waits until all is done.
    Raises :class:`Unsent` where the server is away: :func:`carry_out` does it later.
    """
    assert captioner.record is not None
    experiment, data = run.plan.experiment, run.plan.data
    score = Score(
        experiment.registry.metric,
        {"dev_loss": captioner.record.dev_loss, "dev_cider": evaluation.scores.summary["cider"]},
        data.splits["dev"].digest(),
        data.vocabulary.digest(),
    )
    card = model_card(experiment, data, captioner, evaluation)
    tags = score.tags() | {"experiment": experiment.name, "git_commit": git_commit()}
    registration = Registration(experiment.registry.model, card, tags, asdict(score), run.plan.promote)
    version = _deliver(run.tracked, captioner, encoder, registration, PATIENCE)
    assert version is not None
    log.debug("registered %s", version.describe())
    return version


def register_bundle(run: OpenRun, bundle: Path) -> Version:
    """Evaluate a captioner that another run has trained, and register it under a run above that one."""
    captioner = Captioner.load(bundle, run.device)
    evaluation = evaluate_on_dev(run.plan, captioner)
    assert captioner.record is not None
    run.tracked.log_metrics(evaluation.metrics(), captioner.record.epoch or 0, time.time_ns() // 1_000_000)
    return register(run, captioner, evaluation, encoder_weights(run.plan.experiment))


def log_interrupted(tracked: TrackedRun, captioner: Captioner, encoder: State | None) -> None:
    """Log the best captioner of an interrupted run, without registering it; now, or with what is sent later."""
    with suppress(Unsent):  # which the run's end tells of
        _deliver(tracked, captioner, encoder, Registration(None), SHORT_PATIENCE)


def _deliver(
    tracked: TrackedRun, captioner: Captioner, encoder: State | None, registration: Registration, patience: float
) -> Version | None:
    captioner.save(tracked.folder / _BUNDLE, encoder)
    version = tracked.run_when_sent(asdict(registration), lambda: carry_out(tracked, registration), patience)
    delete_bundle(tracked.folder)
    return version


def carry_out(tracked: TrackedRun, registration: Registration) -> Version | None:
    """Do what a registration asks for with the bundle in the run's folder, as far as it is not done yet."""
    bundle = tracked.folder / _BUNDLE
    captioner = Captioner.load(bundle)
    version = None
    with undisturbed():
        if registration.name is None:
            registry.log_captioner(tracked.run_id, bundle)
        else:
            name = registration.name
            number = registry.registered_version(name, tracked.run_id, captioner)
            if number is None:
                model_id = registry.log_captioner(tracked.run_id, bundle)
                number = registry.register_model(model_id, name, captioner)
            registry.describe_version(name, number, captioner, registration.card, registration.tags)
            version = registry.promote(name, number, Score(**registration.score), force=registration.promote)
            champion = f"{version.champion}: {version.reason}"
            tracked.set_tags({"registered_version": f"{name}/{number}", "champion": champion})
    return version


def delete_bundle(folder: Path) -> None:
    """Delete the bundle in a run's folder that waited for the store."""
    shutil.rmtree(folder / _BUNDLE, ignore_errors=True)


def encoder_weights(experiment: Experiment) -> State | None:
    """Return the layers of VGG16 that the captioner needs, where they are at hand: nothing is fetched for this."""
    config = experiment.features
    if not encoder_at_hand(config):
        return None
    try:
        return load_encoder(config).weights()
    except InputError as error:
        if config.weights not in WEIGHTS:
            raise
        log.warning("%s; the model will be registered without VGG16's weights", error)
        return None
