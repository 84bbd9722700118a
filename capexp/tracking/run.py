"""One MLflow run from start to end: params, tags, inputs, metrics, artifacts, and the state it ends in."""

import logging
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import mlflow
from mlflow.data.meta_dataset import MetaDataset
from mlflow.data.sources import LocalArtifactDatasetSource
from mlflow.entities import Run, RunStatus
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from sqlalchemy.exc import SQLAlchemyError

from capexp.errors import InputError, Outage, Unsent, shown_uri
from capexp.tracking.outbox import ARTIFACT, INPUT, JOURNAL, METRICS, PARAMS, TAGS, Entry, Journal, Outbox
from capexp.tracking.sampler import Sampler
from capexp.tracking.store import (
    artifact_faults,
    discreet,
    fault_of,
    is_local,
    is_missing,
    local_write,
    no_retries,
    require_store,
    store_faults,
)

log = logging.getLogger(__name__)

PARENT = "mlflow.parentRunId"
"""The tag that names the run that a run is nested under."""
PATIENCE = 60.0
"""Seconds that a run's end waits for a server that takes nothing."""
SHORT_PATIENCE = 10.0
"""The same where the run was interrupted or has failed."""
_PARAM_LENGTH = 6000  # MLflow's limit
CLAIM, ENDED = "claim", "ended"
"""Kinds of entries that wait for what is before them: a model to be logged and registered; the run's end."""

T = TypeVar("T")


@dataclass(frozen=True)
class Input:
    """A split as an MLflow dataset."""

    name: str
    context: str
    path: Path
    digest: str


@dataclass(frozen=True)
class FoundRun:
    """A run that is there already."""

    run_id: str
    is_finished: bool
    tags: Mapping[str, str]


