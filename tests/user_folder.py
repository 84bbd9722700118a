"""A user's folder, in which commands run as real processes."""

import os
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import Any

import mlflow
from fork_server import ENVIRONMENT, Fork, can_fork
from mlflow.entities import Run
from mlflow.tracking import MlflowClient

from capexp.tracking.store import database_path, database_uri

ROOT = Path(__file__).parents[1]
Process = subprocess.Popen[str] | Fork
"""A command that has been started."""


class Folder:
    """A user's folder, with what the commands leave in it."""

    def __init__(self, path: Path, has_store: bool = False, forks: bool = True) -> None:
        """With ``has_store``, the folder has an empty store of MLflow, as if it had been used before.

        Without ``forks`` each command is started by a Python of its own, not as a fork of one that has imported it.
        """
        self.path, self._forks = path, forks
        if has_store:
            write_store(path / "mlflow.db", f"{path}/mlruns")
        self.environment = {key: value for key, value in ENVIRONMENT.items() if not key.startswith("MLFLOW_")}
        self.environment |= {
            "PYTHONPATH": str(ROOT),
            "TORCH_HOME": str(path / "torch"),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{ENVIRONMENT['PATH']}",
            "CAPEXP_OFFLINE": "1",
            "MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL": "1",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # three processes more of a server, for nothing here
        }

    def start(self, *arguments: str, **variables: str) -> Process:
        """Start a command in a session of its own; ``variables`` are added to its environment."""
        environment = self.environment | variables
        if self._forks and can_fork(arguments, environment):
            return Fork(arguments[2:], self.path, environment)
        return subprocess.Popen(
            arguments, cwd=self.path, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            start_new_session=True,
        )  # fmt: skip

    def run(self, command: str, *arguments: str, status: int = 0) -> subprocess.CompletedProcess[str]:
        process = self.start(sys.executable, "-m", f"capexp.{command}", *arguments)
        out, err = process.communicate(timeout=900)
        assert process.returncode == status, f"{out}\n{err}"
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)

    @property
    def store(self) -> str:
        given = self.environment.get("MLFLOW_TRACKING_URI")
        database = self.path / "mlflow.db" if given is None else database_path(given)
        return str(given) if database is None else database_uri(database)

    @property
    def client(self) -> MlflowClient:
        return MlflowClient(self.store)

    def runs(self) -> list[Run]:
        database = database_path(self.store)
        if database is not None and not database.exists():
            return []
        experiments = [experiment.experiment_id for experiment in self.client.search_experiments()]
        return list(self.client.search_runs(experiments, order_by=["attributes.start_time"]))

    def artifact(self, run: Run, name: str) -> Path:
        mlflow.set_tracking_uri(self.store)
        return Path(mlflow.artifacts.download_artifacts(run_id=run.info.run_id, artifact_path=name))


@cache
def _empty_store() -> bytes:
    """Have MLflow create a database, which takes it seconds; return the file's content."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "mlflow.db")
        MlflowClient(database_uri(path)).search_experiments()
        return path.read_bytes()


def write_store(path: Path, artifacts: str) -> None:
    """Write MLflow's database without any runs, in place of what it holds, also while a server has it open.

    ``artifacts`` is the folder or URI of its artifacts.
    """
    with closing(sqlite3.connect(path)) as database, closing(sqlite3.connect(":memory:")) as empty:
        empty.deserialize(_empty_store())
        empty.execute("UPDATE experiments SET artifact_location = ?", (f"{artifacts}/0",))
        empty.commit()
        empty.backup(database)


def wait_for(condition: Callable[[], Any], seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)  # moments at which a run is killed pass soon
