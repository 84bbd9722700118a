"""Many short trials of one study whose workers are killed at random: none may be lost, none counted twice.

    python experiments/soak/soak_trials.py                200 trials of real training, two workers
    python experiments/soak/soak_trials.py --trials 20 --every 5 15

A SIGKILL ends either one worker, or the command with all its workers; the command is then given again.
"""

import json
import random
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from soak import SMALL, Folder, Lost, arguments, finish, kill

EVERYTHING = 6  # on average one kill in six ends the command with all its workers


def workers(command: int) -> list[psutil.Process]:
    """Return the living workers of a command: the forks of the server of multiprocessing that it starts."""
    try:
        servers = [one for one in psutil.Process(command).children() if "forkserver" in " ".join(one.cmdline())]
        return [fork for server in servers for fork in server.children()]
    except psutil.Error:
        return []


def study_of(folder: Folder) -> Any:
    """Return the study in the folder's journal."""
    import optuna

    backend = optuna.storages.journal.JournalFileBackend(str(folder.path / "studies/scenes.journal"))
    return optuna.load_study(study_name="scenes", storage=optuna.storages.JournalStorage(backend))


def verify(folder: Folder, wanted: int) -> dict[str, int]:
    """Count the trials of a study that has ended.

    Raises:
        Lost: a trial is missing, is counted twice, or differs from its run in MLflow.
    """
    trials = study_of(folder).get_trials()
    states = Counter(trial.state.name for trial in trials)
    done = [trial for trial in trials if trial.state.name == "COMPLETE"]
    if len(done) != wanted or {"RUNNING", "WAITING"} & states.keys():
        raise Lost(f"{wanted} trials were to be done: {dict(states)}")
    if len({tuple(trial.params.items()) for trial in done}) != wanted:
        raise Lost("values are counted twice")
    after = [trial.user_attrs["earlier"][0] for trial in trials if "earlier" in trial.user_attrs]
    if len(after) != len(set(after)):
        raise Lost("an interrupted trial was resumed in two others")
    given_up = [one for one in trials if one.state.name == "FAIL" and one.params and one.number not in after]
    for trial in given_up:
        if trial.user_attrs.get("vanished", 0) < 2:
            raise Lost(f"trial {trial.number} was interrupted, and no other trial has resumed it")
    runs = {run.info.run_id: run for run in folder.runs()}
    (parent,) = [run for run in runs.values() if "study" in run.data.tags]
    for trial in done:
        run = runs.pop(trial.user_attrs["run_id"], None)
        if run is None or run.info.status != "FINISHED" or run.data.metrics["best_dev_loss"] != trial.value:
            raise Lost(f"trial {trial.number}: its run is {run and run.info.status}, or another's too")
        if run.data.tags["trial"] != str(trial.number):
            raise Lost(f"trial {trial.number}: its run says {run.data.tags['trial']}")
    left = [run.info.status for run in runs.values() if run is not parent]
    if parent.info.status != "FINISHED" or "RUNNING" in left:
        raise Lost(f"the study's run is {parent.info.status}; runs of broken-off trials: {left}")
    return {"trials done": wanted, "trials gone on with": len(after), "trials given up": len(given_up)}


def main() -> int:
    """Run the soak; return 1 if a trial was lost or counted twice, else 0. The folder is kept."""
    parser = arguments(__doc__)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--every", type=float, nargs=2, default=(10.0, 40.0), metavar="SECONDS", help="from, to")
    flags = parser.parse_args()
    folder = Folder(Path(tempfile.mkdtemp(prefix="capexp-soak-")) / "study")
    space = json.dumps({"model.lstm_units": {"low": 8, "high": 64}, "model.dropout": {"low": 0.0, "high": 0.6}})
    words = (*SMALL, "--training.epochs", "1", "--tune.pruner", "none", "--tune.heartbeat", "2", "--tune.search", space)
    command = ("tune", *words, "--trials", str(flags.trials), "--workers", "2")
    draw, counted, start = random.Random(flags.seed), Counter[str](), time.monotonic()
    process = folder.start(*command)
    try:
        while process.poll() is None:
            end = time.monotonic() + draw.uniform(*flags.every)
            while process.poll() is None and time.monotonic() < end:
                time.sleep(0.1)
            alive = workers(process.pid)
            if draw.randrange(EVERYTHING) == 0:
                if kill(process):
                    counted["commands killed"] += 1
                    counted["bundles checked"] += folder.verify()
                    process = folder.start(*command)
            elif alive:
                with suppress(psutil.Error):  # it has ended meanwhile
                    draw.choice(alive).kill()
                    counted["workers killed"] += 1
        folder.end(process)
        counted["bundles checked"] += folder.verify()
        counted |= verify(folder, flags.trials)
    except Lost as error:
        print(f"{folder.path}: {error}", file=sys.stderr)
        return 1
    finish({**counted, "seconds": round(time.monotonic() - start)}, flags.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