class TrackedRun:
    """What the project logs to one run: written to the journal in its folder, then sent.

    Logging the same again changes nothing. A server that is away holds nobody up until the run's end.
    """

    def __init__(self, run_id: str, folder: Path, in_background: bool) -> None:
        """``folder`` is the run's own."""
        self.run_id = run_id
        self.folder = folder
        self._journal = Journal(folder / JOURNAL)
        self._outbox = Outbox(run_id, folder, self._journal, in_background)

    def log_params(self, params: Mapping[str, str]) -> None:
        """Logs the params that the run does not hold yet."""
        self._outbox.log(PARAMS, {name: value[:_PARAM_LENGTH] for name, value in params.items()})

    def log_metrics(self, metrics: Mapping[str, float], step: int, timestamp: int) -> None:
        """Logs values of one step; ``timestamp`` in milliseconds since 1970."""
        self._outbox.log(METRICS, [[name, float(value), timestamp, step] for name, value in metrics.items()])

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Sets tags, over those of the same name."""
        self._outbox.log(TAGS, dict(tags))

    def log_inputs(self, inputs: list[Input]) -> None:
        """Logs the splits as data sets."""
        for item in inputs:
            source = LocalArtifactDatasetSource(str(item.path.absolute()))
            dataset = MetaDataset(source, name=item.name, digest=item.digest[:36])
            self._outbox.log(INPUT, {"context": item.context, "dataset": dataset.to_dict()})

    def log_artifact(self, path: Path) -> None:
        """Copies a file of the run's folder to the run's artifacts, as it is when its turn comes."""
        self._outbox.log(ARTIFACT, str(path.resolve().relative_to(self.folder.resolve())))

    def claim(self, content: dict[str, Any], action: Callable[[], T], patience: float = PATIENCE) -> T:
        """Does what is more than logging, once all before it is sent; the journal keeps ``content`` until it is done.

        Raises:
            Unsent: a server took nothing for ``patience`` seconds.
        """
        return self._deliver(self._journal.write(CLAIM, content), action, patience)

    def send_rest(self, action: Callable[[Any], T]) -> tuple[int, T | None, str | None]:
        """Sends what an earlier process could not, does its claim, and ends the run as that process has ended.

        Returns the number of entries that had waited, what came of the claim, and the state of the run's end; None
        where that process was killed before it.

        Raises:
            Unsent: a server took nothing for a minute.
        """
        waiting, state = self._journal.waiting, self._left_as()
        claims = [entry for entry in waiting if entry.kind == CLAIM]
        ends = [entry for entry in waiting if entry.kind == ENDED]
        self._journal.mark_sent([*claims[:-1], *ends[:-1]])
        done = None
        if claims:
            done = self._deliver(claims[-1], lambda: action(claims[-1].content), PATIENCE)
        fault = self._outbox.drain(PATIENCE)
        if fault is not None:
            raise Unsent(self.run_id, fault_of(fault))
        if ends:
            self._deliver(ends[-1], lambda: self._terminate(ends[-1].content), PATIENCE)
        self._outbox.close()
        return len(waiting), done, state

    def _left_as(self) -> str | None:
        """The state in which the last process has ended the run; None where it could not."""
        last = next(
            e for e in reversed(self._journal.entries) if e.kind in (PARAMS, ENDED)
        )  # params begin each process
        return None if last.kind == PARAMS else str(last.content["status"])

    def forget_end(self) -> None:
        """The run goes on: what an earlier process has left to be done at its end, this one does at its own."""
        self._journal.mark_sent(entry for entry in self._journal.waiting if entry.kind in (CLAIM, ENDED))

    def end(self, status: str, patience: float) -> None:
        """Ends the run once all is sent.

        Raises:
            Unsent: a server took nothing for ``patience`` seconds.
        """
        content = {"status": status, "ended_at": time.time_ns() // 1_000_000}
        try:
            entry = self._journal.write(ENDED, content)
            self._deliver(entry, lambda: self._terminate(content), patience)
        finally:
            self._outbox.close()

    def _terminate(self, content: Mapping[str, Any]) -> None:
        client = MlflowClient()
        for stale in {"stopped", "error"} & client.get_run(self.run_id).data.tags.keys():
            if content["status"] == RunStatus.to_string(RunStatus.FINISHED):
                client.delete_tag(self.run_id, stale)  # others have taken it for lost meanwhile
        client.set_terminated(self.run_id, content["status"], content["ended_at"])

    def _deliver(self, entry: Entry, action: Callable[[], T], patience: float) -> T:
        fault = self._outbox.drain(patience)
        end, pause = time.monotonic() + (patience if fault is None else 0), 1.0
        while fault is None or time.monotonic() < end:
            try:
                done = action()
            except (MlflowException, OSError, Outage) as error:
                if is_local() or (isinstance(error, MlflowException) and is_missing(error)):
                    raise
                log.debug("%s: %s", entry.kind, fault_of(error))
                fault = error
                time.sleep(min(pause, max(0.0, end - time.monotonic())))
                pause *= 2
            else:
                self._journal.mark_sent([entry])
                return done
        raise Unsent(self.run_id, fault_of(fault))


def run_status(run_id: str) -> str:
    """The state of a run, such as ``FINISHED``.

    Raises:
        InputError: there is no such run, or it was deleted.
    """
    run = _find(run_id)
    if run is None:
        store = shown_uri(mlflow.get_tracking_uri())
        raise InputError(f"run {run_id}: no such run in {store}; `mlflow ui` lists them")
    return str(run.info.status)


def run_tags(run_id: str) -> dict[str, str]:
    """The tags of a run; none where there is no such run."""
    run = _find(run_id)
    return {} if run is None else dict(run.data.tags)


def find_nested(parents: Sequence[str], tag: str, value: str) -> str | None:
    """The newest run under one of the parents with that tag, if any."""
    for parent in parents:
        for run in nested_runs(parent, f"tags.{tag} = '{value}'"):
            return str(run.info.run_id)
    return None


def end_nested(parent: str, tag: str, values: Callable[[], Set[str]], error: str) -> list[str]:
    """Ends FAILED the running runs under a parent whose tag is none of some values, and returns their ids.

    The values are asked for between two looks at a run, so that neither one that begins meanwhile nor one that ends
    is taken for dead.
    """
    client = MlflowClient()
    ended = []
    with store_faults():
        running = [run for run in nested_runs(parent, "attributes.status = 'RUNNING'") if tag in run.data.tags]
        alive = values() if running else set()
        for run_id in (str(run.info.run_id) for run in running if run.data.tags[tag] not in alive):
            if client.get_run(run_id).info.status == "RUNNING":
                client.set_tag(run_id, "error", error)
                client.set_terminated(run_id, RunStatus.to_string(RunStatus.FAILED))
                ended.append(run_id)
    return ended


def keep_open(run_id: str) -> None:
    """Makes an ended run a running one again: others are at work on it."""
    with store_faults():
        MlflowClient().update_run(run_id, RunStatus.to_string(RunStatus.RUNNING))


def add_artifacts(run_id: str, folder: Path, name: str) -> None:
    """Copies a folder to the artifacts of a run that may have ended."""
    with store_faults(), artifact_faults(run_id):
        MlflowClient().log_artifacts(run_id, str(folder), name)


def fetch_artifacts(run_id: str, name: str) -> Path | None:
    """A local copy of a folder of a run's artifacts; None where it has none of that name."""
    with store_faults(), artifact_faults(run_id):
        if not any(item.path == name for item in MlflowClient().list_artifacts(run_id)):
            return None
        return Path(mlflow.artifacts.download_artifacts(run_id=run_id, artifact_path=name))


def nested_runs(parent: str, condition: str | None = None) -> list[Run]:
    """The runs under a parent that fulfil a condition, the newest first."""
    run = _find(parent)
    if run is None:
        return []
    under = f"tags.`{PARENT}` = '{parent}'" + (f" and {condition}" if condition else "")
    with store_faults():
        return list(MlflowClient().search_runs([run.info.experiment_id], under, max_results=1000))


def runs_of(params: Mapping[str, str], tags: Mapping[str, str]) -> list[FoundRun]:
    """All runs, in any experiment, that hold these params and tags, the newest first."""
    conditions = [f"params.`{name}` = '{value}'" for name, value in params.items()]
    conditions += [f"tags.`{name}` = '{value}'" for name, value in tags.items()]
    client = MlflowClient()
    with store_faults():
        held = [experiment.experiment_id for experiment in client.search_experiments()]
        runs = client.search_runs(held, " and ".join(conditions), order_by=["attributes.start_time DESC"])
    return [FoundRun(str(run.info.run_id), run.info.status == "FINISHED", dict(run.data.tags)) for run in runs]


