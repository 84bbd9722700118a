"""One run: opened, trained, concluded. The lifecycle of everything that is tracked."""

import logging
from collections import deque
from collections.abc import Generator, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from capexp import __version__
from capexp.captioning.captioner import Captioner, check_fits
from capexp.captioning.evaluation import Evaluation, perplexity
from capexp.data.dataset import Dataset
from capexp.distributed import ALONE, World, choose_device
from capexp.errors import InputError, Unsent
from capexp.experiment import to_toml
from capexp.files import writing
from capexp.report.gallery import GalleryCard
from capexp.report.model_card import describe_result, describe_run, describe_use
from capexp.report.plots import draw_losses
from capexp.runs.conclusion import conclude
from capexp.runs.folder import CHECKPOINTS, RunFolder, may_differ
from capexp.runs.registration import encoder_weights, log_interrupted, register
from capexp.search.trial import Pruned
from capexp.settings import Experiment, SplitName
from capexp.tracking.known_runs import adopted_run, git_commit, run_status, run_tags
from capexp.tracking.outbox import JOURNAL
from capexp.tracking.registry import Version
from capexp.tracking.run import Input, TrackedRun, tracked_run
from capexp.tracking.store import await_store, discreet, prepare_store, store_faults
from capexp.training.checkpoints import check_disk_space
from capexp.training.loop import Epoch, Training, Update, fit
from capexp.training.self_critical import SelfCritical
from capexp.training.teacher_forcing import CrossEntropy

log = logging.getLogger(__name__)

_VERSION = "capexp_version"  # the tag that each run of this project has from its beginning
_CONTEXTS: Mapping[SplitName, str] = {"train": "training", "dev": "validation"}  # as MLflow names them


@dataclass(frozen=True)
class Plan:
    """A run that is to be made: what it trains on, where it leaves its files, its place in the run tree."""

    experiment: Experiment
    data: Dataset
    """With features."""
    name: str = ""
    """MLflow's name of the run; the experiment's by default."""
    label: str = ""
    """What its updates are labelled with, where it is one of several."""
    tags: Mapping[str, str] = field(default_factory=dict)
    """The run has them from the beginning."""
    parent: str | None = None
    """The id of the run that it is nested under."""
    folder: Path = CHECKPOINTS
    """Where its own folder is made."""
    registers: bool = True
    """Whether its captioner is logged and registered; otherwise it stays among the checkpoints."""
    promote: bool = False
    """Whether the registered version becomes champion whatever it scores."""
    is_shared: bool = False
    """Whether other processes may have the same run open: a study's, which is not locked."""


@dataclass(frozen=True)
class OpenRun:
    """A run that this process has open."""

    plan: Plan
    tracked: TrackedRun
    folder: RunFolder
    device: torch.device

    @property
    def run_id(self) -> str:
        """MLflow's id."""
        return self.tracked.run_id


@dataclass(frozen=True)
class EarlierRun:
    """A run with the settings of a plan that was begun before."""

    run_id: str
    folder: Path
    """Where its own folder is."""
    bundle: Path | None = None
    """Its captioner, where it has finished."""


@dataclass(frozen=True)
class Result:
    """A run that has ended."""

    run_id: str
    bundle: Path
    """Its best captioner."""
    best: Epoch | None = None
    """None where the captioner was found, not trained now, and of an ensemble."""
    is_pruned: bool = False
    dev_loss: float | None = None
    dev_loss_blind: float | None = None
    """None where it was pruned, or found."""
    version: Version | None = None
    samples: tuple[GalleryCard, ...] = ()
    """Captions of some dev photos, drawn at random."""


