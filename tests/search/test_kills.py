"""Workers killed at any moment: no trial lost, none counted twice, on a journal and on a real PostgreSQL."""

import multiprocessing
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Generator
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from user_folder import wait_for

from capexp.search.storage import find_storage
from capexp.search.study import Study
from capexp.search.trial import PendingTrial
from capexp.settings import Range, TuneConfig
from capexp.training.loop import Epoch, Update

WANTED = 40
KNOWN = {"training.epochs": "4"}
CONFIG = TuneConfig(trials=WANTED, pruner="none", heartbeat=1, search={"x": Range(low=0.0, high=1.0)})


def open_study(url: str | None, folder: Path) -> Study:
    return Study(find_storage(url, folder, "study", CONFIG.heartbeat), "study", CONFIG, 3, 4, KNOWN)


def objective(attempt: PendingTrial) -> Generator[Update, None, Any]:
    for number in (1, 2, 3, 4):
        time.sleep(0.1)
        yield Update("", Epoch(number, 1.0, float(attempt.values["x"]) + 1 / number, 0.1, 1.0, 1.0, True, 0))
    return SimpleNamespace(run_id=f"run-{attempt.number}", is_pruned=False)


def work(url: str | None, folder: Path) -> None:
    study = open_study(url, folder)
    while not study.is_complete():
        trial = study.run_trial(objective)
        try:
            while True:
                next(trial)
                (folder / f"{os.getpid()}.at-work").touch()
        except StopIteration as stop:
            if stop.value is None:
                time.sleep(0.1)


def start(url: str | None, folder: Path) -> BaseProcess:
    """A worker: forked, since another import of torch would take longer than its work."""
    process = multiprocessing.get_context("fork").Process(target=work, args=(url, folder))
    process.start()
    return process


def known_values(trial: Any) -> dict[str, Any]:
    """What was drawn for a trial, or was to be: it may have been killed between the two."""
    return {**trial.system_attrs.get("fixed_params", {}), **trial.params}


def assert_counted_once(trials: list[Any]) -> None:
    """Every trial that was begun is done, goes on in one later trial, or has vanished three times."""
    counted = [trial for trial in trials if trial.state.name in ("COMPLETE", "PRUNED")]
    assert len(counted) == WANTED
    after = [trial.user_attrs["earlier"][0] for trial in trials if "earlier" in trial.user_attrs]
    assert len(after) == len(set(after)), "a trial goes on in one other trial"
    for trial in trials:
        if trial.state.name == "FAIL" and known_values(trial):
            assert trial.number in after or trial.user_attrs.get("vanished", 0) == 2
    values = [trial.params["x"] for trial in counted]
    assert len(set(values)) == WANTED, "no values are counted twice"
    for trial in trials:
        for earlier in trial.user_attrs.get("earlier", []):
            assert known_values(trials[earlier]) == known_values(trial)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["journal", "postgresql"])
def test_workers_killed_at_any_moment_lose_no_trial_and_count_none_twice(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    make: Callable[[str], str] | None = request.getfixturevalue("postgresql") if kind == "postgresql" else None
    url = make("kills") if make else None
    draw = random.Random(1)
    workers = [start(url, tmp_path) for _ in range(3)]
    kills = 8
    for _ in range(kills):
        time.sleep(draw.uniform(0.0, 0.5))
        victim = draw.randrange(3)
        wait_for((tmp_path / f"{workers[victim].pid}.at-work").exists)
        workers[victim].kill()
        workers[victim].join()
        workers[victim] = start(url, tmp_path)
    for worker in workers:  # and then all of them at once
        wait_for((tmp_path / f"{worker.pid}.at-work").exists)
    for worker in workers:
        worker.kill()
        worker.join()
    last = [start(url, tmp_path) for _ in range(3)]
    for worker in last:
        worker.join(180)
        assert worker.exitcode == 0
    trials = open_study(url, tmp_path).optuna.get_trials()
    print(f"{kills} + 3 kills: {Counter(trial.state.name for trial in trials)}")
    assert sum("earlier" in trial.user_attrs for trial in trials) >= 3
    assert_counted_once(trials)
