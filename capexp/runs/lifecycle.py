"""Open a run, lock its folder, log its beginning and end it in order: the lifecycle of everything that is tracked."""

import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from capexp import __version__
from capexp.data.dataset import Dataset
from capexp.distributed import choose_device
from capexp.errors import InputError, Outage, Unsent
from capexp.experiment import to_toml
from capexp.files import writing
from capexp.report.model_card import describe_run
from capexp.runs.folder import CHECKPOINTS, RunFolder, may_differ
from capexp.settings import Experiment, SplitName
from capexp.tracking.known_runs import adopted_run, git_commit, run_status, run_tags
from capexp.tracking.outbox import JOURNAL
from capexp.tracking.run import Input, TrackedRun, tracked_run
from capexp.tracking.store import prepare_store, store_faults, without_credentials

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

    def with_experiment(self, experiment: Experiment) -> "OpenRun":
        """Return the same run with the settings of its best seed or trial, to register a captioner under those."""
        return replace(self, plan=replace(self.plan, experiment=experiment))


@contextmanager
def opened(plan: Plan, resume: str | None = None) -> Iterator[OpenRun]:
    """Open a new run, or resume one; lock its folder, log its beginning, and end it as the block ends.

    An interrupt ends the run KILLED, any other exception FAILED, with its message in the tag ``error``. An
    existing run is locked before MLflow opens it, a new one as soon as its id is known: a second process leaves a
    living run untouched.
    """
    experiment, device = plan.experiment, choose_device(plan.experiment.training.device)

    @contextmanager
    def lock(run_id: str) -> Iterator[None]:
        with RunFolder(plan.folder / run_id).lock(plan.is_shared):
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
    """Refuse a run that ``MLFLOW_RUN_ID`` names if a process of this project has begun it already."""
    adopted = adopted_run()
    if adopted is None:
        return
    run_status(adopted)  # refuses an unknown one
    if (folder / adopted / JOURNAL).exists() or _VERSION in run_tags(adopted):
        raise InputError(f"MLFLOW_RUN_ID={adopted}: was trained already; unset it, or give --resume {adopted}")


class _WithoutSecrets(logging.Formatter):
    """Keeps the password of a tracking server out of what is logged: its errors quote the address."""

    def format(self, record: logging.LogRecord) -> str:
        return without_credentials(super().format(record))


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
        if sys.exception() is None:
            tracked.log_artifact(path)
        else:
            with suppress(Outage), store_faults():  # must not hide why the block has ended
                tracked.log_artifact(path)