@contextmanager
def opened(plan: Plan, resume: str | None = None) -> Iterator[OpenRun]:
    """Open a new run, or one that is gone on with; lock its folder, log its beginning, and end it as the block ends.

    An interrupt ends the run KILLED, any other exception FAILED, with its message in the tag ``error``. The lock is
    taken before MLflow is told of a run that exists, and directly after MLflow has made a new one: a second process
    leaves a living run untouched.
    """
    experiment, device = plan.experiment, choose_device(plan.experiment.training.device)

    @contextmanager
    def lock(run_id: str) -> Iterator[None]:
        with nullcontext() if plan.is_shared else RunFolder(plan.folder / run_id).lock():
            if resume is None:
                _refuse_trained(plan.folder)  # by another process, since it was asked
            yield

    prepare_store()
    with ExitStack() as stack:
        stack.enter_context(store_faults())
        if resume is not None:
            _require_same_data(resume, plan.data)
        else:
            _refuse_trained(plan.folder)
        tracked = stack.enter_context(
            tracked_run(
                plan.name or experiment.name, experiment.name, plan.folder, lock=lock, resume=resume,
                parent=plan.parent, tags=plan.tags,
            )
        )  # fmt: skip
        folder = RunFolder(tracked.folder)
        settings = folder.write_experiment(experiment)
        stack.enter_context(_log_file(folder.path / "log.txt", tracked))
        log.debug("capexp %s, %s, %s\n%s", __version__, plan.data.encoder, device, to_toml(experiment))
        tracked.log_params(experiment.flat())
        tracked.set_tags(_data_tags(plan.data) | {"device": str(device)})
        tracked.log_inputs(
            [
                Input(f"{experiment.name}-{name}", _CONTEXTS[name], experiment.captions.list_of(name), split.digest())
                for name, split in plan.data.splits.items()
            ]
        )
        tracked.log_artifact(settings)
        tracked.describe(describe_run(experiment, plan.data, ["Not finished yet."]))
        if resume is not None:
            tracked.set_tags(
                {f"resumed.{name}": value for name, value in experiment.flat().items() if may_differ(name)}
            )
        yield OpenRun(plan, tracked, folder, device)


def train(plan: Plan, resume: str | None = None, world: World = ALONE) -> Generator[Update, None, Result]:
    """Train, track and register one captioner; yield every epoch when it is logged.

    Thrown :class:`Pruned`, it ends the run in order, tagged ``pruned``. An interrupt ends it KILLED, with the best
    captioner so far logged, not registered. Rank 0 calls this, the other ranks :func:`follow`.
    """
    experiment = plan.experiment
    encoder = encoder_weights(experiment) if plan.registers else None
    parameters = check_fits(experiment, plan.data)
    check_disk_space(plan.folder, parameters, experiment.training)
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
            evaluation, samples = conclude(plan.experiment, plan.data, run.tracked, captioner, metrics)
        except Pruned:
            run.tracked.set_tags({"pruned": "true"})
            return Result(run.run_id, _best_bundle(run.folder, experiment), _best(epochs), is_pruned=True)
        except (KeyboardInterrupt, GeneratorExit):
            so_far = run.folder.best_so_far(experiment)
            if plan.registers and so_far is not None:
                log.info("interrupted: logging the best captioner so far, %s", so_far.name)
                log_interrupted(run.tracked, Captioner.load(so_far), encoder)
            raise
        version = None
        if plan.registers:
            on_cpu = Captioner.load(bundle)
            version = register(experiment, plan.data, run.tracked, on_cpu, evaluation, encoder, plan.promote)
        describe_end(run, captioner, evaluation, bundle, version)
        return Result(
            run.run_id, bundle, best, dev_loss=best.dev_loss, dev_loss_blind=evaluation.blind.per_token,
            version=version, samples=samples,
        )  # fmt: skip


def describe_end(
    run: OpenRun, captioner: Captioner, evaluation: Evaluation, bundle: Path, version: Version | None
) -> None:
    """Describe a run that has ended: its scores, and how to use its captioner."""
    assert captioner.record is not None
    experiment = run.plan.experiment
    result = describe_result(experiment, captioner.record, evaluation)
    use = describe_use(str(bundle) if version is None else version.numbered_uri)
    run.tracked.describe(describe_run(experiment, run.plan.data, [result, use]))


