"""Train one captioner as a tracked run, on its own or nested under another run."""

import logging
from collections import deque
from collections.abc import Generator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from capexp.captioning.captioner import Captioner, check_fits, neighbours_size
from capexp.captioning.evaluation import Evaluation, perplexity
from capexp.distributed import ALONE, World, choose_device
from capexp.errors import InputError
from capexp.files import writing
from capexp.report.gallery import GalleryCard
from capexp.report.model_card import describe_result, describe_run, describe_use
from capexp.report.plots import draw_losses
from capexp.runs.conclusion import conclude
from capexp.runs.folder import RunFolder
from capexp.runs.lifecycle import OpenRun, Plan, opened
from capexp.runs.registration import encoder_weights, log_interrupted, register
from capexp.search.trial import Pruned
from capexp.settings import Experiment
from capexp.tracking.registry import Version
from capexp.tracking.run import TrackedRun
from capexp.tracking.store import await_store
from capexp.training.checkpoints import check_disk_space
from capexp.training.loop import Epoch, Training, Update, fit
from capexp.training.self_critical import SelfCritical
from capexp.training.teacher_forcing import CrossEntropy

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EarlierRun:
    """A run that was started before with the settings of a plan."""

    run_id: str
    bundle: Path | None = None
    """The bundle of its captioner; None if the run has not finished."""


@dataclass(frozen=True)
class Result:
    """The result of a run that has ended."""

    run_id: str
    bundle: Path
    """The bundle of the best captioner."""
    best: Epoch | None = None
    """The best epoch; None for an ensemble, and for an earlier run that is reused."""
    is_pruned: bool = False
    dev_loss: float | None = None
    """The best captioner's dev loss in nats per token; None for a pruned run, and for an earlier run that is reused."""
    dev_loss_blind: float | None = None
    """The dev loss of the image-blind baseline; None if ``dev_loss`` is None."""
    version: Version | None = None
    """The registered version; None if nothing was registered."""
    samples: tuple[GalleryCard, ...] = ()
    """Captions of some dev photos, sampled at random."""


def train(plan: Plan, resume: str | None = None, world: World = ALONE) -> Generator[Update, None, Result]:
    """Train and track one captioner; yield each epoch after it is logged.

    The captioner is registered only if ``plan.registers``. ``resume`` is the id of a run to continue. Rank 0 calls
    this function, other ranks call :func:`follow`.

    If :class:`Pruned` is thrown into the generator, the run ends FINISHED with the tag ``pruned``. If it is
    interrupted, the run ends KILLED; with ``plan.registers`` the best captioner so far is logged, but not registered.
    """
    experiment = plan.experiment
    encoder = encoder_weights(plan) if plan.registers else None  # read before hours of training: it may be damaged
    parameters = check_fits(experiment, plan.data)
    check_disk_space(plan.folder, parameters, experiment.training, neighbours_size(experiment, plan.data))
    with opened(plan, resume) as run:
        run.tracked.log_params({"decoder_parameters": str(parameters)})
        epochs: list[Epoch] = []
        try:
            for epoch in _phases(plan, run.device, run.folder, world):
                epochs.append(epoch)
                log.debug("%s", epoch)
                _log_epoch(run.tracked, epoch)
                yield Update(plan.label, epoch)
            world.stop()
            best = _best(epochs)
            run.tracked.log_artifact(draw_losses(epochs, experiment.name, run.folder.path / "loss.png"))
            bundle = _best_bundle(run.folder, experiment)
            captioner = Captioner.load(bundle, run.device)
            metrics = {"best_dev_loss": best.dev_loss, "best_epoch": float(best.number)}
            evaluation, samples, points = conclude(run, captioner, metrics)
        except Pruned:
            run.tracked.set_tags({"pruned": "true"})
            run.tracked.describe(describe_run(experiment, plan.data, ["Pruned: its dev losses were not promising."]))
            return Result(run.run_id, _best_bundle(run.folder, experiment), _best(epochs), is_pruned=True)
        except (KeyboardInterrupt, GeneratorExit):
            so_far = run.folder.best_so_far(experiment)
            if plan.registers and so_far is not None:
                log.info("interrupted: logging the best captioner so far, %s", so_far.name)
                with suppress(InputError):  # a damaged bundle must not hide the interrupt
                    log_interrupted(run.tracked, Captioner.load(so_far), encoder)
            raise
        version = None
        if plan.registers:
            version = register(run, captioner, evaluation, encoder, points)
        describe_end(run, captioner, evaluation, bundle, version)
        return Result(
            run.run_id, bundle, best, dev_loss=best.dev_loss, dev_loss_blind=evaluation.blind.per_token,
            version=version, samples=samples,
        )  # fmt: skip


