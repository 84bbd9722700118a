"""Kill each kind of run at random moments: training, registration, seeds, an ensemble, tuning; and extraction.

    python experiments/soak/soak_kills.py                 a hundred kills
    python experiments/soak/soak_kills.py --kills 8       a few

A SIGKILL ends the command with all its processes; the command is given again until it ends by itself. After each kill
the store must be readable, every bundle complete, every version registered with its files, and the champion one of the
versions. At the end the result must be equal to an undisturbed run's, bit for bit. The moments are uniform over the
time that the command takes undisturbed; for registration, over the time from its last epoch to its end.
"""

import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

from bench_extraction import draw_weights
from kinds import ENSEMBLE, PARENT, SEEDS, SETTINGS, SINGLE, Kind, flags, study
from soak import Folder, Lost, arguments, finish, kill, wait_for

SHARES = {"train": 0.2, "register": 0.2, "seeds": 0.16, "ensemble": 0.16, "extract": 0.12, "tune": 0.16}
SELF_CRITICAL = {
    "registry.metric": "dev_cider",
    "training.self_critical.epochs": 1,
    "training.self_critical.photos": 10,
    "training.self_critical.samples": 2,
}
BOTH_PHASES = replace(SINGLE, command=lambda settings: ("train", *flags({**settings, **SELF_CRITICAL})))


@dataclass
class Activity:
    """A run or extraction that is killed and resumed."""

    words: Callable[[Folder], tuple[str, ...]]
    """Return the command that starts or resumes it."""
    outcome: Callable[[Folder], Any]
    """Return its result, to be compared with an undisturbed one's."""
    is_done: Callable[[Folder], bool] = lambda folder: False
    """Return whether it was complete before it was killed; if it always returns False, it is always resumed."""
    begins: Callable[[Folder, float], bool] = lambda folder, start: True
    """Return whether the phase in which it is killed has begun, for a command started at ``start``."""


def _is_finished(folder: Folder) -> bool:
    return any(run.info.status == "FINISHED" for run in folder.runs() if PARENT not in run.data.tags)


def _has_trained(folder: Folder, start: float) -> bool:
    return any(one.stat().st_mtime > start for one in folder.path.glob("checkpoints/**/loss.png"))


def _of_kind(kind: Kind, begins: Callable[[Folder, float], bool] = lambda folder, start: True) -> Activity:
    """Return the activity of a kind of run. Runs that never saved a state may be left behind, others may not."""

    def outcome(folder: Folder) -> Any:
        for run in folder.runs():
            if run.info.status != "FINISHED" and list(folder.path.glob(f"checkpoints/**/{run.info.run_id}/last.pt")):
                raise Lost(f"{run.info.run_name} had begun to train and was not resumed: {run.info.run_id}")
        try:
            end = kind.end(folder)
        except AssertionError as error:
            raise Lost(str(error)) from None
        if len(end["registered"]) != 1:
            raise Lost(f"registered {len(end['registered'])} times")
        return end

    return Activity(kind.go_on, outcome, _is_finished, begins)


def _extract(weights: Path) -> Callable[[Folder], tuple[str, ...]]:
    words = ("--split", "dev", "--features.cache", "cache", "--features.weights", str(weights))
    return lambda folder: ("extract", *words, "--features.batch_size", "4")


def _extracted(folder: Folder) -> Any:
    (file,) = folder.path.glob("cache/*.features")
    record = np.dtype([("photo", "S32"), ("rest", "V1028")])
    records = np.frombuffer(file.read_bytes()[4096:], record)
    return sorted((one["photo"].item(), one["rest"].item()) for one in records)


def _tuned(folder: Folder) -> Any:
    """Check that the study is complete, and that a resumed trial has the same loss as an undisturbed run."""
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
    versions = folder.client.search_model_versions("name='capexp-scenes'")
    champion = folder.client.get_model_version_by_alias("capexp-scenes", "champion").version
    return [version.version == champion for version in versions]


def disturb(name: str, activity: Activity, kills: int, root: Path, draw: random.Random) -> Counter[str]:
    """Kill an activity ``kills`` times, check the folder after each kill, and compare results with the undisturbed one.

    Raises:
        Lost: with the moments of the kills.
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
                raise Lost("its result differs from the undisturbed one's")
        except Lost as error:
            after = ", ".join(f"{moment:.2f}" for moment in moments)
            raise Lost(f"{name}, {folder.path}, killed after {after} s: {error}") from error
        counted["ended as undisturbed"] += 1
    print(f"{name}: {dict(counted)}", flush=True)
    return counted


def _killed(folder: Folder, activity: Activity, moment: float) -> bool:
    """Start or resume an activity and kill it ``moment`` seconds after ``begins``; return False if it had ended."""
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
    """Run the soak; return 1 if something was lost, else 0. The folder is kept."""
    parser = arguments(__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--only", choices=tuple(SHARES), help="all kills in this one")
    flags = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="capexp-soak-"))
    weights = draw_weights(root / "random.pth")
    activities = {
        "train": _of_kind(BOTH_PHASES),
        "register": _of_kind(BOTH_PHASES, _has_trained),
        "seeds": _of_kind(SEEDS),
        "ensemble": _of_kind(ENSEMBLE),
        "extract": Activity(_extract(weights), _extracted),
        "tune": Activity(lambda folder: study(SETTINGS, "--trials", "3", "--workers", "2"), _tuned),
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