def follow(plan: Plan, world: World) -> None:
    """Train as a rank other than 0: compute shards of batches and dev loss, write nothing."""
    device = choose_device(plan.experiment.training.device)
    deque(_phases(plan, device, None, world), 0)
    world.stop()


def child(plan: Plan, earlier: EarlierRun | None = None) -> Generator[Update, None, Result]:
    """Return the result of a run under another: finished earlier, gone on with, or trained now."""
    await_store()
    if earlier is None:
        told = "trained now"
    else:
        told = f"{'gone on with' if earlier.bundle is None else 'found'}, run {earlier.run_id}"
    if plan.label:
        log.info("%s: %s", plan.label, told)
    if earlier is None:
        return (yield from train(plan))
    if earlier.bundle is not None:
        return Result(earlier.run_id, earlier.bundle)
    return (yield from train(replace(plan, folder=earlier.folder), earlier.run_id))


def _phases(plan: Plan, device: torch.device, folder: RunFolder | None, world: World) -> Generator[Epoch, None, None]:
    """Train with cross-entropy and, where the settings say so, self-critically; ``folder`` is None on other ranks."""
    experiment, data = plan.experiment, plan.data
    captioner = Captioner.fresh(experiment.model, data.vocabulary, data.encoder, experiment.decoding, experiment.seed)
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
    """Return the last improvement: by dev loss, or in the self-critical phase by dev CIDEr-D."""
    return [epoch for epoch in epochs if epoch.improved][-1]


def _best_bundle(folder: RunFolder, experiment: Experiment) -> Path:
    bundle = folder.best_so_far(experiment)
    assert bundle is not None, f"{folder.path}: no epoch has improved"
    return bundle


def _log_epoch(tracked: TrackedRun, epoch: Epoch) -> None:
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


def _data_tags(data: Dataset) -> dict[str, str]:
    """Return the tags that tell what a run is trained on, and by which code."""
    return comparable_tags(data) | {
        "git_commit": git_commit(),
        "encoder": str(data.encoder),
        _VERSION: __version__,
    }


def comparable_tags(data: Dataset) -> dict[str, str]:
    """Return the tags that are equal of runs on the same data, words and encoder."""
    return {
        "data_digest": data.digest(),
        "vocabulary_digest": data.vocabulary.digest(),
        "encoder_key": data.encoder.key(),
    }


def _require_same_data(run_id: str, data: Dataset) -> None:
    """Refuse to resume a run on other data, words or encoder than it was started with."""
    before, now = run_tags(run_id), comparable_tags(data)
    for name in now:
        if name in before and before[name] != now[name]:
            raise InputError(
                f"--resume {run_id}: {name} is {now[name][:12]}, the run was started with {before[name][:12]}; "
                "photos, captions, lists or weights have changed: restore them, or start a new run"
            )


def _refuse_trained(folder: Path) -> None:
    """Refuse to adopt a run by ``MLFLOW_RUN_ID`` that a process has trained, here or elsewhere, or still trains."""
    adopted = adopted_run()
    if adopted is None:
        return
    run_status(adopted)  # refuses an unknown one
    if (folder / adopted / JOURNAL).exists() or _VERSION in run_tags(adopted):
        raise InputError(f"MLFLOW_RUN_ID={adopted}: was trained already; unset it, or give --resume {adopted}")


class _WithoutSecrets(logging.Formatter):
    """Keeps the password of a tracking server out of what is logged: its errors quote the address."""

    def format(self, record: logging.LogRecord) -> str:
        return discreet(super().format(record))


@contextmanager
def _log_file(path: Path, tracked: TrackedRun) -> Iterator[None]:
    """Copy the project's log to a file in the run's folder, and log the file to the run however the block ends."""
    handler = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(_WithoutSecrets("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger("capexp")
    root.addHandler(handler)
    try:
        yield
    except Unsent:
        raise
    except Exception:
        log.debug("the run has failed", exc_info=True)  # to the file alone: the command tells the user
        raise
    finally:
        root.removeHandler(handler)
        with writing(path):
            handler.close()
        tracked.log_artifact(path)
