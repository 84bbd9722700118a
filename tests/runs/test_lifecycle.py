"""Laws of the one lifecycle, tried on each kind of run: interrupts, kills, failures, refusals, second processes."""

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import mlflow
import pytest
from cases import cases
from kinds import KINDS, PARENT, Kind
from mlflow.entities import Run
from user_folder import ROOT, Folder, Process, wait_for

from capexp.captioning.bundle import verify_bundle
from capexp.errors import InputError
from capexp.train import train
from capexp.training.checkpoints import Checkpoints

SLOW = pytest.mark.slow
Once = Callable[[str, Callable[[Path], None]], Path]
Undisturbed = Callable[[str], tuple[Folder, dict[str, Any]]]


def make(path: Path, has_store: bool = True, forks: bool = True) -> Folder:
    path.mkdir(exist_ok=True)
    folder = Folder(path, has_store, forks)
    folder.environment["OMP_NUM_THREADS"] = "1"  # the same sums in the same order
    return folder


def start(folder: Folder, command: tuple[str, ...]) -> Process:
    return folder.start(sys.executable, "-m", f"capexp.{command[0]}", *command[1:])


@pytest.fixture(scope="session")
def undisturbed(once: Once) -> Undisturbed:
    """Return a function that runs a kind of run once without disturbance, and returns its folder and result."""
    ends: dict[str, dict[str, Any]] = {}

    def undisturbed(name: str) -> tuple[Folder, dict[str, Any]]:
        def run(path: Path) -> None:
            # One of them with other hashes of strings than the forks have.
            make(path, forks=name != "single").run(*KINDS[name].begin())

        path = once(name, run)
        folder = make(path, has_store=False)  # it has one by now
        if name not in ends:
            ends[name] = KINDS[name].end(folder)
        return folder, ends[name]

    return undisturbed


def tree(folder: Folder) -> tuple[Run, list[Run]]:
    """Return the run that was started, and the runs under it."""
    (top,) = [run for run in folder.runs() if PARENT not in run.data.tags]
    under = [run for run in folder.runs() if PARENT in run.data.tags]
    assert all(run.data.tags[PARENT] == top.info.run_id for run in under)
    return top, under


def assert_nothing_is_half_written(folder: Folder) -> None:
    assert not list(folder.path.glob("**/*.part"))
    for journal in folder.path.glob("**/journal.jsonl"):
        assert [json.loads(line) for line in journal.read_text().splitlines()], journal
    for bundle in folder.path.glob("**/ep[0-9]*"):
        verify_bundle(bundle)
    for state in folder.path.glob("**/last.pt"):
        assert Checkpoints(state.parent, keep=1).latest() is not None


def assert_ended(folder: Folder, kind: Kind, status: str, tag: str) -> tuple[Run, list[Run]]:
    """Assert that the outer run and its last nested run have this status and tag, and the others are FINISHED."""
    top, under = tree(folder)
    *before, last = under or [top]
    assert [run.info.status for run in before] == ["FINISHED"] * (kind.count - 1)
    for run in (top, last):
        assert run.info.status == status, run.info.run_name
        assert tag in run.data.tags, run.info.run_name
    for run in before:
        assert not {"stopped", "error"} & run.data.tags.keys()
    assert not folder.client.search_registered_models()
    assert_nothing_is_half_written(folder)
    return top, under


@SLOW
@pytest.mark.parametrize("how", cases(signal.SIGINT, of=(signal.SIGINT, signal.SIGTERM)))
def test_an_interrupt_ends_the_run_killed_with_the_best_model_kept(tmp_path: Path, how: signal.Signals) -> None:
    folder, kind = make(tmp_path), KINDS["single"]
    process = start(folder, kind.begin(training__epochs=500, training__patience=500))
    wait_for(lambda: list(tmp_path.glob("checkpoints/*/ep002-*")))
    (running,) = folder.runs()
    assert running.info.status == "RUNNING"
    assert folder.client.get_metric_history(running.info.run_id, "dev_loss"), "losses appear while it runs"
    process.send_signal(how)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 130, err
    assert err.splitlines()[-1] == "capexp.train: interrupted"
    run, _ = assert_ended(folder, kind, "KILLED", "stopped")
    assert run.data.tags["stopped"] == "interrupt"
    assert (folder.artifact(run, "captioner") / "artifacts/bundle/manifest.json").is_file()


