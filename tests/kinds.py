"""The kinds of runs, with tiny settings: how each is started and resumed, where it trains, and its result.

The tests and the soak of kills go through this table, so that a law of one kind is tried on all.
"""

import json
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import mlflow

PARENT = "mlflow.parentRunId"
SETTINGS: Mapping[str, Any] = {
    **{"model.embedding_size": 32, "model.lstm_units": 32, "model.output_dropout": 0.0},
    **{"training.learning_rate": 0.01, "training.precision": "float32", "training.device": "cpu"},
    **{"training.epochs": 2, "training.batch_size": 128, "training.save_steps": 6},
}
"""Settings of ``scenes`` that train in seconds, with states within an epoch."""
SPACE = {"model.dropout": {"low": 0.1, "high": 0.5}}
_TIMES = ("epoch_seconds", "tokens_per_second")  # metrics that tell time, beside system/*
_LOSSES = ("train_loss", "dev_loss", "reward", "epoch_dev_cider")


class Place(Protocol):
    """A user's folder."""

    @property
    def path(self) -> Path: ...

    @property
    def client(self) -> Any: ...

    def runs(self) -> list[Any]: ...


def flags(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """Settings as a command line has them."""
    return tuple(word for name, value in settings.items() for word in (f"--{name}", str(value)))


@dataclass(frozen=True)
class Kind:
    """A kind of tracked run: one that trains (a leaf), or one with leaves under it."""

    command: Callable[[Mapping[str, Any]], tuple[str, ...]]
    """Return the command that starts it with these settings: its name, then its words."""
    leaves: str
    """Pattern of the folders of its leaves."""
    count: int = 1
    """How many leaves it has."""
    is_resumed: bool = True
    """Whether ``--resume`` resumes it; otherwise the same command does."""

    def begin(self, **changes: Any) -> tuple[str, ...]:
        """Return the command that starts it; in the names of ``changes``, ``__`` stands for the dot."""
        return self.command({**SETTINGS, **{name.replace("__", "."): value for name, value in changes.items()}})

    def go_on(self, place: Place, **changes: Any) -> tuple[str, ...]:
        """Return the command that resumes it, or starts it where a kill came before there was anything to resume.

        ``changes`` are those that it was started with.
        """
        if self.is_resumed:
            for run in place.runs():
                is_begun = (place.path / "checkpoints" / run.info.run_id / "experiment.toml").is_file()
                if PARENT not in run.data.tags and is_begun:
                    return ("train", "--resume", run.info.run_id)
        return self.begin(**changes)

    def trained(self, place: Place, pattern: str) -> dict[Path, float]:
        """Return the files of that name in its leaves' folders, with their times, the newest last."""
        found = {}
        for path in place.path.glob(f"{self.leaves}/{pattern}"):
            with suppress(FileNotFoundError):  # replaced meanwhile
                found[path] = path.stat().st_mtime
        return dict(sorted(found.items(), key=lambda item: item[1]))

    def has_state_since(self, place: Place, start: float) -> bool:
        """Return whether its last leaf has saved a state since ``start``, in seconds since 1970."""
        states = self.trained(place, "last.pt")
        return len(states) == self.count and max(states.values()) > start

    def end(self, place: Place) -> dict[str, Any]:
        """Return its result: the epochs and final metrics of each finished run, and the registered versions.

        Runs are named by seed and dropout: ids and the numbers of trials differ from try to try.
        """
        found: dict[str, Any] = {}
        for run in place.runs():
            if run.info.status == "FINISHED":
                name = _name(run)
                assert name not in found, f"two runs of {name} have finished"
                found[name] = {
                    "results": {
                        name: value
                        for name, value in run.data.metrics.items()
                        if name not in _TIMES and not name.startswith("system/")
                    },
                    "losses": {
                        name: [(point.step, point.value) for point in history]
                        for name in _LOSSES
                        if "train_loss" in run.data.metrics  # a parent that concludes twice logs twice
                        and (history := place.client.get_metric_history(run.info.run_id, name))
                    },
                }
        versions = list(place.client.search_model_versions("name='capexp-scenes'"))
        found["registered"] = [
            (version.tags["dev_loss"], version.tags["dev_cider"], _weights(place, version)) for version in versions
        ]
        if versions:
            champion = place.client.get_model_version_by_alias("capexp-scenes", "champion").version
            found["is champion"] = [version.version == champion for version in versions]
        return found


def _name(run: Any) -> str:
    if PARENT not in run.data.tags:
        return "the run itself"
    return f"seed {run.data.params['seed']}, dropout {run.data.params['model.dropout']}"


def _weights(place: Place, version: Any) -> dict[str, bytes]:
    mlflow.set_tracking_uri(place.client.tracking_uri)
    model = Path(mlflow.artifacts.download_artifacts(f"models:/{version.name}/{version.version}"))
    return {str(path.relative_to(model)): path.read_bytes() for path in sorted(model.rglob("*.safetensors"))}


def _ensemble(settings: Mapping[str, Any]) -> tuple[str, ...]:
    members = json.dumps([{"experiment": "scenes", "seeds": [1, 2], "settings": dict(settings)}])
    return ("train", "--experiment", "scenes-ensemble", "--ensemble.members", members)


def study(settings: Mapping[str, Any], *words: str) -> tuple[str, ...]:
    """Return the command of a study; ``words`` say how many trials it has."""
    return ("tune", *flags(settings), "--tune.pruner", "none", "--tune.search", json.dumps(SPACE), *words)


SINGLE = Kind(lambda settings: ("train", *flags(settings)), "checkpoints/*")
SEEDS = Kind(lambda settings: ("train", "--seeds", "2", *flags(settings)), "checkpoints/*/*", 2)
ENSEMBLE = Kind(_ensemble, "checkpoints/*", 2)
# A trial that is run again gets another number, and the trials after it draw other values: only a study that is stopped
# in its last trial has the result of an undisturbed one.
STUDY = Kind(lambda settings: study(settings, "--trials", "2"), "studies/scenes/*", 2, is_resumed=False)
KINDS = {"single": SINGLE, "seeds": SEEDS, "ensemble": ENSEMBLE, "study": STUDY}
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m")
