"""SIGKILL at random moments of training, registration, an ensemble's members, extraction and tuning.

    python experiments/soak/soak_kills.py                 a hundred kills
    python experiments/soak/soak_kills.py --kills 8       a few

All that a command has started dies with it, and it is given again until it comes to its end. After each kill the store
must be readable, every bundle whole, every version registered with its files and the champion one of them; the end must
be what an undisturbed one comes to, to the bit. Moments are uniform over the time that the command takes undisturbed;
for registration, over that from its last epoch to its end.
"""

import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from bench_extraction import draw_weights
from soak import SMALL, Folder, Lost, arguments, finish, kill, wait_for

SHARES = {"train": 0.3, "register": 0.2, "ensemble": 0.15, "extract": 0.1, "tune": 0.25}
TRAIN = (
    *SMALL,
    *("--training.epochs", "2", "--training.save_steps", "25", "--registry.metric", "dev_cider"),
    *("--training.self_critical.epochs", "1", "--training.self_critical.photos", "10"),
    *("--training.self_critical.samples", "2"),
)
SETTINGS = {
    **{"model.embedding_size": 32, "model.lstm_units": 32, "model.output_dropout": 0.0, "training.device": "cpu"},
    **{"training.learning_rate": 0.01, "training.precision": "float32", "training.epochs": 2},
}
MEMBERS = json.dumps([{"experiment": "scenes", "seeds": [1, 2], "settings": SETTINGS | {"training.save_steps": 25}}])
TOGETHER = ("--experiment", "scenes-ensemble", "--ensemble.members", MEMBERS)
TUNE = (
    *SMALL,
    *("--trials", "3", "--workers", "2", "--training.epochs", "2", "--training.save_steps", "25"),
    *("--tune.pruner", "none", "--tune.search", json.dumps({"model.lstm_units": {"low": 8, "high": 48}})),
)


@dataclass
class Activity:
    """Something that is killed and gone on with."""

    words: Callable[[Folder], tuple[str, ...]]
    """The command that begins it, or goes on with it."""
    outcome: Callable[[Folder], Any]
    """What it has come to."""
    is_done: Callable[[Folder], bool] = lambda folder: False
    """Whether it had come to its end before it was killed; what cannot tell is gone on with."""
    begins: Callable[[Folder, float], bool] = lambda folder, start: True
    """Whether the time has come in which it is killed, of a command started then."""


def _train(folder: Folder) -> tuple[str, ...]:
    for run in folder.runs():
        if (folder.path / "checkpoints" / run.info.run_id / "experiment.toml").is_file():
            return ("train", "--resume", run.info.run_id)
    return ("train", *TRAIN)


def _is_finished(folder: Folder) -> bool:
    return any(run.info.status == "FINISHED" for run in folder.runs())


def _has_trained(folder: Folder, start: float) -> bool:
    return any(one.stat().st_mtime > start for one in folder.path.glob("checkpoints/**/loss.png"))


def _trained(folder: Folder) -> Any:
    """Losses and rewards of each epoch, the weights of the best captioner, and how often it is registered."""
    *lost, run = folder.runs()
    if run.info.status != "FINISHED" or len(lost) > 1:
        raise Lost(f"{len(lost)} runs were begun in vain, the last one is {run.info.status}")
    told = {
        name: [(one.step, one.value) for one in folder.client.get_metric_history(run.info.run_id, name)]
        for name in ("train_loss", "dev_loss", "reward", "epoch_dev_cider")
    }
    bundles = sorted(folder.path.glob(f"checkpoints/{run.info.run_id}/self-critical/ep*/decoder.safetensors"))
    versions = folder.client.search_model_versions("name='capexp-scenes'")
    cards = [(one.tags["dev_cider"], list(one.aliases)) for one in versions]
    return told, bundles[-1].read_bytes(), cards


def _ensembled(folder: Folder) -> Any:
    """The losses of its epochs by member, and the weights of all in the one bundle."""
    told = {
        run.data.params["seed"]: [
            (one.step, one.value) for one in folder.client.get_metric_history(run.info.run_id, "dev_loss")
        ]
        for run in folder.runs()
        if run.data.params.get("name") == "scenes" and run.info.status == "FINISHED"
    }
    last = [run for run in folder.runs() if run.data.params.get("name") == "scenes-ensemble"][-1]
    bundle = folder.path / "checkpoints" / last.info.run_id / "ensemble"
    versions = folder.client.search_model_versions("name='capexp-scenes'")
    is_champion = any("champion" in one.aliases for one in versions)
    return told, [path.read_bytes() for path in sorted(bundle.rglob("*.safetensors"))], last.info.status, is_champion


def _extract(weights: Path) -> Callable[[Folder], tuple[str, ...]]:
    words = ("--split", "dev", "--features.cache", "cache", "--features.weights", str(weights))
    return lambda folder: ("extract", *words, "--features.batch_size", "4")


def _extracted(folder: Folder) -> Any:
    (file,) = folder.path.glob("cache/*.features")
    record = np.dtype([("photo", "S32"), ("rest", "V1028")])
    records = np.frombuffer(file.read_bytes()[4096:], record)
    return sorted((one["photo"].item(), one["rest"].item()) for one in records)