@SLOW
@pytest.mark.parametrize("name", cases("single", "ensemble", "study"))
def test_interrupted_it_ends_killed_and_goes_on_to_the_undisturbed_end(
    tmp_path: Path, undisturbed: Undisturbed, name: str
) -> None:
    folder, kind = make(tmp_path), KINDS[name]
    for how in (signal.SIGTERM, signal.SIGINT):
        command, begun = kind.go_on(folder), time.time()
        process = start(folder, command)
        wait_for(partial(kind.has_state_since, folder, begun))
        os.kill(process.pid, how)
        out, err = process.communicate(timeout=300)
        assert process.returncode == 130, err
        assert err.splitlines()[-1] == f"capexp.{command[0]}: interrupted"
        assert "Traceback" not in out + err
        top, under = assert_ended(folder, kind, "KILLED", "stopped")
        assert {run.data.tags["stopped"] for run in [top, *under[-1:]]} == {"interrupt"}
    folder.run(*kind.go_on(folder))
    assert kind.end(folder) == undisturbed(name)[1]
    top, under = tree(folder)
    assert not any({"stopped", "error"} & run.data.tags.keys() for run in (top, *under))


def moments(folder: Folder, kind: Kind) -> dict[str, Callable[[float], object]]:
    """Return the conditions, by name, on which a run is killed; each is called with the start time of the process."""

    def count_finished() -> int:
        return sum(run.info.status == "FINISHED" for run in folder.runs())

    def is_begun() -> object:
        """Return whether a run that trains can be resumed; one under another can be as soon as it exists."""
        if kind.count == 1:
            return kind.trained(folder, "experiment.toml")
        return any(PARENT in run.data.tags for run in folder.runs())

    is_new = {
        "within the first epoch": lambda begun: is_begun(),
        "while a resumed run reads its state": lambda begun: time.time() > begun + 0.5,
        "while the first epoch's state is written": lambda begun: (
            len({path.parent for path in kind.trained(folder, "ep001-*")}) == kind.count
        ),
        "while the last one under it is reported": lambda begun: len(kind.trained(folder, "loss.png")) == kind.count,
        "while its model is registered": lambda begun: count_finished() == kind.count,
    }
    if kind.count == 1:
        del is_new["while its model is registered"]  # it is the last one itself
    if not kind.is_resumed:  # the first trial would get another number
        del is_new["within the first epoch"], is_new["while a resumed run reads its state"]
    return is_new


@SLOW
@pytest.mark.parametrize("name", cases("single", "seeds", "study"))
def test_killed_again_and_again_it_comes_to_the_undisturbed_end(
    tmp_path: Path, undisturbed: Undisturbed, name: str
) -> None:
    folder, kind = make(tmp_path), KINDS[name]
    for moment, is_reached in moments(folder, kind).items():
        begun = time.time()
        process = start(folder, kind.go_on(folder))
        wait_for(partial(is_reached, begun))
        process.kill()
        _, err = process.communicate()
        assert process.returncode == -signal.SIGKILL, f"it was over before it was killed {moment}: {err}"
        assert tree(folder)[0].info.status == "RUNNING", moment
    folder.run(*kind.go_on(folder))
    end = kind.end(folder)
    assert end == undisturbed(name)[1]
    assert len(end["registered"]) == 1
    top, under = tree(folder)
    assert {run.info.status for run in (top, *under)} == {"FINISHED"}
    again = folder.run(*kind.go_on(folder), status=2 if name == "single" else 0)
    assert "has finished" in again.stderr or name != "single"
    assert kind.end(folder) == end, "one that is finished comes to the same again"


