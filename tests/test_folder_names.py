"""Folders whose names hold what URIs, shells and Makefiles give a meaning: the commands work there, or say why not."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote

import pytest
from user_folder import ROOT, Folder

SMALL = (
    *("--model.embedding_size", "16", "--model.lstm_units", "16", "--model.output_dropout", "0"),
    *("--training.learning_rate", "0.01", "--training.batch_size", "128", "--training.epochs", "1"),
)
CHECKOUT = "a ü 图 +[1]#?;&'$HOME"  # MLflow cannot be installed where a % is,
DIFFICULT = f"{CHECKOUT} 100%"  # but can work there
CHAMPION = "models:/capexp-scenes@champion"


def assert_all_is_in_it(folder: Folder, experiment: str = "scenes") -> None:
    """Run, artifacts and champion are in a folder, and can be read there by commands."""
    (run,) = folder.runs()
    assert run.info.status == "FINISHED"
    assert len(list(folder.path.glob(f"mlruns/*/{run.info.run_id}/artifacts/captions.html"))) == 1
    folder.run("evaluate", "--model", CHAMPION, "--experiment", experiment, "--output", "scores.json")
    scores = json.loads((folder.path / "scores.json").read_text())
    assert scores["cross_entropy"] == pytest.approx(run.data.metrics["best_dev_loss"], rel=1e-6)


@pytest.mark.slow
def test_a_folder_with_a_difficult_name_holds_all_that_a_run_leaves(tmp_path: Path) -> None:
    folder = Folder(tmp_path / DIFFICULT)
    folder.path.mkdir()
    folder.run("train", *SMALL)
    assert (folder.path / "mlflow.db").is_file()
    assert_all_is_in_it(folder)
    assert [path.name for path in tmp_path.iterdir()] == [DIFFICULT], "nothing beside it"


@pytest.mark.slow
@pytest.mark.parametrize("spelling", ["plain", "encoded"])
def test_store_experiment_data_features_and_bundle_may_all_have_such_names(
    tmp_path: Path, scenes: Path, spelling: str
) -> None:
    folder, elsewhere = Folder(tmp_path / DIFFICULT), tmp_path / f"{CHECKOUT.replace('?', '')} elsewhere"
    for path in (folder.path, elsewhere):
        path.mkdir()
    database = str(elsewhere / "x y.db")
    folder.environment["MLFLOW_TRACKING_URI"] = f"sqlite:///{database if spelling == 'plain' else quote(database)}"
    shutil.copytree(scenes, elsewhere / "pictures #1", ignore=shutil.ignore_patterns("features"))
    shutil.copytree(scenes / "features", elsewhere / "features +?")
    experiment = elsewhere / "50% [own].toml"
    text = (ROOT / "experiments/scenes.toml").read_text()
    text = text.replace('root = "scenes"', f'root = "{elsewhere / "pictures #1"}"')
    experiment.write_text(text.replace('cache = "scenes/features"', f'cache = "{elsewhere / "features +?"}"'))
    folder.run("train", "--experiment", str(experiment), *SMALL)
    assert Path(database).is_file()
    assert not (folder.path / "mlflow.db").exists()
    assert_all_is_in_it(folder, str(experiment))
    (bundle,) = folder.path.glob("checkpoints/*/ep001-*")
    folder.run("sync", bundle.parent.name)
    folder.run("evaluate", "--experiment", str(experiment), "--model", str(bundle))
    if spelling == "encoded":  # which the worker processes are not to see
        folder.run("tune", "--experiment", str(experiment), *SMALL, "--trials", "2", "--workers", "2")
    assert {path.name for path in tmp_path.iterdir()} == {folder.path.name, elsewhere.name}


@pytest.mark.slow
@pytest.mark.parametrize("words", [("train",), ("tune", "--trials", "1")])
def test_a_folder_that_mlflow_mistakes_is_refused_in_one_line(tmp_path: Path, words: tuple[str, ...]) -> None:
    folder = Folder(tmp_path / "a%20b")
    folder.path.mkdir()
    printed = folder.run(*words, *SMALL, status=2)
    assert printed.stderr.startswith(f"capexp.{words[0]}: {folder.path}: MLflow decodes %20 in the path")
    assert printed.stderr.endswith("rename the folder\n") and printed.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.rglob("*")] == ["a%20b"], "nothing was written"


def checkout_in(path: Path) -> Folder:
    """A copy of the checkout with this Python's environment linked as its ``.venv``."""
    ignored = shutil.ignore_patterns(".git", ".venv", "mlruns", "checkpoints", "studies", "*.db", ".*cache*", "*.pyc")
    shutil.copytree(ROOT, path, ignore=ignored)
    (path / ".venv").mkdir()
    for one in Path(sys.prefix).iterdir():
        (path / ".venv" / one.name).symlink_to(one)
    for target in ("installed", "installed-test"):
        (path / ".venv" / target).unlink(missing_ok=True)
        (path / ".venv" / target).touch()  # newer than what make compares it with
    return folder_of_make(path)