def _tuned(folder: Folder) -> Any:
    """That the study is whole, and that trials which were broken off come to what undisturbed ones come to."""
    import mlflow
    import optuna

    backend = optuna.storages.journal.JournalFileBackend(str(folder.path / "studies/scenes.journal"))
    study = optuna.load_study(study_name="scenes", storage=optuna.storages.JournalStorage(backend))
    trials = study.get_trials()
    states = Counter(trial.state.name for trial in trials)
    if states["COMPLETE"] != 3 or {"RUNNING", "WAITING"} & states.keys():
        raise Lost(f"trials: {states}")
    by_id = {run.info.run_id: run for run in folder.runs()}
    done = [trial for trial in trials if trial.state.name == "COMPLETE"]
    for trial in done:
        run = by_id[trial.user_attrs["run_id"]]
        if run.info.status != "FINISHED" or run.data.metrics["best_dev_loss"] != trial.value:
            raise Lost(f"trial {trial.number}: {trial.value}, its run: {run.info.status}, {run.data.metrics}")
    if len({trial.user_attrs["run_id"] for trial in done}) != 3:
        raise Lost("two trials are one run")
    for trial in [trial for trial in done if "earlier" in trial.user_attrs][:1]:
        alone = Folder(folder.path / "alone")
        run_id = trial.user_attrs["run_id"]
        folder.client  # noqa: B018, artifacts are those of this store
        settings = mlflow.artifacts.download_artifacts(run_id=run_id, artifact_path="experiment.toml")
        alone.run("train", "--experiment", settings)
        (undisturbed,) = alone.runs()
        if undisturbed.data.metrics["best_dev_loss"] != trial.value:
            raise Lost(f"trial {trial.number} came to {trial.value}, undisturbed {undisturbed.data.metrics}")
    return [list(one.aliases) for one in folder.client.search_model_versions("name='capexp-scenes'")]


def disturb(name: str, activity: Activity, kills: int, root: Path, draw: random.Random) -> Counter[str]:
    """Kills an activity so many times, checks the folder after each, and compares its ends with the undisturbed one.

    Raises:
        Lost: with the moment of the last kill.
    """
    counted: Counter[str] = Counter()
    plain = Folder(root / name / "undisturbed")
    start = time.time()
    process = plain.start(*activity.words(plain))
    wait_for(lambda: activity.begins(plain, start), process)
    begun = time.time()
    plain.end(process)
    longest = time.time() - begun
    wanted = activity.outcome(plain)
    print(f"{name}: {time.time() - start:.1f} s undisturbed, killed within the last {longest:.1f} s", flush=True)
    while counted["kills"] < kills:
        counted["begun"] += 1
        folder = Folder(root / name / str(counted["begun"]))
        moments: list[float] = []
        try:
            while counted["kills"] < kills:
                moments.append(draw.uniform(0, longest))
                if not _killed(folder, activity, moments[-1]):
                    break
                counted["kills"] += 1
                counted["bundles checked"] += folder.verify()
                if activity.is_done(folder):
                    break
            else:
                folder.end(folder.start(*activity.words(folder)))
            counted["bundles checked"] += folder.verify()
            if activity.outcome(folder) != wanted:
                raise Lost("it came to something else than the undisturbed one")
        except Lost as error:
            after = ", ".join(f"{moment:.2f}" for moment in moments)
            raise Lost(f"{name}, {folder.path}, killed after {after} s: {error}") from error
        counted["ended as undisturbed"] += 1
    print(f"{name}: {dict(counted)}", flush=True)
    return counted


def _killed(folder: Folder, activity: Activity, moment: float) -> bool:
    """Starts or goes on with an activity and kills it so many seconds after its time has come; whether it still ran."""
    start = time.time()
    process = folder.start(*activity.words(folder))
    wait_for(lambda: activity.begins(folder, start), process)
    end = time.time() + moment
    wait_for(lambda: time.time() > end, process)
    if kill(process):
        return True
    folder.end(process)
    return False


def main() -> int:
    """The command; its exit status is 1 where something was lost, and then the folder is left."""
    parser = arguments(__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--only", choices=tuple(SHARES), help="all kills in this one")
    flags = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="capexp-soak-"))
    weights = draw_weights(root / "random.pth")
    activities = {
        "train": Activity(_train, _trained, _is_finished),
        "register": Activity(_train, _trained, _is_finished, _has_trained),
        "ensemble": Activity(lambda folder: ("train", *TOGETHER), _ensembled),
        "extract": Activity(_extract(weights), _extracted),
        "tune": Activity(lambda folder: ("tune", *TUNE), _tuned),
    }
    counted: dict[str, dict[str, int]] = {}
    for name, activity in activities.items():
        kills = round(flags.kills * SHARES[name]) if flags.only is None else flags.kills * (flags.only == name)
        if kills:
            try:
                counted[name] = dict(disturb(name, activity, kills, root, random.Random(f"{name} {flags.seed}")))
            except Lost as error:
                print(error, file=sys.stderr)
                return 1
    finish(counted, flags.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