@SLOW
@pytest.mark.parametrize("name", KINDS)
def test_a_loss_that_diverges_fails_run_and_child_in_one_line(tmp_path: Path, name: str) -> None:
    folder, kind = make(tmp_path), KINDS[name]
    command = kind.begin(training__learning_rate=1e30)
    if name == "study":
        command = (*command[:-1], "9")
    printed = folder.run(*command, status=2)
    line = printed.stderr.splitlines()[-1]
    assert "lower training.learning_rate" in line
    assert sum("capexp." in line for line in printed.stderr.splitlines()) == 1
    assert "Traceback" not in printed.stdout + printed.stderr
    for run in folder.runs():
        assert run.info.status == "FAILED"
        assert "training.learning_rate" in run.data.tags["error"]
        assert "InputError" in folder.artifact(run, "log.txt").read_text()
    assert len(folder.runs()) == {"single": 1, "study": 4}.get(name, 2)
    assert not folder.client.search_registered_models()


@SLOW
@pytest.mark.parametrize("name", cases("study"))
def test_a_folder_that_takes_no_state_fails_run_and_child_in_one_line_and_mended_they_go_on(
    tmp_path: Path, undisturbed: Undisturbed, name: str
) -> None:
    folder, kind = make(tmp_path), KINDS[name]
    process = start(folder, kind.begin())
    wait_for(lambda: len(kind.trained(folder, "last.pt")) == kind.count)
    obstacle = list(kind.trained(folder, "last.pt"))[-1].with_name("previous.pt")
    obstacle.unlink(missing_ok=True)
    (obstacle / "in the way").mkdir(parents=True)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 2, err
    assert "last.pt: cannot be written (Is a directory); free space or fix it" in err.splitlines()[-1]
    assert "Traceback" not in out + err
    top, under = assert_ended(folder, kind, "FAILED", "error")
    for run in (top, *under[-1:]):
        assert "last.pt: cannot be written" in run.data.tags["error"]
    shutil.rmtree(obstacle)
    folder.run(*kind.go_on(folder))
    assert kind.end(folder) == undisturbed(name)[1]
    top, under = tree(folder)
    assert not any("error" in run.data.tags for run in (top, *under))


@SLOW
@pytest.mark.parametrize("name", KINDS)
def test_each_run_holds_settings_data_sets_and_log(undisturbed: Undisturbed, name: str) -> None:
    folder, end = undisturbed(name)
    kind = KINDS[name]
    top, under = tree(folder)
    assert len(under or [top]) == kind.count
    for run in (top, *under):
        assert run.info.status == "FINISHED"
        names = {item.path for item in folder.client.list_artifacts(run.info.run_id)}
        assert {"experiment.toml", "log.txt"} <= names, run.info.run_name
        settings = folder.artifact(run, "experiment.toml").read_text()
        assert f'name = "{run.data.params["name"]}"' in settings
        assert run.data.params["vocabulary.cleaning"] == "standard"
        assert {(item.dataset.name, item.tags[0].value) for item in run.inputs.dataset_inputs} == {
            (f"{run.data.params['name']}-train", "training"),
            (f"{run.data.params['name']}-dev", "validation"),
        }
        assert {"vocabulary_digest", "data_digest", "encoder_key", "device", "git_commit"} <= run.data.tags.keys()
        assert "capexp" in folder.artifact(run, "log.txt").read_text()
    ((loss, _, weights),) = end["registered"]
    assert end["is champion"] == [True]
    assert weights
    told = [top] if "best_dev_loss" in top.data.metrics else under  # of seeds it is the best one's
    assert float(loss) == min(run.data.metrics["best_dev_loss"] for run in told)


