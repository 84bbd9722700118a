"""Trials per minute: a study in one process, which shares data, features and device; with workers; and separate runs.

    python experiments/benchmarks/bench_search.py

Every trial trains the embedded scenes for the same number of epochs, in a folder of its own. Each contestant's time
includes everything that its commands do, from their start to the registered model. Trials in one process share its
start; separate runs start again each time.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import bench
import torch

from capexp.distributed import choose_device
from capexp.experiment import find_experiment, load_experiment, to_toml

ROOT = Path(__file__).parents[2]
SECONDS_A_MINUTE = 60


class Commands:
    """The commands of the contestants, each in a new folder with a store of its own."""

    def __init__(self, folder: Path, trials: int, epochs: int, threads: int, device: str) -> None:
        self.folder, self.trials = folder, trials
        overrides = {
            "name": "search",
            "training.epochs": epochs,
            "training.patience": epochs,
            "training.device": device,
            "tune.pruner": "none",
            "tune.search": {"model.dropout": {"low": 0.2, "high": 0.3}},  # does not change the cost of a trial
        }
        self.settings = folder / "search.toml"
        self.settings.write_text(to_toml(load_experiment(find_experiment("scenes"), overrides)), encoding="utf-8")
        self.environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads)}

    def search(self, workers: int) -> float:
        """Run a study of all trials; return the trials times 60, so that the rate per second is trials per minute."""
        with tempfile.TemporaryDirectory(dir=self.folder) as place:
            self._run(Path(place), "tune", "--trials", str(self.trials), "--workers", str(workers))
        return self.trials * SECONDS_A_MINUTE

    def one_by_one(self) -> float:
        """Train the same number of runs, each in a new process; return as :meth:`search` does."""
        with tempfile.TemporaryDirectory(dir=self.folder) as place:
            for trial in range(self.trials):
                dropout = 0.2 + 0.1 * trial / self.trials
                self._run(Path(place), "train", "--model.dropout", str(dropout))
        return self.trials * SECONDS_A_MINUTE

    def _run(self, place: Path, command: str, *arguments: str) -> None:
        whole = [sys.executable, "-m", f"capexp.{command}", "--experiment", str(self.settings), *arguments]
        done = subprocess.run(whole, cwd=place, env=self.environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def main() -> None:
    """Run the benchmark and print its record."""
    parser = bench.arguments(__doc__)
    parser.set_defaults(rounds=1)
    parser.add_argument("--trials", type=int, default=6)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = choose_device(arguments.device)
    settings = {name: getattr(arguments, name) for name in ("trials", "epochs", "workers")}
    record = bench.Record("search", "trials a minute", device, settings)
    workers = f"{arguments.workers} workers"
    with tempfile.TemporaryDirectory() as folder:
        commands = Commands(Path(folder), arguments.trials, arguments.epochs, arguments.threads, str(device))
        contestants = {
            "one process": lambda: commands.search(1),
            workers: lambda: commands.search(arguments.workers),
            "one by one": commands.one_by_one,
        }
        pairs = [("one process", "one by one"), (workers, "one by one"), (workers, "one process")]
        record.race(contestants, pairs, arguments.rounds, warm_up=False)  # each command starts cold
    record.finish(arguments.output)


if __name__ == "__main__":
    main()
