"""One MLflow run from start to end: params, tags, inputs, metrics, artifacts, and the state it ends in."""

import logging
import os
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import mlflow
from mlflow.data.meta_dataset import MetaDataset
from mlflow.data.sources import LocalArtifactDatasetSource
from mlflow.entities import Metric, Param, Run, RunStatus, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from capexp.data.errors import InputError, shown_uri
from capexp.tracking.store import artifact_faults, discreet, is_missing, local_write, require_store, store_faults

log = logging.getLogger(__name__)

PARENT = "mlflow.parentRunId"
"""The tag that names the run that a run is nested under."""
_PARAM_LENGTH = 6000  # MLflow's limit
_BATCH = 100  # params that MLflow takes at once
_SAMPLING_SECONDS = 5.0  # of system metrics; runs on small data are short


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
    """What the project logs to one run. Logging the same again changes nothing."""

    def __init__(self, run_id: str, client: MlflowClient) -> None:
        self.run_id = run_id
        self._client = client

    def log_params(self, params: Mapping[str, str]) -> None:
        """Logs the params that the run does not hold yet: ``mlflow run -P`` has logged its own as text."""
        with local_write():
            held = self._client.get_run(self.run_id).data.params
            lacking = [Param(name, value[:_PARAM_LENGTH]) for name, value in params.items() if name not in held]
            for start in range(0, len(lacking), _BATCH):
                self._client.log_batch(self.run_id, params=lacking[start : start + _BATCH])

    def log_metrics(self, metrics: Mapping[str, float], step: int, timestamp: int) -> None:
        """Logs values of one step; ``timestamp`` in milliseconds since 1970."""
        with local_write():
            self._client.log_batch(
                self.run_id, metrics=[Metric(name, value, timestamp, step) for name, value in metrics.items()]
            )

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Sets tags, over those of the same name."""
        with local_write():
            self._client.log_batch(self.run_id, tags=[RunTag(name, value) for name, value in tags.items()])

    def log_inputs(self, inputs: list[Input]) -> None:
        """Logs the splits as data sets."""
        for item in inputs:
            source = LocalArtifactDatasetSource(str(item.path.absolute()))
            with local_write():
                mlflow.log_input(MetaDataset(source, name=item.name, digest=item.digest[:36]), context=item.context)

    def log_artifact(self, path: Path) -> None:
        """Copies a file to the run's artifacts."""
        with artifact_faults(self.run_id):
            self._client.log_artifact(self.run_id, str(path))

    def log_artifacts(self, folder: Path, name: str) -> None:
        """Copies what is in a folder to the run's artifacts, under a name."""
        with artifact_faults(self.run_id):
            self._client.log_artifacts(self.run_id, str(folder), name)


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
    with store_faults():
        TrackedRun(run_id, MlflowClient()).log_artifacts(folder, name)


def fetch_artifacts(run_id: str, name: str) -> Path | None:
    """A local copy of a folder of a run's artifacts; None where it has none of that name."""
    with store_faults(), artifact_faults(run_id):
        if not any(item.path == name for item in MlflowClient().list_artifacts(run_id)):
            return None
        return Path(mlflow.artifacts.download_artifacts(run_id=run_id, artifact_path=name))


def nested_runs(parent: str, condition: str | None = None) -> list[Run]:
    """The runs under a parent that fulfil a condition, the newest first."""
    client = MlflowClient()
    run = _find(parent)
    if run is None:
        return []
    under = f"tags.`{PARENT}` = '{parent}'" + (f" and {condition}" if condition else "")
    return list(client.search_runs([run.info.experiment_id], under, max_results=1000))


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
    *,
    resume: str | None = None,
    parent: str | None = None,
    tags: Mapping[str, str] | None = None,
) -> Iterator[TrackedRun]:
    """Starts a run, or goes on with one, and ends it in the state that fits how the block was left.

    With ``parent`` it is nested, in the parent's experiment. It has its tags from the beginning.
    Under ``mlflow run`` this is the run that MLflow has made. An interrupt ends it KILLED, tagged
    ``stopped=interrupt``; any other exception FAILED, with its message in the tag ``error``.
    """
    if "MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL" not in os.environ:
        mlflow.set_system_metrics_sampling_interval(_SAMPLING_SECONDS)
    mlflow.set_system_metrics_samples_before_logging(1)
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
            tags=dict(tags or {}),
            log_system_metrics=True,
        )
        # The web page opens on what fits the training of models, instead of asking.
        client.set_experiment_tag(run.info.experiment_id, "mlflow.experimentKind", "custom_model_development")
        for stale in {"stopped", "error"} & run.data.tags.keys():
            client.delete_tag(run.info.run_id, stale)
    tracked = TrackedRun(run.info.run_id, client)
    status = RunStatus.to_string(RunStatus.FAILED)
    try:
        yield tracked
        status = RunStatus.to_string(RunStatus.FINISHED)
    except (KeyboardInterrupt, GeneratorExit):
        status = RunStatus.to_string(RunStatus.KILLED)
        tracked.set_tags({"stopped": "interrupt"})
        raise
    except Exception as error:
        tracked.set_tags({"error": discreet(f"{type(error).__name__}: {error}")[:500]})
        raise
    finally:
        mlflow.end_run(status)


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