@SLOW
@pytest.mark.parametrize("name", KINDS)
def test_what_is_not_resumed_so_is_refused_with_what_to_do(
    undisturbed: Undisturbed, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, end = undisturbed(name)
    top, under = tree(folder)
    monkeypatch.chdir(folder.path)
    monkeypatch.setenv("CAPEXP_OFFLINE", "1")
    mlflow.set_tracking_uri(folder.store)
    for run in under:
        with pytest.raises(InputError) as refused:
            train(["--resume", run.info.run_id])
        assert f"it is one of several under run {top.info.run_id}; resume that run instead" in str(refused.value)
    if not KINDS[name].is_resumed:
        with pytest.raises(InputError) as refused:
            train(["--resume", top.info.run_id])
        assert "it is the run of study scenes; give the capexp.tune command again" in str(refused.value)
    else:
        with pytest.raises(InputError) as refused:
            train(["--resume", top.info.run_id, "--seed", "7"])
        assert "--seed 7: the run was started with 1; a resumed run may only change" in str(refused.value)
    assert KINDS[name].end(folder) == end


@SLOW
def test_a_second_tune_joins_and_the_first_goes_on_when_it_is_stopped(tmp_path: Path) -> None:
    folder, kind = make(tmp_path), KINDS["study"]
    command = (*kind.begin(training__epochs=12, training__patience=500)[:-1], "3")  # trials that last
    first = start(folder, command)
    wait_for(lambda: kind.trained(folder, "last.pt"))
    second = start(folder, command)
    wait_for(lambda: len(kind.trained(folder, "last.pt")) == 2 or second.poll() is not None)
    second.send_signal(signal.SIGINT)
    out, err = second.communicate(timeout=300)
    assert second.returncode == 130, f"{out}\n{err}"
    assert err.splitlines()[-1] == "capexp.tune: interrupted"
    assert first.poll() is None, "it was over before the second one was"
    top, under = tree(folder)
    assert [run.info.status for run in (top, *under)] == ["RUNNING", "RUNNING", "KILLED"]
    out, err = first.communicate(timeout=300)
    assert first.returncode == 0, err
    assert "trial 1 was broken off; it is run again" in err
    top, under = tree(folder)
    assert [run.info.status for run in (top, *under)] == ["FINISHED"] * 4
    assert not any({"stopped", "error"} & run.data.tags.keys() for run in (top, *under))
    assert len(kind.end(folder)["registered"]) == 1


@SLOW
def test_an_ensemble_begun_twice_at_once_is_refused_the_member_that_the_first_trains(tmp_path: Path) -> None:
    folder, kind = make(tmp_path), KINDS["ensemble"]
    command = kind.begin(training__epochs=16, training__patience=500)
    first = start(folder, command)
    wait_for(lambda: kind.trained(folder, "last.pt"))
    refused = folder.run(*command, status=2)
    assert "another process is training it; wait for it or stop it" in refused.stderr.splitlines()[-1]
    assert first.poll() is None, "it was over before the second one was"
    out, err = first.communicate(timeout=300)
    assert first.returncode == 0, f"{out}\n{err}"
    runs = folder.runs()
    assert sorted(run.info.status for run in runs) == ["FAILED", "FINISHED", "FINISHED", "FINISHED"]
    (failed,) = [run for run in runs if run.info.status == "FAILED"]
    assert "another process is training it" in failed.data.tags["error"]
    assert len(kind.end(folder)["registered"]) == 1


@SLOW
@pytest.mark.parametrize("name", cases("single", of=("single", "study")))
def test_ctrl_c_under_mlflow_run_tags_the_run_and_the_one_under_it(tmp_path: Path, name: str) -> None:
    folder, kind = make(tmp_path), KINDS[name]
    folder.environment["MLFLOW_TRACKING_URI"] = f"sqlite:///{tmp_path}/mlflow.db"
    project = tmp_path / "project"  # checkpoints go where the project is: a copy, to look into it
    shutil.copytree(ROOT, project, ignore=shutil.ignore_patterns(".git", ".venv", "mlruns", "checkpoints", "*.db"))
    command, *words = kind.begin(training__epochs=500, training__patience=500)
    given = ["-e", command] if command != "train" else []
    for flag, value in zip(words[::2], words[1::2], strict=True):
        given += ["-P", f"{flag.removeprefix('--')}={value}"]
    process = folder.start("mlflow", "run", str(project), "--env-manager", "local", *given)
    wait_for(lambda: list(project.glob(f"{kind.leaves}/ep002-*")))
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all processes of the command
    process.communicate(timeout=300)
    wait_for(lambda: all("stopped" in run.data.tags for run in folder.runs()))
    top, under = tree(folder)
    assert len(under) == (kind.count > 1)
    for run in (top, *under):
        assert run.data.tags["stopped"] == "interrupt"
    assert top.info.status in ("FAILED", "KILLED")  # MLflow itself fails its run
    assert {run.info.status for run in under} <= {"KILLED"}
    if name == "single":
        assert (folder.artifact(top, "captioner") / "artifacts/bundle/manifest.json").is_file()
