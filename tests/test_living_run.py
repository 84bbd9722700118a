"""A run that a living process trains: whatever a second process does to it, it goes on untouched."""

import json
import signal
import sqlite3
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from cases import cases
from mlflow.tracking import MlflowClient
from user_folder import Folder, Process, wait_for

SETTINGS = {"model.embedding_size": 16, "model.lstm_units": 16, "training.patience": 500, "training.epochs": 500}
SMALL = [word for name, value in SETTINGS.items() for word in (f"--{name}", str(value))]
MEMBERS = json.dumps([{"experiment": "scenes", "seeds": [1, 2], "settings": SETTINGS}])
KINDS = {
    "single": SMALL,
    "seeds": ("--seeds", "2", *SMALL),
    "ensemble": ("--experiment", "scenes-ensemble", "--ensemble.members", MEMBERS),
}
SLOW = pytest.mark.slow


def entries(folder: Folder, run_id: str) -> list[dict[str, Any]]:
    """The entries of a run's journal; each line of it must be whole."""
    lines = (folder.path / "checkpoints" / run_id / "journal.jsonl").read_text().splitlines()
    return [entry for entry in map(json.loads, lines) if "kind" in entry]


Start = Callable[..., Process]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a process in a folder, with variables of its environment given by name; kills it when the test is over."""
    processes: list[Process] = []

    def begin(folder: Folder, *words: str, **variables: str) -> Process:
        process = folder.start(*words, **variables)
        processes.append(process)
        return process

    yield begin
    for process in processes:
        process.kill()
        process.communicate()


@SLOW
@pytest.mark.parametrize(
    ("kind", "started_by"),
    cases(
        *(("single", "a user"), ("seeds", "mlflow run")),
        of=[(kind, by) for kind in KINDS for by in ("a user", "mlflow run")],
    ),
)
def test_a_second_process_leaves_a_run_that_is_being_trained_untouched(
    tmp_path: Path, start: Start, kind: str, started_by: str
) -> None:
    folder, elsewhere = Folder(tmp_path / "folder"), Folder(tmp_path / "elsewhere")
    for one in (folder, elsewhere):
        one.path.mkdir()
        one.environment |= {"MLFLOW_TRACKING_URI": folder.store, "OMP_NUM_THREADS": "1"}
    adopted: dict[str, str] = {}
    if started_by == "mlflow run":
        adopted["MLFLOW_RUN_ID"] = folder.client.create_run(folder.client.create_experiment("made")).info.run_id
    command = (sys.executable, "-m", "capexp.train")
    living = start(folder, *command, *KINDS[kind], **adopted)
    wait_for(lambda: list(folder.path.glob("checkpoints/**/ep0*")))
    run_id = folder.runs()[0].info.run_id
    assert adopted in ({}, {"MLFLOW_RUN_ID": run_id})

    known = {"MLFLOW_RUN_ID": run_id}
    second = {
        "resumed": start(folder, *command, "--resume", run_id),
        "adopted": start(folder, *command, *KINDS[kind], **known),
    }
    if adopted:
        study = (sys.executable, "-m", "capexp.tune", "--trials", "1")
        second |= {
            "adopted in another folder": start(elsewhere, *command, *KINDS[kind], **known),
            "adopted by a study": start(folder, *study, **known),
        }
    for way, process in second.items():
        _, err = process.communicate(timeout=300)
        assert process.returncode == 2, f"{way}: {err}"
        assert err.count("\n") == 1 and run_id in err, f"{way}: {err}"
    assert living.poll() is None, "it goes on"
    run = folder.client.get_run(run_id)
    assert run.info.status == "RUNNING"
    assert not {"error", "stopped"} & run.data.tags.keys()

    living.send_signal(signal.SIGINT)
    _, err = living.communicate(timeout=300)
    assert living.returncode == 130, err
    assert {run.info.status for run in folder.runs()} == {"KILLED"}
    run = folder.client.get_run(run_id)
    assert "error" not in run.data.tags and run.data.tags["stopped"] == "interrupt"
    logged = entries(folder, run_id)
    assert [entry["number"] for entry in logged] == list(range(1, len(logged) + 1)), "written by one process"
    assert [entry["content"]["status"] for entry in logged if entry["kind"] == "ended"] == ["KILLED"]


@SLOW
@pytest.mark.parametrize("kind", KINDS)
def test_a_fault_of_the_store_is_one_line_whatever_the_run(tmp_path: Path, kind: str) -> None:
    folder = Folder(tmp_path, has_store=True)
    MlflowClient(folder.store).search_experiments()
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as store:
        store.execute("CREATE TRIGGER full BEFORE INSERT ON params BEGIN SELECT RAISE(ABORT, 'no params here'); END")
    printed = folder.run("train", *KINDS[kind], status=2)
    assert "no params here" in printed.stderr and printed.stderr.count("\n") == 1
    (run,) = folder.runs()
    assert run.info.status == "FAILED"