def describe_end(
    run: OpenRun, captioner: Captioner, evaluation: Evaluation, bundle: Path, version: Version | None
) -> None:
    """Set the description of a finished run: its scores, and how to use its captioner."""
    assert captioner.record is not None
    experiment = run.plan.experiment
    result = describe_result(experiment, captioner.record, evaluation)
    use = describe_use(str(bundle) if version is None else version.numbered_uri)
    run.tracked.describe(describe_run(experiment, run.plan.data, [result, use]))


def follow(plan: Plan, world: World) -> None:
    """Train as a rank other than 0: compute this rank's shards of batches and of the dev loss; write nothing."""
    device = choose_device(plan.experiment.training.device)
    deque(_phases(plan, device, None, world), 0)
    world.stop()


def child(plan: Plan, earlier: EarlierRun | None = None) -> Generator[Update, None, Result]:
    """Yield the epochs of a nested run and return its result.

    ``earlier`` is reused if it has finished, else it is resumed. Without it a new run is trained.
    """
    await_store()
    if earlier is None:
        action = "trained now"
    else:
        action = f"{'resumed' if earlier.bundle is None else 'found'}, run {earlier.run_id}"
    if plan.label:
        log.info("%s: %s", plan.label, action)
    if earlier is None:
        return (yield from train(plan))
    if earlier.bundle is not None:
        return Result(earlier.run_id, earlier.bundle)
    return (yield from train(plan, earlier.run_id))


def _phases(plan: Plan, device: torch.device, folder: RunFolder | None, world: World) -> Generator[Epoch, None, None]:
    """Train with cross-entropy, then self-critically if the settings have that phase; yield the epochs.

    ``folder`` is None on ranks other than 0, which save nothing.
    """
    experiment, data = plan.experiment, plan.data
    captioner = Captioner.fresh(experiment.model, data.vocabulary, data.encoder, experiment.decoding, experiment.seed)
    captioner.take_data(data)
    config = experiment.training
    training = Training(
        captioner, data.batches("train", config), data.batches("dev", config), config, experiment.seed, device, world
    )
    checkpoints = None if folder is None else folder.checkpoints(experiment)
    if checkpoints is not None:
        checkpoints.clear_parts()
    epochs: list[Epoch] = []
    for epoch in fit(training, CrossEntropy(training), checkpoints):
        epochs.append(epoch)
        yield epoch
    if not experiment.has_second_phase:
        return
    if folder is not None and checkpoints is not None:
        best = checkpoints.best()
        assert best is not None, f"{folder.path}: no epoch has improved"
        training = replace(training, captioner=Captioner.load(best, device))
        checkpoints = folder.second_phase(experiment, _best(epochs).number)
        with writing(checkpoints.folder):
            checkpoints.folder.mkdir(exist_ok=True)
        checkpoints.clear_parts()
    yield from fit(training, SelfCritical(training, len(epochs)), checkpoints, epochs)


def _best(epochs: list[Epoch]) -> Epoch:
    """Return the last epoch that improved the dev loss, or in the self-critical phase the dev CIDEr-D."""
    return [epoch for epoch in epochs if epoch.improved][-1]


def _best_bundle(folder: RunFolder, experiment: Experiment) -> Path:
    """Return the bundle of the best captioner so far; there must be one."""
    bundle = folder.best_so_far(experiment)
    assert bundle is not None, f"{folder.path}: no epoch has improved"
    return bundle


def _log_epoch(tracked: TrackedRun, epoch: Epoch) -> None:
    """Log the metrics of an epoch."""
    metrics = {
        "train_loss": epoch.train_loss,
        "dev_loss": epoch.dev_loss,
        "dev_perplexity": perplexity(epoch.dev_loss),
        "learning_rate": epoch.learning_rate,
        "epoch_seconds": epoch.seconds,
        "tokens_per_second": epoch.tokens_per_second,
    }
    if epoch.reward is not None and epoch.dev_cider is not None:
        metrics |= {"reward": epoch.reward, "epoch_dev_cider": epoch.dev_cider}
    tracked.log_metrics(metrics, step=epoch.number, timestamp=epoch.ended_at)
