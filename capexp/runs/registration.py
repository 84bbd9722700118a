"""Register a trained captioner with its model card, and set the alias ``champion`` if it scores better."""

import logging
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from capexp.captioning.captioner import Captioner
from capexp.captioning.evaluation import Evaluation
from capexp.data.feature_files import FileIdentity
from capexp.data.vgg16 import encoder_at_hand, load_encoder
from capexp.data.weights_files import State
from capexp.errors import InputError, Unsent
from capexp.report.model_card import model_card
from capexp.runs.conclusion import evaluate_on_dev
from capexp.runs.lifecycle import OpenRun, Plan
from capexp.settings import WEIGHTS
from capexp.tracking import registry
from capexp.tracking.known_runs import git_commit
from capexp.tracking.outbox import Point
from capexp.tracking.registry import Score, Version
from capexp.tracking.run import TrackedRun
from capexp.tracking.store import patience, short_patience, undisturbed

log = logging.getLogger(__name__)

_BUNDLE = "bundle"  # a folder inside the run's folder, deleted once the store has its content


@dataclass(frozen=True)
class Registration:
    """How to log or register the bundle in a run's folder. It is stored, so that a later process can do it."""

    name: str | None
    """The name of the registered model; None if the captioner is only logged."""
    card: str = ""
    """The model card, in Markdown."""
    tags: dict[str, str] = field(default_factory=dict)
    """The tags of the registered version."""
    score: dict[str, Any] = field(default_factory=dict)
    """The fields of its :class:`Score`."""
    promote: bool = False
    """Whether it becomes ``champion`` regardless of its score."""
    points: list[Point] = field(default_factory=list)
    """The run's final metrics, to be linked to the logged model; earlier versions of the project stored none."""
    dataset: tuple[str, str] = ("", "")
    """The name and digest of the dev split in MLflow."""


def register(
    run: OpenRun, captioner: Captioner, evaluation: Evaluation, encoder: State | None, points: Sequence[Point]
) -> Version:
    """Register a captioner under its run, with model card and score; make it ``champion`` if it scores better.

    ``encoder`` are VGG16's weights, which are saved with the captioner if given. ``points`` are the run's final
    metrics, which are linked to the model. An interrupt is delayed until the captioner is registered. Raises
    :class:`Unsent` if the server is unreachable; :func:`carry_out` can then register the captioner later.
    """
    assert captioner.record is not None
    experiment, data = run.plan.experiment, run.plan.data
    score = Score(
        experiment.registry.metric,
        {"dev_loss": captioner.record.dev_loss, "dev_cider": evaluation.scores.summary["cider"]},
        data.splits["dev"].digest(),
        data.vocabulary.digest(),
        data.vocabulary.tokens,
    )
    card = model_card(experiment, data, captioner, evaluation)
    tags = score.tags() | {"experiment": experiment.name, "git_commit": git_commit()}
    registration = Registration(
        experiment.registry.model, card, tags, asdict(score), run.plan.promote, list(points),
        run.plan.input("dev").mlflow_key,
    )  # fmt: skip
    version = _deliver(run.tracked, captioner, encoder, registration, patience())
    assert version is not None
    log.debug("registered %s", version.describe())
    return version


def register_bundle(run: OpenRun, bundle: Path, points: Sequence[Point]) -> Version:
    """Evaluate a captioner that a nested run has trained, and register it under the parent run ``run``.

    ``points`` are metrics that the parent run has logged. They are linked to the model, as are the evaluation's.
    """
    captioner = Captioner.load(bundle, run.device)
    evaluation = evaluate_on_dev(run.plan, captioner)
    assert captioner.record is not None
    at = time.time_ns() // 1_000_000
    logged = run.tracked.log_metrics(evaluation.metrics(), captioner.record.epoch or 0, at)
    return register(run, captioner, evaluation, encoder_weights(run.plan), [*points, *logged])


def log_interrupted(tracked: TrackedRun, captioner: Captioner, encoder: State | None) -> None:
    """Log the best captioner of an interrupted run without registering it; if the server is unreachable, later."""
    with suppress(Unsent):  # the end of the run reports it
        _deliver(tracked, captioner, encoder, Registration(None), short_patience())


def _deliver(
    tracked: TrackedRun, captioner: Captioner, encoder: State | None, registration: Registration, seconds: float
) -> Version | None:
    """Save the bundle in the run's folder, carry out the registration, and delete the bundle.

    Raises :class:`Unsent` if the server is unreachable for ``seconds`` seconds; the bundle is then kept.
    """
    captioner.save(tracked.folder / _BUNDLE, encoder)
    version = tracked.run_when_sent(asdict(registration), lambda: carry_out(tracked, registration), seconds)
    delete_bundle(tracked.folder)
    return version


def carry_out(tracked: TrackedRun, registration: Registration) -> Version | None:
    """Log or register the bundle in the run's folder, except for steps that are already done; return the version."""
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
            if registration.points:
                registry.link_metrics(tracked.run_id, name, number, registration.points, registration.dataset)
            registry.describe_version(name, number, captioner, registration.card, registration.tags)
            version = registry.promote(name, number, Score(**registration.score), force=registration.promote)
            champion = f"{version.champion}: {version.reason}"
            tracked.set_tags({"registered_version": f"{name}/{number}", "champion": champion})
    return version


def delete_bundle(folder: Path) -> None:
    """Delete the bundle in a run's folder that was kept until the store had received it."""
    shutil.rmtree(folder / _BUNDLE, ignore_errors=True)


def encoder_weights(plan: Plan) -> State | None:
    """Return the layers of VGG16 that the captioner needs; None if they are not on this machine, or not known.

    Nothing is downloaded. If published weights are damaged, log a warning and return None.
    """
    config, identity = plan.experiment.features, plan.data.encoder
    is_unknown = isinstance(identity, FileIdentity) and identity.encoder is None
    if is_unknown or not encoder_at_hand(config):
        return None
    try:
        return load_encoder(config).weights()
    except InputError as error:
        if config.weights not in WEIGHTS:
            raise
        log.warning("%s; the model will be registered without VGG16's weights", error)
        return None