def adopted_run() -> str | None:
    """The run that ``mlflow run`` has made for this process, if any."""
    return os.environ.get("MLFLOW_RUN_ID")


def _find(run_id: str) -> Run | None:
    """A run that is there and not deleted."""
    require_store()
    with store_faults():
        try:
            run = MlflowClient().get_run(run_id)
        except MlflowException as error:
            if is_missing(error):
                return None
            raise
    return run if run.info.lifecycle_stage == "active" else None


@contextmanager
def tracked_run(
    name: str,
    experiment: str,
    folder: Path,
    *,
    lock: Callable[[str], AbstractContextManager[None]],
    resume: str | None = None,
    parent: str | None = None,
    tags: Mapping[str, str] | None = None,
) -> Iterator[TrackedRun]:
    """Start a run, or go on with one, and end it in the state that fits how the block was left.

    ``lock`` keeps other processes from the run by its id: it is taken before MLflow is told of a run that exists, and
    directly after MLflow has made a new one, before anything else is written.

    Its journal is in ``folder``, under the run's id. With ``parent`` it is nested, in the parent's experiment. It has
    its tags from the beginning. Under ``mlflow run`` this is the run that MLflow has made. An interrupt ends it KILLED,
    tagged ``stopped=interrupt``; any other exception FAILED, with its message in the tag ``error``.

    Raises:
        Unsent: the block was left in order, but a server has not taken all that was logged.
    """
    known = resume or (adopted_run() if parent is None else None)
    with ExitStack() as stack:
        if known is not None:
            stack.enter_context(lock(known))
        above, tracked = mlflow.active_run(), None
        status, patience = RunStatus.to_string(RunStatus.FAILED), SHORT_PATIENCE
        try:
            run_id = _start(name, experiment, resume, parent, tags or {})
            if known is None:
                stack.enter_context(lock(run_id))
            with no_retries():
                tracked = TrackedRun(run_id, folder / run_id, in_background=not is_local())
                tracked.forget_end()
                sampler = Sampler(run_id, resume is not None, tracked.log_metrics)
                sampler.start()
                left_by: BaseException | None = None
                try:
                    yield tracked
                    status, patience = RunStatus.to_string(RunStatus.FINISHED), PATIENCE
                except (KeyboardInterrupt, GeneratorExit) as interrupt:
                    left_by = interrupt
                    status = RunStatus.to_string(RunStatus.KILLED)
                    tracked.set_tags({"stopped": "interrupt"})
                    raise
                except Exception as error:
                    left_by = error
                    if isinstance(error, Unsent) and error.run_id == run_id:
                        status = RunStatus.to_string(RunStatus.FINISHED)
                    else:
                        tracked.set_tags({"error": discreet(f"{type(error).__name__}: {error}")[:500]})
                    raise
                finally:
                    sampler.finish()
                    try:
                        tracked.end(status, patience)
                    except Unsent as unsent:
                        if left_by is None:
                            raise
                        if not isinstance(left_by, Unsent):
                            log.warning("%s", unsent)
        except KeyboardInterrupt:
            status = RunStatus.to_string(RunStatus.KILLED)
            begun = mlflow.active_run()
            if tracked is None and begun is not above and begun is not None:  # there is no journal yet
                with suppress(MlflowException, SQLAlchemyError), no_retries():
                    MlflowClient().set_tag(begun.info.run_id, "stopped", "interrupt")
            raise
        finally:
            if mlflow.active_run() is not above:
                with suppress(MlflowException, SQLAlchemyError), no_retries():
                    mlflow.end_run(status)  # it has ended; this takes it off the list of this process's active runs


def _start(name: str, experiment: str, resume: str | None, parent: str | None, tags: Mapping[str, str]) -> str:
    """Have MLflow make a run, or go on with one; return its id."""
    client = MlflowClient()
    with store_faults(), local_write():
        if adopted_run() is None and resume is None and parent is None:
            mlflow.set_experiment(experiment)
        run = mlflow.start_run(
            run_id=resume,
            experiment_id=None if parent is None else client.get_run(parent).info.experiment_id,
            run_name=name,
            nested=parent is not None,
            parent_run_id=parent,
            tags=dict(tags),
            log_system_metrics=False,  # ours go through the journal
        )
        # The web page opens on what fits the training of models, instead of asking.
        client.set_experiment_tag(run.info.experiment_id, "mlflow.experimentKind", "custom_model_development")
        for stale in {"stopped", "error"} & run.data.tags.keys():
            client.delete_tag(run.info.run_id, stale)
    return str(run.info.run_id)


def git_commit() -> str:
    """The commit of the project's code, ``-dirty`` where files differ from it; empty outside a checkout."""
    folder = Path(__file__).parent
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=folder, capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return ""
    return described.stdout.strip()
