"""One MLflow run from start to end: params, tags, inputs, metrics, artifacts, and the state it ends in."""

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import mlflow
from mlflow.data.meta_dataset import MetaDataset
from mlflow.data.sources import LocalArtifactDatasetSource
from mlflow.entities import RunStatus
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_RUN_NOTE
from sqlalchemy.exc import SQLAlchemyError

from capexp.errors import Outage, Unsent
from capexp.tracking.known_runs import ADOPTED, adopted_run
from capexp.tracking.outbox import ARTIFACT, INPUT, JOURNAL, METRICS, PARAMS, TAGS, Entry, Journal, Outbox
from capexp.tracking.sampler import Sampler
from capexp.tracking.store import (
    discreet,
    fault_of,
    is_local,
    is_missing,
    local_write,
    no_retries,
    store_faults,
)

log = logging.getLogger(__name__)

PATIENCE = 60.0
"""Seconds that the end of a run waits for a server that does not answer."""
SHORT_PATIENCE = 10.0
"""The same where the run was interrupted or has failed."""
_PARAM_LENGTH = 6000  # MLflow's limit
CLAIM, ENDED = "claim", "ended"
"""Kinds of journal entries that wait until all before them is sent: a model to register; the end of the run."""

T = TypeVar("T")


@dataclass(frozen=True)
class Input:
    """A split as an MLflow dataset."""

    name: str
    context: str
    path: Path
    digest: str


class TrackedRun:
    """A run that this process logs to, through the outbox in the run's folder.

    Logging the same again changes nothing. An unreachable server delays nothing before the end of the run.
    """

    def __init__(self, run_id: str, folder: Path, in_background: bool) -> None:
        """``folder`` is the run's own."""
        self.run_id = run_id
        self.folder = folder
        self._journal = Journal(folder / JOURNAL)
        self._outbox = Outbox(run_id, folder, self._journal, in_background)

    def log_params(self, params: Mapping[str, str]) -> None:
        """Log the params that the run does not have yet."""
        self._outbox.log(PARAMS, {name: value[:_PARAM_LENGTH] for name, value in params.items()})

    def log_metrics(self, metrics: Mapping[str, float], step: int, timestamp: int) -> None:
        """Log the values of one step; ``timestamp`` is in milliseconds since 1970."""
        self._outbox.log(METRICS, [[name, float(value), timestamp, step] for name, value in metrics.items()])

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags; those of the same name are replaced."""
        self._outbox.log(TAGS, dict(tags))

    def describe(self, description: str) -> None:
        """Set the description that MLflow shows of the run, in Markdown."""
        self.set_tags({MLFLOW_RUN_NOTE: description})

    def log_inputs(self, inputs: list[Input]) -> None:
        """Log splits as MLflow datasets."""
        for item in inputs:
            source = LocalArtifactDatasetSource(str(item.path.absolute()))
            dataset = MetaDataset(source, name=item.name, digest=item.digest[:36])
            self._outbox.log(INPUT, {"context": item.context, "dataset": dataset.to_dict()})

    def log_artifact(self, path: Path) -> None:
        """Copy a file of the run's folder to its artifacts; what is sent is the file as it is when its turn comes."""
        self._outbox.log(ARTIFACT, str(path.resolve().relative_to(self.folder.resolve())))

    def claim(self, content: dict[str, Any], action: Callable[[], T], patience: float = PATIENCE) -> T:
        """Run an action that is more than logging, once all before it is sent; return its result.

        The journal keeps ``content`` until the action is done, so that a later process can do it. Raises
        :class:`Unsent` where a server takes nothing for ``patience`` seconds.
        """
        return self._deliver(self._journal.write(CLAIM, content), action, patience)

    def send_rest(self, action: Callable[[Any], T]) -> tuple[int, T | None, str | None]:
        """Send what an earlier process could not send, run its pending action, and end the run as that process did.

        Returns the number of entries that waited, the result of ``action`` on the content of the pending claim, and the
        status in which the run ended; None where the earlier process was killed before it ended the run. Raises
        :class:`Unsent` where a server takes nothing for a minute.
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
        """Return the status in which the last process ended the run; None where it could not."""
        last = next(
            e for e in reversed(self._journal.entries) if e.kind in (PARAMS, ENDED)
        )  # params begin each process
        return None if last.kind == PARAMS else str(last.content["status"])

    def forget_end(self) -> None:
        """Drop the claim and the end that an earlier process left in the journal: this process writes its own."""
        self._journal.mark_sent(entry for entry in self._journal.waiting if entry.kind in (CLAIM, ENDED))

    def end(self, status: str, patience: float) -> None:
        """End the run when all is sent; raise :class:`Unsent` where a server takes nothing for ``patience`` seconds."""
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

    ``lock`` keeps other processes from the run by its id: it is taken before MLflow opens a run that exists, and
    directly after MLflow has made a new one, before anything else is written.

    Its journal is in ``folder``, under the run's id. With ``parent`` it is nested, in the parent's experiment. Under
    ``mlflow run`` it is the run that MLflow has made. An interrupt ends it KILLED, tagged ``stopped=interrupt``; any
    other exception FAILED, with its message in the tag ``error``. Raises :class:`Unsent` where the block ended in order
    but a server has not taken all that was logged.
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
        if resume is not None:
            os.environ.pop(ADOPTED, None)  # or MLflow would open that run for the first nested one
            # MLflow opens no run of another experiment than the active one.
            mlflow.set_experiment(experiment_id=client.get_run(resume).info.experiment_id)
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
