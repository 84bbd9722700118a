"""Seconds of a whole run of ``capexp.train``: its epochs, everything else, and the same run under torchrun.

    python experiments/benchmarks/bench_run.py --device cuda

The run is as large as ``flickr8k-attention``, on made-up grids and captions. "The rest" is the time of the command
without its epochs: start, features, captions and scores of the dev photos, registration. Under torchrun there is one
process, which sums over all ranks as several do; the losses must be equal.
"""

import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import bench
from bench_search import Commands, make_up, trained
from mlflow.tracking import MlflowClient

from capexp.distributed import choose_device

TORCHRUN = "torch.distributed.run --nproc-per-node 1 -m capexp.train"


def main() -> None:
    """Run the benchmark and print its record."""
    parser = bench.arguments(__doc__)
    parser.set_defaults(rounds=1)
    parser.add_argument("--photos", type=int, default=6000, help="number of train photos")
    parser.add_argument("--epochs", type=int, default=4)
    arguments = parser.parse_args()
    device = choose_device(arguments.device)
    settings = {"photos": arguments.photos, "epochs": arguments.epochs}
    record = bench.Record("run", "runs", device, settings)
    seconds: dict[str, dict[str, float]] = {}
    losses: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        of_run = {
            "training.epochs": arguments.epochs,
            "training.patience": arguments.epochs,
            "training.device": arguments.device,
        }
        data = make_up(Path(folder), arguments.photos, (49, 512))
        commands = Commands(Path(folder), "flickr8k-attention", of_run | data, arguments.threads)

        def train(name: str, module: str) -> float:
            with tempfile.TemporaryDirectory(dir=folder) as place:
                start = time.perf_counter()
                commands.run(Path(place), module)
                whole = time.perf_counter() - start
                (run,) = trained(Path(place))
                client = MlflowClient(f"sqlite:///{place}/mlflow.db")
                epochs, losses[name] = (
                    [point.value for point in client.get_metric_history(run.info.run_id, metric)]
                    for metric in ("epoch_seconds", "train_loss")
                )
            seconds[name] = {
                "all": whole,
                "first epoch": epochs[0],
                "last epoch": epochs[-1],
                "rest": whole - sum(epochs),
            }
            return 1

        contestants = {"train": lambda: train("train", "capexp.train"), "torchrun": lambda: train("torchrun", TORCHRUN)}
        train("train", "capexp.train")  # fills the cache of features
        record.race(contestants, [("torchrun", "train")], arguments.rounds, warm_up=False)
    record.growth = {f"{name}, seconds": values for name, values in seconds.items()}
    record.ratios["torchrun / train, an epoch"] = seconds["train"]["last epoch"] / seconds["torchrun"]["last epoch"]
    pairs = zip(losses["train"], losses["torchrun"], strict=True)
    settings["largest difference of a train loss"] = max(abs(one - other) / one for one, other in pairs)
    record.finish(arguments.output)


if __name__ == "__main__":
    main()