def folder_of_make(path: Path) -> Folder:
    """A folder in which the variables of the tests around, and of the make that runs them, are not set."""
    folder = Folder(path)
    outside = ("PYTHONPATH", "PYTEST_", "MAKE", "MFLAGS")
    folder.environment = {key: value for key, value in folder.environment.items() if not key.startswith(outside)}
    return folder


def make(folder: Folder, *words: str) -> subprocess.CompletedProcess[str]:
    process = folder.start("make", *words)
    out, err = process.communicate(timeout=1200)
    return subprocess.CompletedProcess(words, process.returncode, out, err)


@pytest.mark.slow
def test_make_demo_and_make_test_work_in_a_checkout_with_a_difficult_name(tmp_path: Path) -> None:
    folder = checkout_in(tmp_path / CHECKOUT / "capexp")
    experiment = folder.path / "experiments/scenes.toml"
    experiment.write_text(experiment.read_text().replace("epochs = 15", "epochs = 1"))
    demo = make(folder, "demo")
    assert demo.returncode == 0, f"{demo.stdout}\n{demo.stderr}"
    assert_all_is_in_it(folder)
    folder.environment["PYTEST_ADDOPTS"] = "tests/tracking/test_store_uri.py"
    tests = make(folder, "test", "AT_ONCE=0")
    assert tests.returncode == 0, f"{tests.stdout}\n{tests.stderr}"
    assert " passed" in tests.stdout
    assert [path.name for path in tmp_path.iterdir()] == [CHECKOUT], "nothing beside it"


def test_make_refuses_a_checkout_in_which_mlflow_cannot_be_installed(tmp_path: Path) -> None:
    folder = folder_of_make(tmp_path / "100%")
    folder.path.mkdir()
    shutil.copy(ROOT / "Makefile", folder.path)
    (folder.path / "conda.yaml").touch()
    for words in ("demo", "test", "check"):
        refused = make(folder, words)
        assert refused.returncode == 2
        line, *rest = refused.stderr.splitlines()
        assert line == f"{folder.path}: MLflow cannot work where a folder's name holds %; rename the folder"
        assert all(one.startswith("make") for one in rest)  # its own line, that a target has failed
    assert not (folder.path / ".venv").exists()


@pytest.mark.slow
def test_mlflow_that_is_installed_where_it_cannot_work_is_told_of_in_one_line(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "work")
    folder.path.mkdir()
    link = tmp_path / "100%"
    link.symlink_to(Path(sys.prefix))
    python = str(link / Path(sys.executable).relative_to(sys.prefix))
    process = folder.start(python, "-m", "capexp.train", *SMALL)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 2, err
    assert f"{link}{os.sep}" in err and "a folder whose name holds %" in err and err.count("\n") == 1
    assert not list(folder.path.iterdir())
