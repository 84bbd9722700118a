"""Trials per minute: a study in one process, which shares data, features and device; with workers; and separate runs.

    python experiments/benchmarks/bench_search.py
    python experiments/benchmarks/bench_search.py --device cuda --photos 6000 --workers 1 2 4 8 --each 4 --no-runs

Every trial trains for the same number of epochs, in a folder of its own: on the embedded scenes, or with ``--photos``
as ``flickr8k-merge`` does, on made-up features and captions. Each contestant's time includes everything that its
commands do, from their start to the registered model. Trials in one process share its start; separate runs start again
each time. "While all work" leaves out the start and the end of a study: it counts the trials that end after each
worker has ended one.

All trials have the same settings but one without an effect on losses, so that their dev losses must be equal.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import bench
import bench_training
import numpy as np
import torch
from mlflow.entities import Run
from mlflow.tracking import MlflowClient

from capexp.distributed import choose_device
from capexp.experiment import find_experiment, load_experiment, to_toml

ROOT = Path(__file__).parents[2]
SECONDS_A_MINUTE = 60
DEV_PHOTOS = 1 / 6  # for each train photo, as in Flickr8k


def make_up(folder: Path, photos: int, shape: tuple[int, ...]) -> dict[str, Any]:
    """Write made-up captions, and features of this shape, to a folder; return the settings that name them."""
    task = bench_training.Task(photos + round(photos * DEV_PHOTOS), torch.device("cpu"))
    names = task.batches.split.photos
    lines = [
        f"{name}#{i}\t{text}\n" for name, texts in zip(names, task.texts, strict=True) for i, text in enumerate(texts)
    ]
    (folder / "captions.txt").write_text("".join(lines), encoding="utf-8")
    for split, of_split in (("train", names[:photos]), ("dev", names[photos:])):
        (folder / f"{split}.txt").write_text("\n".join(of_split), encoding="utf-8")
    drawn = np.random.default_rng(1).random((min(len(names), 1000), *shape), np.float32).astype(np.float16)
    np.save(folder / "features.npy", drawn[np.arange(len(names)) % len(drawn)])
    (folder / "features.txt").write_text("\n".join(names), encoding="utf-8")
    return {
        "captions.root": str(folder),
        "captions.captions": "captions.txt",
        "captions.train": "train.txt",
        "captions.dev": "dev.txt",
        "features.file": str(folder / "features.npy"),
        "features.weights": "unknown",
        "features.cache": str(folder / "cache"),
        "features.mirror": False,
    }


class Commands:
    """Commands on an experiment, each in a new folder with a store of its own."""

    def __init__(self, folder: Path, experiment: str, settings: dict[str, Any], threads: int) -> None:
        self.folder = folder
        self.file = folder / f"{experiment}.toml"
        self.file.write_text(to_toml(load_experiment(find_experiment(experiment), settings)), encoding="utf-8")
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        others = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
        self.environment = others | {"PYTHONPATH": path, "OMP_NUM_THREADS": str(threads), "CAPEXP_OFFLINE": "1"}

    def run(self, place: Path, *command: str) -> None:
        """Run a command's module with its arguments."""
        module, *arguments = command
        whole = [*module.split(), "--experiment", str(self.file), *arguments]
        done = subprocess.run(
            [sys.executable, "-m", *whole], cwd=place, env=self.environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{whole}\n{done.stdout}\n{done.stderr}"


class Searches:
    """The contestants: studies and separate runs."""

    def __init__(self, commands: Commands) -> None:
        self.commands = commands
        self.steady: dict[int, float] = {}
        """The trials a minute while all workers work, by the number of workers."""
        self.losses: set[float] = set()
        """The dev losses of all trials."""

    def search(self, workers: int, trials: int) -> float:
        """Run a study; return the trials times 60, so that the rate per second is trials per minute."""
        with tempfile.TemporaryDirectory(dir=self.commands.folder) as place:
            self.commands.run(Path(place), "capexp.tune", "--trials", str(trials), "--workers", str(workers))
            ended = trained(Path(place))
        ends = sorted(run.info.end_time / 1000 for run in ended)
        if trials > workers:
            self.steady[workers] = SECONDS_A_MINUTE * (trials - workers) / (ends[-1] - ends[workers - 1])
        self.losses |= {run.data.metrics["best_dev_loss"] for run in ended}
        return trials * SECONDS_A_MINUTE

    def one_by_one(self, trials: int) -> float:
        """Train the same number of runs, each in a new process; return as :meth:`search` does."""
        with tempfile.TemporaryDirectory(dir=self.commands.folder) as place:
            for _ in range(trials):
                self.commands.run(Path(place), "capexp.train")
        return trials * SECONDS_A_MINUTE


def trained(place: Path) -> list[Run]:
    """Return the runs in a folder that have trained a captioner."""
    client = MlflowClient(f"sqlite:///{place}/mlflow.db")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    runs = client.search_runs(experiments, "attributes.status = 'FINISHED'")
    return [run for run in runs if "epoch_seconds" in run.data.metrics]


def main() -> None:
    """Run the benchmark and print its record."""
    parser = bench.arguments(__doc__)
    parser.set_defaults(rounds=1)
    parser.add_argument("--photos", type=int, help="number of made-up train photos, in place of the embedded scenes")
    parser.add_argument("--trials", type=int, default=6, help="trials of each contestant")
    parser.add_argument("--each", type=int, metavar="N", help="N trials for each worker, at least --trials in all")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], metavar="N")
    parser.add_argument("--no-runs", action="store_true", help="leave out the separate runs")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = choose_device(arguments.device)
    settings = {name: getattr(arguments, name) for name in ("photos", "trials", "each", "epochs", "workers")}
    record = bench.Record("search", "trials a minute", device, settings)
    with tempfile.TemporaryDirectory() as folder:
        of_trials = {
            "name": "search",
            "training.epochs": arguments.epochs,
            "training.patience": arguments.epochs,
            "training.device": str(device),
            "tune.pruner": "none",
            "tune.search": {"training.keep": {"low": 1, "high": 9}},
        }
        data = {} if arguments.photos is None else make_up(Path(folder), arguments.photos, (bench_training.FEATURES,))
        experiment = "scenes" if arguments.photos is None else "flickr8k-merge"
        searches = Searches(Commands(Path(folder), experiment, of_trials | data, arguments.threads))
        names = {workers: "one process" if workers == 1 else f"{workers} workers" for workers in arguments.workers}
        trials = {workers: max(arguments.trials, workers * (arguments.each or 0)) for workers in names}
        contestants: dict[str, Callable[[], float]] = {
            name: partial(searches.search, workers, trials[workers]) for workers, name in names.items()
        }
        first, *others = names.values()
        pairs = [(other, first) for other in others]
        if not arguments.no_runs:
            contestants["one by one"] = partial(searches.one_by_one, arguments.trials)
            pairs += [(name, "one by one") for name in names.values()]
        record.race(contestants, pairs, arguments.rounds, warm_up=False)  # each command starts cold
    for workers, steady in searches.steady.items():
        record.rates[f"{names[workers]}, while all work"] = steady
    for workers, steady in list(searches.steady.items())[1:]:
        first_steady = searches.steady[arguments.workers[0]]
        record.ratios[f"{names[workers]} / {first}, while all work"] = steady / first_steady
    settings["dev losses"] = [min(searches.losses), max(searches.losses)]
    record.finish(arguments.output)


if __name__ == "__main__":
    main()
