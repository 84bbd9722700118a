"""Tests of local store URIs: each spelling gives the file that SQLAlchemy opens, and MLflow gets only one spelling."""

import os
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import mlflow
import pytest
from sqlalchemy import make_url

from capexp.errors import InputError
from capexp.tracking import store

NAMES = ["plain", "with space", "fünf", "图片", "a+b", "[1]", "a#b", "a?b", "100%", "%zz", "me@home:1", "it's", "a..b"]
MISTAKEN = {"a%20b": "%20", "a%c3%bcb": "%c3", "x?y..z": "..", "a\udce9b": "UTF-8"}


@pytest.fixture(autouse=True)
def untouched(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """MLflow with its default store, as in a new process; afterwards as it was."""
    tracking = mlflow.get_tracking_uri() if mlflow.is_tracking_uri_set() else None
    environment = dict(os.environ)
    mlflow.set_tracking_uri(None)
    mlflow.set_registry_uri(None)
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"):
        os.environ.pop(name, None)
    yield
    mlflow.set_tracking_uri(tracking)
    mlflow.set_registry_uri(None)  # the tracking URI, again
    os.environ.clear()
    os.environ.update(environment)


@pytest.mark.parametrize("name", [*NAMES, "a%20b", "".join(NAMES)])
def test_a_path_is_read_back_from_its_uri_here_and_by_sqlalchemy(name: str) -> None:
    for path in (Path("/home/me", name, "mlflow.db"), Path(name, "mlflow.db"), Path("/home/me", name)):
        uri = store.database_uri(path)
        assert store.database_path(uri) == path
        assert make_url(uri).database == str(path)
        assert store.database_path(f"{uri}?timeout=5") == path


@pytest.mark.parametrize("name", NAMES)
def test_mlflow_makes_no_folder_of_another_name_for_it(name: str) -> None:
    path = Path("/home/me", name, "mlflow.db")
    taken = store.database_uri(path).removeprefix("sqlite:///")  # what MLflow makes the folder of
    assert taken == str(path) or taken.startswith("sqlite+pysqlite:")


@pytest.mark.parametrize("name", NAMES)
def test_a_percent_encoded_uri_is_told_to_mlflow_as_it_should_be_spelt(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path("/home/me", name, "mlflow.db")
    encoded = f"sqlite:///{quote(str(path))}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", encoded)  # as `mlflow run` sets it
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", f"{encoded}?timeout=5")
    assert store.database_path(encoded) == path
    assert store.store_uri() == store.database_uri(path)
    assert mlflow.get_tracking_uri() == os.environ["MLFLOW_TRACKING_URI"] == store.database_uri(path)
    assert mlflow.get_registry_uri() == f"{store.database_uri(path)}?timeout=5"


@pytest.mark.parametrize("name", NAMES)
def test_the_default_store_is_the_file_in_the_working_directory(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / name)
    assert store.database_path(store.store_uri()) == tmp_path / name / "mlflow.db"
    assert mlflow.get_tracking_uri() == store.database_uri(tmp_path / name / "mlflow.db")


@pytest.mark.parametrize("uri", ["http://me:secret@server:5000", "postgresql://me:a%20b@server/runs", "mlruns"])
def test_another_store_is_left_as_it_is(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert store.database_path(uri) is None
    assert store.store_uri() == mlflow.get_tracking_uri() == uri


@pytest.mark.parametrize("name", MISTAKEN)
def test_a_folder_that_mlflow_mistakes_is_refused_before_anything_is_written(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / name)
    for refuse in (store.check_store, store.prepare_store):
        with pytest.raises(InputError) as caught:
            refuse()
        line = str(caught.value)
        assert line.startswith(f"{tmp_path / name}: MLflow ") and MISTAKEN[name] in line
        assert line.endswith("rename the folder") and "\n" not in line
    assert [path.name for path in tmp_path.rglob("*")] == [name]


def test_with_a_server_the_folder_may_have_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server:5000")
    for name in MISTAKEN:
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        store._refuse_folder()


@pytest.mark.parametrize("value", ["soon", "-1", "nan", "inf", ""])
def test_a_patience_that_is_no_number_of_seconds_is_refused(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAPEXP_PATIENCE", value)
    with pytest.raises(InputError, match="CAPEXP_PATIENCE = "):
        store.check_store()


def test_the_end_of_a_run_waits_as_long_as_the_user_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CAPEXP_PATIENCE", raising=False)
    assert (store.patience(), store.short_patience()) == (60, 10)
    monkeypatch.setenv("CAPEXP_PATIENCE", "2.5")
    assert (store.patience(), store.short_patience()) == (2.5, 2.5)
