"""Code that all soaks share: a user's folder, in which real processes run, and checks that must always succeed in it.

``soak_kills.py``, ``soak_trials.py`` and ``soak_service.py`` beside this file are the soaks; ``make soak`` runs all
three. Each ends with exit status 1 if something was lost, and writes its counts to the file of ``--output``.
"""

import argparse
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
ENVIRONMENT = {
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",  # sums are computed in the same order, however busy the machine is
    "CAPEXP_OFFLINE": "1",
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}
SMALL = (
    *("--model.embedding_size", "32", "--model.lstm_units", "32", "--model.output_dropout", "0"),
    *("--training.learning_rate", "0.01", "--training.precision", "float32", "--training.device", "cpu"),
)
"""Settings of ``scenes`` that train in seconds."""


class Lost(Exception):
    """A check has failed."""


def arguments(doc: str | None) -> argparse.ArgumentParser:
    """Return a parser with the flags that every soak has."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1, help="seed of the random moments")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="where to write the counts")
    return parser


def finish(counted: dict[str, Any], output: Path | None) -> None:
    """Print the counts of a soak; write them to ``output`` if given."""
    for name, value in counted.items():
        print(f"{name:32} {value}")
    if output is not None:
        output.write_text(json.dumps(counted, indent=1) + "\n", encoding="utf-8")


class Folder:
    """A user's folder, in which commands run as real processes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(parents=True)
        self.environment = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW_")}
        self.environment |= ENVIRONMENT

    def start(self, command: str, *words: str) -> subprocess.Popen[str]:
        """Start one of the project's commands in a process group of its own; its output goes to ``said.txt``."""
        with (self.path / "said.txt").open("a") as said:
            return subprocess.Popen(
                [sys.executable, "-m", f"capexp.{command}", *words],
                cwd=self.path, env=self.environment, text=True, stdout=said, stderr=said, start_new_session=True,
            )  # fmt: skip

    def run(self, command: str, *words: str) -> float:
        """Run a command to its end; return the seconds that it took."""
        start = time.monotonic()
        self.end(self.start(command, *words))
        return time.monotonic() - start

    def end(self, process: subprocess.Popen[str]) -> None:
        """Wait for the end of a command; raise Lost if it has failed."""
        if process.wait() != 0:
            raise Lost(f"exit status {process.returncode}:\n{self.said()}")

    def said(self) -> str:
        """Return the end of the commands' output."""
        return (self.path / "said.txt").read_text(encoding="utf-8", errors="replace")[-3000:]

    @property
    def client(self) -> Any:
        """MLflow's client of the folder's store."""
        import mlflow

        from capexp.tracking.store import database_uri

        mlflow.set_tracking_uri(database_uri(self.path / "mlflow.db"))
        return mlflow.MlflowClient()

    def runs(self) -> list[Any]:
        """Return all runs of the store, the oldest first."""
        if not (self.path / "mlflow.db").exists():
            return []
        client = self.client
        experiments = [one.experiment_id for one in client.search_experiments()]
        return list(client.search_runs(experiments, order_by=["attributes.start_time"], max_results=1000))

    def verify(self) -> int:
        """Check the store and all bundles after a command has ended or was killed; return the number of bundles.

        Raises:
            Lost: the store cannot be read, a bundle is incomplete, a model is ready or registered without its files, or
                the champion is not one of the versions.
        """
        from capexp.captioning.bundle import verify_bundle
        from capexp.errors import InputError

        bundles = [path for root in ("checkpoints", "studies") for path in self.path.glob(f"{root}/**/ep[0-9]*")]
        if (self.path / "mlflow.db").exists():
            with closing(sqlite3.connect(self.path / "mlflow.db")) as store:
                (told,) = store.execute("PRAGMA integrity_check").fetchone()
                if told != "ok":
                    raise Lost(f"mlflow.db: {told}")
                tables = {name for (name,) in store.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            if {"runs", "logged_models", "registered_models", "alembic_version"} <= tables:
                bundles += self._registered()
        for bundle in bundles:
            try:
                verify_bundle(bundle)
            except InputError as error:
                raise Lost(f"not whole: {error}") from None
        return len(bundles)

    def _registered(self) -> list[Path]:
        """Return the bundles of all models that are ready; check that each version and champion has one."""
        from mlflow.utils.file_utils import local_file_uri_to_path

        client = self.client
        experiments = [one.experiment_id for one in client.search_experiments()]
        for run in client.search_runs(experiments, max_results=1000):
            client.get_metric_history(run.info.run_id, "dev_loss")
        models = client.search_logged_models(experiments)
        ready = {one.model_id: one.artifact_location for one in models if str(one.status) == "READY"}
        found = list(ready.values())
        for model in client.search_registered_models():
            versions = list(client.search_model_versions(f"name='{model.name}'"))
            for version in versions:
                if version.source.removeprefix("models:/") not in ready:
                    raise Lost(f"{model.name} version {version.version}: {version.source} is not ready")
            champion = model.aliases.get("champion")
            if champion is not None and champion not in {one.version for one in versions}:
                raise Lost(f"{model.name}@champion is version {champion}, which is not there")
        return [Path(local_file_uri_to_path(str(one))) / "artifacts" / "bundle" for one in found]


def kill(process: subprocess.Popen[str]) -> bool:
    """Send SIGKILL to a command and its children; return False if it had already ended by itself."""
    if process.poll() is not None:
        return False
    os.killpg(process.pid, signal.SIGKILL)
    return process.wait() == -signal.SIGKILL


def wait_for(reached: Callable[[], object], process: subprocess.Popen[str]) -> None:
    """Wait until ``reached`` returns true, or the process has ended."""
    while not reached() and process.poll() is None:
        time.sleep(0.02)
