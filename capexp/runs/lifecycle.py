"""The lifecycle of every tracked run: open it, lock its folder, log its settings and data, and end it cleanly."""

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

_VERSION = "capexp_version"  # a tag that every run of this project has from its start
_CONTEXTS: Mapping[SplitName, str] = {"train": "training", "dev": "validation"}  # MLflow's names for the splits


@dataclass(frozen=True)
class Plan:
    """A run to make: its settings and data, its parent run, the place of its files, and what to register."""

    experiment: Experiment
    data: Dataset
    """The dataset, with features."""
    name: str = ""
    """The name of the run in MLflow; if empty, the name of the experiment."""
    label: str = ""
    """The label of the run's updates if it is one of several runs; else empty."""
    tags: Mapping[str, str] = field(default_factory=dict)
    """The tags that the run has from its start."""
    parent: str | None = None
    """The id of the parent run, if the run is nested."""
    folder: Path = CHECKPOINTS
    """The folder in which the run's own folder is created."""
    registers: bool = True
    """Whether the captioner is logged and registered; otherwise it is only kept among the checkpoints."""
    promote: bool = False
    """Whether the registered version becomes ``champion`` regardless of its score."""
    is_shared: bool = False
    """Whether several processes may open the run at once, as for a study: they share the lock of its folder."""

    def input(self, name: SplitName) -> Input:
        """Return a split as it is logged as an MLflow dataset."""
        experiment, split = self.experiment, self.data.splits[name]
        path = experiment.captions.list_of(name)
        return Input(f"{experiment.name}-{name}", _CONTEXTS[name], path, split.digest())


@dataclass(frozen=True)
class OpenRun:
    """A run that this process has opened."""

    plan: Plan
    tracked: TrackedRun
    """The run in MLflow, to log to."""
    folder: RunFolder
    device: torch.device
    """The device to compute on."""

    @property
    def run_id(self) -> str:
        """The run's id in MLflow."""
        return self.tracked.run_id

    def with_experiment(self, experiment: Experiment) -> "OpenRun":
        """Return a copy of this run with the settings of its best seed or trial, to register its captioner."""
        return replace(self, plan=replace(self.plan, experiment=experiment))


@contextmanager
def opened(plan: Plan, resume: str | None = None) -> Iterator[OpenRun]:
    """Open a new run, or resume the run with the id ``resume``; end it when the block ends.

    The folder of the run is locked inside the block. Settings, tags and data are logged at its start.

    After an interrupt the run ends KILLED, after any other exception FAILED, with the message in the tag ``error``.
    Only after an :class:`Unsent` of this same run it ends FINISHED, because then the work is done and the rest of the
    log can be sent later.

    An existing run is locked before MLflow opens it. A new run is locked as soon as MLflow has created
    it. So a second process cannot change a run that another process is training.
    """
    experiment, device = plan.experiment, choose_device(plan.experiment.training.device)

    @contextmanager
    def lock(run_id: str) -> Iterator[None]:
        with RunFolder(plan.folder / run_id).lock(plan.is_shared):
            if resume is None:
                _refuse_trained(plan.folder)  # again: another process may have trained it since the first check
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
        tracked.log_inputs([plan.input(name) for name in plan.data.splits])
        tracked.log_artifact(settings)
        for path in folder.write_splits(plan.data.drawn or {}):
            tracked.log_artifact(path)
        tracked.describe(describe_run(experiment, plan.data, ["Not finished yet."]))
        if resume is not None:
            # Params cannot change in MLflow: settings that a resumed run may change are logged again, as tags.
            tracked.set_tags(
                {f"resumed.{name}": value for name, value in experiment.flat().items() if may_differ(name)}
            )
        yield OpenRun(plan, tracked, folder, device)


def _data_tags(data: Dataset) -> dict[str, str]:
    """Return the tags that identify the data and the encoder of a run, and the version of the code."""
    return comparable_tags(data) | {
        "git_commit": git_commit(),
        "encoder": str(data.encoder),
        _VERSION: __version__,
    }


def comparable_tags(data: Dataset) -> dict[str, str]:
    """Return the tags that are equal for runs on the same data, vocabulary and encoder."""
    return {
        "data_digest": data.digest(),
        "vocabulary_digest": data.vocabulary.digest(),
        "encoder_key": data.encoder.key(),
    }


def _require_same_data(run_id: str, data: Dataset) -> None:
    """Raise InputError if a run was started with different data, or with a different vocabulary or encoder."""
    before, now = run_tags(run_id), comparable_tags(data)
    for name in now:
        if name in before and before[name] != now[name]:
            raise InputError(
                f"--resume {run_id}: {name} is {now[name][:12]}, the run was started with {before[name][:12]}; "
                "photos, captions, lists, weights or the file of features have changed: restore them, or start a new "
                "run"
            )


def _refuse_trained(folder: Path) -> None:
    """Raise InputError if ``MLFLOW_RUN_ID`` names a run that this project has already started to train."""
    run_id = adopted_run()
    if run_id is None:
        return
    run_status(run_id)  # raises InputError if there is no such run
    if (folder / run_id / JOURNAL).exists() or _VERSION in run_tags(run_id):
        raise InputError(f"MLFLOW_RUN_ID={run_id}: was trained already; unset it, or give --resume {run_id}")


class _WithoutSecrets(logging.Formatter):
    """Remove the password of a tracking server from log lines: error messages may contain the server's address."""

    def format(self, record: logging.LogRecord) -> str:
        return without_credentials(super().format(record))


class _LogFile(logging.FileHandler):
    """A log file that lacks a line if the disk is full, without a traceback: the command reports the full disk."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (logging's name)
        if not isinstance(sys.exception(), OSError):
            super().handleError(record)


@contextmanager
def _log_file(path: Path, tracked: TrackedRun) -> Iterator[None]:
    """Copy the project's log to a file in the run's folder; log the file as an artifact, even after an exception."""
    handler = _LogFile(path, encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(_WithoutSecrets("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger("capexp")
    root.addHandler(handler)
    try:
        yield
    except Unsent:
        raise
    except Exception:
        log.debug("the run has failed", exc_info=True)  # only to the file: the command reports the error to the user
        raise
    finally:
        root.removeHandler(handler)
        with writing(path):
            handler.close()
        if sys.exception() is None:
            tracked.log_artifact(path)
        else:
            with suppress(Outage), store_faults():  # an outage here must not hide the exception that ended the block
                tracked.log_artifact(path)
