"""One MLflow run from start to end: its params, tags, inputs, metrics and artifacts, and the status of its end."""

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
from capexp.tracking.outbox import ARTIFACT, INPUT, JOURNAL, METRICS, PARAMS, TAGS, Entry, Journal, Outbox, Point
from capexp.tracking.sampler import Sampler
from capexp.tracking.store import (
    fault_of,
    is_local,
    is_missing,
    local_write,
    no_retries,
    patience,
    short_patience,
    store_faults,
    without_credentials,
)

log = logging.getLogger(__name__)

_LONGEST_PAUSE = 4.0  # seconds between two tries of an action
_PARAM_LENGTH = 6000  # MLflow's limit on the length of a param
ACTION, ENDED = "claim", "ended"
"""The kinds of journal entries that must wait until all others are sent: a pending action (a model to register), and
the end of the run."""

T = TypeVar("T")


@dataclass(frozen=True)
class Input:
    """A split of the data, to be logged as an MLflow dataset."""

    name: str
    """The dataset's name in MLflow."""
    context: str
    """The purpose of the split, in MLflow's terms: ``training`` or ``validation``."""
    path: Path
    """The file that lists the photos of the split."""
    digest: str
    """The digest of the split's content; MLflow gets its first 36 characters."""

    @property
    def mlflow_key(self) -> tuple[str, str]:
        """The dataset's name and digest in MLflow."""
        return self.name, self.digest[:36]


def as_dataset(item: Input) -> MetaDataset:
    """Return a split as MLflow describes data sets."""
    name, digest = item.mlflow_key
    return MetaDataset(LocalArtifactDatasetSource(str(item.path.absolute())), name=name, digest=digest)


