"""A project's folder that was moved or copied: nothing is written to its old path, and each command says what to do."""

import shutil
from pathlib import Path

import pytest
from user_folder import Folder

pytestmark = pytest.mark.slow

SMALL = ("--training.epochs", "1", "--model.lstm_units", "16", "--model.embedding_size", "16")
MODEL = ("--model", "models:/capexp-scenes@champion")


def test_a_moved_folder_is_told_with_both_paths_and_works_with_the_link_that_is_named(tmp_path: Path) -> None:
    old, new = tmp_path / "old place", tmp_path / "new"
    old.mkdir()
    Folder(old).run("train", *SMALL)
    old.rename(new)
    folder = Folder(new)
    (run,) = folder.runs()
    before = run.to_dictionary()
    for command in (
        ("train", *SMALL),
        ("train", "--resume", run.info.run_id, "--training.epochs", "2"),
        ("tune", *SMALL, "--trials", "1"),
        ("evaluate", *MODEL),
        ("evaluate", "--model", f"runs:/{run.info.run_id}/captioner"),
    ):
        printed = folder.run(*command, status=2)
        assert printed.stderr.count("\n") == 1, printed.stderr
        assert f"{old}/mlruns/" in printed.stderr and f"ln -s {new} '{old}'" in printed.stderr
        assert not old.exists()
    assert [one.to_dictionary() for one in folder.runs()] == [before]
    old.symlink_to(new)
    folder.run("evaluate", *MODEL)
    assert "registered  capexp-scenes version 2" in folder.run("train", *SMALL).stdout
    assert {path.name for path in tmp_path.iterdir()} == {"old place", "new"}


def test_a_copy_is_warned_that_it_would_write_into_the_original(tmp_path: Path) -> None:
    original, copy = tmp_path / "original", tmp_path / "copy"
    original.mkdir()
    Folder(original).run("train", *SMALL)
    shutil.copytree(original, copy)
    told = Folder(copy).run("train", *SMALL).stderr
    assert f"has its artifacts in {original}/mlruns/1, which belongs to {original}/mlflow.db" in told
    for name in ("mlflow.db", "mlruns"):
        path = copy / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert "belongs to" not in Folder(copy).run("train", *SMALL).stderr
    assert (copy / "mlruns").is_dir()
