"""Runs that exist in MLflow's store: find, read, change and end them by their ids, without opening them."""

import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import mlflow
from mlflow.entities import Run, RunStatus
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from capexp.errors import InputError, shown_uri
from capexp.tracking.store import artifact_faults, is_missing, require_store, store_faults, store_uri

PARENT = "mlflow.parentRunId"
"""MLflow's tag with the id of the run that a run is nested under."""
ADOPTED = "MLFLOW_RUN_ID"
"""The environment variable with the id of the adopted run: the one that ``mlflow run`` has created for this process."""


@dataclass(frozen=True)
class FoundRun:
    """A run that a search in the store has found."""

    run_id: str
    """MLflow's id of the run."""
    is_finished: bool
    """Whether the run has ended FINISHED."""
    tags: Mapping[str, str]
    """All tags of the run, MLflow's own included."""


def run_status(run_id: str) -> str:
    """Return the status of a run, such as ``FINISHED``. Reject one that does not exist or was deleted."""
    run = _find(run_id)
    if run is None:
        store = shown_uri(store_uri())
        raise InputError(f"run {run_id}: no such run in {store}; `mlflow ui` lists them")
    return str(run.info.status)


def run_tags(run_id: str) -> dict[str, str]:
    """Return the tags of a run; an empty dict if the run does not exist or was deleted."""
    run = _find(run_id)
    return {} if run is None else dict(run.data.tags)


def find_nested(parents: Sequence[str], tag: str, value: str) -> str | None:
    """Return the id of a nested run with that tag: the newest one under the first parent that has any, else None."""
    for parent in parents:
        for run in nested_runs(parent, f"tags.{tag} = '{value}'"):
            return str(run.info.run_id)
    return None


def end_nested(parent: str, tag: str, values: Callable[[], Set[str]], error: str) -> list[str]:
    """End FAILED the running nested runs of dead processes, with ``error`` as a tag; return their ids.

    A run belongs to a dead process if it has the tag but ``values()``, the tag's values of all living processes, does
    not contain its value. ``values`` is called after the running runs were listed and before the status of each is read
    again. So a run that begins meanwhile is not in the list, and one that ends meanwhile is no longer running.
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
    """Set an ended run to RUNNING again, because other processes still work on it."""
    with store_faults():
        MlflowClient().update_run(run_id, RunStatus.to_string(RunStatus.RUNNING))


def end_run(run_id: str) -> None:
    """End a run FINISHED."""
    with store_faults():
        MlflowClient().set_terminated(run_id)


def add_artifacts(run_id: str, folder: Path, name: str) -> None:
    """Copy a folder to the artifacts of a run, under ``name``; the run may have ended."""
    with store_faults(), artifact_faults(run_id):
        MlflowClient().log_artifacts(run_id, str(folder), name)


def fetch_artifacts(run_id: str, name: str) -> Path | None:
    """Return the local path of a run's artifact, a file or folder, downloaded if necessary; None if it does not exist.

    ``name`` is looked up only at the top level of the run's artifacts.
    """
    with store_faults(), artifact_faults(run_id):
        if not any(item.path == name for item in MlflowClient().list_artifacts(run_id)):
            return None
        return Path(mlflow.artifacts.download_artifacts(run_id=run_id, artifact_path=name))


def nested_runs(parent: str, condition: str | None = None) -> list[Run]:
    """Return the runs under a parent that fulfil a condition in MLflow's filter syntax, newest first."""
    run = _find(parent)
    if run is None:
        return []
    conditions = [f"tags.`{PARENT}` = '{parent}'", *([condition] if condition else [])]
    return _search(conditions, [run.info.experiment_id])


def runs_of(params: Mapping[str, str], tags: Mapping[str, str]) -> list[FoundRun]:
    """Return the runs with these params and tags in all experiments, newest first."""
    conditions = [f"params.`{name}` = '{value}'" for name, value in params.items()]
    conditions += [f"tags.`{name}` = '{value}'" for name, value in tags.items()]
    runs = _search(conditions)
    return [FoundRun(str(run.info.run_id), run.info.status == "FINISHED", dict(run.data.tags)) for run in runs]


def _search(conditions: Sequence[str], experiments: list[str] | None = None) -> list[Run]:
    """Return all runs that fulfil the conditions, newest first; without ``experiments`` in all of them."""
    with store_faults():
        runs = mlflow.search_runs(  # unlike the client's search it reads all pages of the answer
            experiments,
            " and ".join(conditions),
            max_results=sys.maxsize,
            order_by=["attributes.start_time DESC"],
            output_format="list",
            search_all_experiments=experiments is None,
        )
    return cast(list[Run], runs)


def adopted_run() -> str | None:
    """Return the id of the run that ``mlflow run`` has created for this process, if any."""
    return os.environ.get(ADOPTED)


def _find(run_id: str) -> Run | None:
    """Return a run by its id; None if it does not exist or was deleted."""
    require_store()
    with store_faults():
        try:
            run = MlflowClient().get_run(run_id)
        except MlflowException as error:
            if is_missing(error):
                return None
            raise
    return run if run.info.lifecycle_stage == "active" else None


def git_commit() -> str:
    """Return the commit of the project's code, with ``-dirty`` if files differ from it; empty outside a checkout."""
    folder = Path(__file__).parent
    try:
        description = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=folder, capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return ""
    return description.stdout.strip()