class TrackedRun:
    """A run to which this process logs, through the journal in the run's folder.

    Logging the same values again changes nothing. An unreachable server delays only the end of the run.
    """

    def __init__(self, run_id: str, folder: Path, in_background: bool) -> None:
        """Open the journal in the run's own folder, and start to send its unsent entries.

        With ``in_background`` a thread sends them; this is meant for servers.
        """
        self.run_id = run_id
        self.folder = folder
        self._journal = Journal(folder / JOURNAL)
        self._outbox = Outbox(run_id, folder, self._journal, in_background)

    def log_params(self, params: Mapping[str, str]) -> None:
        """Log those params that the run does not have yet."""
        self._outbox.log(PARAMS, {name: value[:_PARAM_LENGTH] for name, value in params.items()})

    def log_metrics(self, metrics: Mapping[str, float], step: int, timestamp: int) -> list[Point]:
        """Log the values of one step; ``timestamp`` is in milliseconds since 1970. Return the points."""
        points: list[Point] = [(name, float(value), timestamp, step) for name, value in metrics.items()]
        self._outbox.log(METRICS, points)
        return points

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags; tags with the same names are replaced."""
        self._outbox.log(TAGS, dict(tags))

    def describe(self, description: str) -> None:
        """Set the run's description in MLflow, in Markdown."""
        self.set_tags({MLFLOW_RUN_NOTE: description})

    def log_inputs(self, inputs: list[Input]) -> None:
        """Log splits as MLflow datasets."""
        for item in inputs:
            self._outbox.log(INPUT, {"context": item.context, "dataset": as_dataset(item).to_dict()})

    def log_artifact(self, path: Path) -> None:
        """Copy a file of the run's folder to its artifacts. The file's content is read when it is sent."""
        self._outbox.log(ARTIFACT, str(path.resolve().relative_to(self.folder.resolve())))

    def run_when_sent(self, content: dict[str, Any], action: Callable[[], T], seconds: float) -> T:
        """Run an action once all earlier entries of the journal are sent; return its result.

        It is for actions that need the complete run in the store, such as the registration of its model. The journal
        keeps ``content``, which describes the action, until the action is done: a later process can then do it in
        :meth:`send_rest`. Raises :class:`Unsent` if a server accepts nothing for ``seconds`` seconds.
        """
        return self._deliver(self._journal.write(ACTION, content), action, seconds)

    def send_rest(self, action: Callable[[Any], T]) -> tuple[int, T | None, str | None]:
        """Send what an earlier process could not send, do its pending action, and end the run in its status.

        ``action`` gets the content of the pending action, if there is one. Return three values:

        * the number of entries that were not sent,
        * the result of ``action``, None if no action was pending,
        * the status in which the earlier process ended the run. It is None if that process was killed before the end;
          then this method does not end the run either.

        Raises :class:`Unsent` if a server accepts nothing for :func:`patience` seconds.
        """
        waiting, status = self._journal.waiting, self._last_status()
        actions = [entry for entry in waiting if entry.kind == ACTION]
        ends = [entry for entry in waiting if entry.kind == ENDED]
        self._journal.mark_sent([*actions[:-1], *ends[:-1]])  # only the last of each kind counts
        result = None
        if actions:
            result = self._deliver(actions[-1], lambda: action(actions[-1].content), patience())
        failure = self._outbox.drain(patience())
        if failure is not None:
            raise Unsent(self.run_id, fault_of(failure))
        if ends:
            self._deliver(ends[-1], lambda: self._terminate(ends[-1].content), patience())
        self._outbox.close()
        return len(waiting), result, status

    def _last_status(self) -> str | None:
        """Return the status in which the last process ended the run; None if it was killed before."""
        # Each process logs params at its beginning. If they are newer than the last end, an earlier process logged that
        # end.
        last = next((entry for entry in reversed(self._journal.entries) if entry.kind in (PARAMS, ENDED)), None)
        return str(last.content["status"]) if last is not None and last.kind == ENDED else None

    def forget_end(self) -> None:
        """Discard the pending action and the end that an earlier process left in the journal.

        This process continues the run, so they are obsolete: it writes its own.
        """
        self._journal.mark_sent(entry for entry in self._journal.waiting if entry.kind in (ACTION, ENDED))

    def end(self, status: str, seconds: float) -> None:
        """End the run once all is sent.

        Raises :class:`Unsent` if a server accepts nothing for ``seconds`` seconds; the journal keeps the status.
        """
        content = {"status": status, "ended_at": time.time_ns() // 1_000_000}
        try:
            entry = self._journal.write(ENDED, content)
            self._deliver(entry, lambda: self._terminate(content), seconds)
        finally:
            self._outbox.close()

    def _terminate(self, content: Mapping[str, Any]) -> None:
        """Set the run's status and end time in MLflow."""
        client = MlflowClient()
        for stale in {"stopped", "error"} & client.get_run(self.run_id).data.tags.keys():
            if content["status"] == RunStatus.to_string(RunStatus.FINISHED):
                client.delete_tag(self.run_id, stale)  # set by another process that considered this one dead
        client.set_terminated(self.run_id, content["status"], content["ended_at"])

    def _deliver(self, entry: Entry, action: Callable[[], T], seconds: float) -> T:
        """Run the action of an entry once the outbox is empty, and mark the entry as sent; return the action's result.

        If a server fails, the action is retried for ``seconds`` seconds; then :class:`Unsent` is raised. Errors of a
        local store are raised as they are, and so are errors that say that the run does not exist.
        """
        failure = self._outbox.drain(seconds)
        deadline, pause = time.monotonic() + (seconds if failure is None else 0), 1.0
        while failure is None or time.monotonic() < deadline:
            try:
                result = action()
            except (MlflowException, OSError, Outage) as error:
                if is_local() or (isinstance(error, MlflowException) and is_missing(error)):
                    raise
                log.debug("%s: %s", entry.kind, fault_of(error))
                failure = error
                time.sleep(min(pause, max(0.0, deadline - time.monotonic())))
                pause = min(2 * pause, _LONGEST_PAUSE)
            else:
                self._journal.mark_sent([entry])
                return result
        raise Unsent(self.run_id, fault_of(failure))


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
    """Start a run, or resume one, and end it with the block.

    Which run it is:

    * with ``resume``, the existing run of that id;
    * with ``parent``, a new run that is nested under that one, in the parent's experiment;
    * under ``mlflow run``, the adopted run, which MLflow has created for this process;
    * otherwise a new run.

    Its journal is in ``folder / run_id``. ``lock`` excludes other processes from the run with a given id. It is taken
    before MLflow opens an existing run; for a new run, as soon as MLflow has created it.

    The end of the block decides the status:

    * FINISHED if the block ends without an exception. Then :class:`Unsent` is raised if a server does not accept all
      that was logged.
    * FINISHED, too, if the block raises the :class:`Unsent` of this run: its work is done.
    * KILLED, with the tag ``stopped=interrupt``, if it is interrupted or closed.
    * FAILED, with the message in the tag ``error``, for any other exception.
    """
    existing_id = resume or (adopted_run() if parent is None else None)
    with ExitStack() as stack:
        if existing_id is not None:
            stack.enter_context(lock(existing_id))
        outer_run, tracked = mlflow.active_run(), None
        status, seconds = RunStatus.to_string(RunStatus.FAILED), short_patience()
        try:
            run_id = _start(name, experiment, resume, parent, tags or {})
            if existing_id is None:
                stack.enter_context(lock(run_id))
            with no_retries():
                tracked = TrackedRun(run_id, folder / run_id, in_background=not is_local())
                tracked.forget_end()
                sampler = Sampler(run_id, resume is not None, tracked.log_metrics)
                sampler.start()
                raised: BaseException | None = None
                try:
                    yield tracked
                    status, seconds = RunStatus.to_string(RunStatus.FINISHED), patience()
                except (KeyboardInterrupt, GeneratorExit) as interrupt:
                    raised = interrupt
                    status = RunStatus.to_string(RunStatus.KILLED)
                    tracked.set_tags({"stopped": "interrupt"})
                    raise
                except Exception as error:
                    raised = error
                    if isinstance(error, Unsent) and error.run_id == run_id:
                        status = RunStatus.to_string(RunStatus.FINISHED)
                    else:
                        tracked.set_tags({"error": without_credentials(f"{type(error).__name__}: {error}")[:500]})
                    raise
                finally:
                    sampler.finish()
                    try:
                        tracked.end(status, seconds)
                    except Unsent as unsent:
                        if raised is None:
                            raise
                        if not isinstance(raised, Unsent):
                            log.warning("%s", unsent)
        except KeyboardInterrupt:
            status = RunStatus.to_string(RunStatus.KILLED)
            started = mlflow.active_run()
            if tracked is None and started is not outer_run and started is not None:  # there is no journal yet
                with suppress(MlflowException, SQLAlchemyError), no_retries():
                    MlflowClient().set_tag(started.info.run_id, "stopped", "interrupt")
            raise
        finally:
            if mlflow.active_run() is not outer_run:
                with suppress(MlflowException, SQLAlchemyError), no_retries():
                    mlflow.end_run(status)  # removes it from the active runs of this process; it may have ended already


def _start(name: str, experiment: str, resume: str | None, parent: str | None, tags: Mapping[str, str]) -> str:
    """Have MLflow create a run, or open an existing one; return its id."""
    client = MlflowClient()
    with store_faults(), local_write():
        if resume is not None:
            os.environ.pop(ADOPTED, None)  # else MLflow would open the adopted run in place of the first nested one
            # MLflow opens only runs of the active experiment.
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
            log_system_metrics=False,  # see Sampler
        )
        # MLflow's web page then opens with the view for training models; else it asks the user.
        client.set_experiment_tag(run.info.experiment_id, "mlflow.experimentKind", "custom_model_development")
        # A resumed run is neither stopped nor failed any more.
        for stale in {"stopped", "error"} & run.data.tags.keys():
            client.delete_tag(run.info.run_id, stale)
    return str(run.info.run_id)
