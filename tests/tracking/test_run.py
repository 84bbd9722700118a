"""Laws of a run's beginning and end: whenever an interrupt comes, it leaves no run behind that seems to go on."""

import signal
import sqlite3
from collections import UserDict
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow.tracking import MlflowClient

from capexp.tracking.known_runs import PARENT, nested_runs, runs_of
from capexp.tracking.outbox import JOURNAL
from capexp.tracking.run import TrackedRun, tracked_run

pytestmark = pytest.mark.slow


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of runs, with a store."""
    monkeypatch.chdir(tmp_path)
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    yield tmp_path
    while mlflow.active_run():
        mlflow.end_run()
    mlflow.set_tracking_uri(before)


class Interrupting(UserDict[str, str]):
    """Tags that send an interrupt when MLflow is about to get them."""

    def __getitem__(self, name: str) -> str:
        signal.raise_signal(signal.SIGINT)
        return super().__getitem__(name)


@pytest.mark.parametrize("when", ["while MLflow makes the run", "before its folder is locked"])
def test_an_interrupt_while_a_run_begins_ends_it_killed_and_not_the_one_above(folder: Path, when: str) -> None:
    def interrupt(run_id: str) -> Any:
        if when == "before its folder is locked":
            signal.raise_signal(signal.SIGINT)
        return nullcontext()

    tags: Mapping[str, str] = {"seed": "2"}
    if when == "while MLflow makes the run":
        tags = Interrupting(tags)
    client = MlflowClient()
    with tracked_run("above", "begun", folder, lock=lambda _: nullcontext()) as above:
        with (
            pytest.raises(KeyboardInterrupt),
            tracked_run("under it", "begun", folder, lock=interrupt, parent=above.run_id, tags=tags),
        ):
            pass
        assert client.get_run(above.run_id).info.status == "RUNNING"
    runs = client.search_runs([client.get_experiment_by_name("begun").experiment_id])
    (under,) = [run for run in runs if run.info.run_id != above.run_id]
    assert under.info.status == "KILLED"
    assert under.data.tags["stopped"] == "interrupt"
    assert client.get_run(above.run_id).info.status == "FINISHED"


def test_a_run_that_was_killed_before_its_first_entry_has_nothing_to_send_and_no_status(folder: Path) -> None:
    run = MlflowClient().create_run(MlflowClient().create_experiment("killed at once"))
    (folder / JOURNAL).touch()
    tracked = TrackedRun(run.info.run_id, folder, in_background=False)
    assert tracked.send_rest(lambda content: content) == (0, None, None)
    assert MlflowClient().get_run(run.info.run_id).info.status == "RUNNING"


def test_more_runs_are_found_than_mlflow_returns_at_once(folder: Path) -> None:
    client = MlflowClient()
    experiment = client.create_experiment("many")
    parent = client.create_run(experiment).info.run_id
    nested = client.create_run(experiment, tags={PARENT: parent}).info.run_id
    client.log_param(nested, "seed", "1")
    with sqlite3.connect(folder / "mlflow.db") as database:  # far faster than by the client
        for table in ("runs", "tags", "params"):
            rows = database.execute(f"select * from {table} where run_uuid = ?", [nested])
            names = [column[0] for column in rows.description]
            copies = [
                [f"{i:032}" if name == "run_uuid" else value for name, value in zip(names, row, strict=True)]
                for row in rows.fetchall()
                for i in range(1000)
            ]
            marks = ", ".join("?" for _ in names)
            database.executemany(f"insert into {table} ({', '.join(names)}) values ({marks})", copies)
    assert len({run.info.run_id for run in nested_runs(parent)}) == 1001
    assert len({run.run_id for run in runs_of({"seed": "1"}, {PARENT: parent})}) == 1001
