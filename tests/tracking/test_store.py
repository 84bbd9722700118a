"""Laws of MLflow's local database: whole before it is seen, made once, where a link points."""

from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
from mlflow.tracking import MlflowClient

from capexp.tracking import store

pytestmark = pytest.mark.slow


@pytest.fixture
def database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "mlflow.db"
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(store.database_uri(path))
    yield path
    mlflow.set_tracking_uri(before)


def test_what_a_kill_has_left_of_a_database_is_made_anew(database: Path) -> None:
    for name in (".mlflow.db.part", ".mlflow.db.part-journal"):
        (database.parent / name).write_bytes(b"half of it")
    store.prepare_store()
    assert MlflowClient().get_experiment("0").artifact_location == f"{database.parent}/mlruns/0"
    assert not list(database.parent.glob(".mlflow.db.part*"))


def test_a_database_that_another_has_made_meanwhile_stays(database: Path) -> None:
    run = MlflowClient(store.database_uri(database)).create_run("0")  # MLflow itself takes no lock
    store._make_local(database)
    assert MlflowClient(store.database_uri(database)).get_run(run.info.run_id).info.status == "RUNNING"
    assert not list(database.parent.glob(".mlflow.db.part*"))


def test_a_link_to_a_database_that_is_not_there_yet_stays_a_link(database: Path) -> None:
    (database.parent / "elsewhere").mkdir()
    database.symlink_to("elsewhere/mlflow.db")
    store.prepare_store()
    assert database.is_symlink()
    assert (database.parent / "elsewhere/mlflow.db").is_file()
