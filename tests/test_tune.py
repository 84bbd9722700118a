"""Studies as a user runs them: real processes, several workers, kills, a real PostgreSQL and a real MLflow server."""

import json
import os
import signal
import sys
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import unquote

import optuna
import psutil
import pytest
from mlflow.entities import Run
from tracking_server import Server
from user_folder import Folder, Process, wait_for

SPACE = {"model.lstm_units": {"low": 8, "high": 48}, "model.dropout": {"low": 0.1, "high": 0.5}}
SETTINGS = (
    *("--model.output_dropout", "0", "--model.embedding_size", "32", "--training.learning_rate", "0.01"),
    *("--training.batch_size", "128", "--tune.pruner", "none", "--tune.search", json.dumps(SPACE)),
)


def start(folder: Folder, *arguments: str) -> Process:
    return folder.start(sys.executable, "-m", "capexp.tune", *SETTINGS, *arguments)


def end(process: Process, status: int = 0) -> str:
    out, err = process.communicate(timeout=600)
    print(out, err)
    assert process.returncode == status, f"{out}\n{err}"
    return out + err


def workers(process: Process) -> list[psutil.Process]:
    """The forks of the server of multiprocessing that a study starts."""
    servers = [c for c in psutil.Process(process.pid).children() if "forkserver" in " ".join(c.cmdline())]
    forks = [fork for server in servers for fork in server.children()]
    return [fork for fork in forks if fork.status() != psutil.STATUS_ZOMBIE]


def kill_all(process: Process) -> None:
    """kill -9 of the command and all its workers, at once."""
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def nested(folder: Folder, parent: Run) -> list[Run]:
    return [run for run in folder.runs() if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]


def parent_of(folder: Folder) -> Run:
    (parent,) = [run for run in folder.runs() if "study" in run.data.tags]
    return parent


def journal(folder: Folder) -> optuna.Study:
    backend = optuna.storages.journal.JournalFileBackend(str(folder.path / "studies/scenes.journal"))
    return optuna.load_study(study_name="scenes", storage=optuna.storages.JournalStorage(backend))


def counted(study: optuna.Study) -> int:
    return sum(trial.state.name == "COMPLETE" for trial in study.get_trials())


def at_work(folder: Folder) -> list[int]:
    """The trials that have an epoch behind them and others before them."""
    if not (folder.path / "studies/scenes.journal").exists():
        return []
    try:
        trials = journal(folder).get_trials()
    except KeyError:  # the study is not in it yet
        return []
    return [trial.number for trial in trials if trial.state.name == "RUNNING" and trial.intermediate_values]


def assert_counted_once(study: optuna.Study, runs: list[Run], wanted: int) -> None:
    """As many trials as wanted are done, each in a run of its own; none was drawn twice, none is left running."""
    states = Counter(trial.state.name for trial in study.get_trials())
    assert states["COMPLETE"] == wanted
    assert not {"RUNNING", "WAITING"} & states.keys()
    done = [trial for trial in study.get_trials() if trial.state.name == "COMPLETE"]
    assert len({tuple(trial.params.items()) for trial in done}) == wanted
    by_id = {run.info.run_id: run for run in runs}
    assert len({trial.user_attrs["run_id"] for trial in done}) == wanted
    for trial in done:
        run = by_id[trial.user_attrs["run_id"]]
        assert run.info.status == "FINISHED"
        assert run.data.tags["trial"] == str(trial.number)
        assert run.data.params["model.lstm_units"] == str(trial.params["model.lstm_units"])
        assert run.data.metrics["best_dev_loss"] == trial.value
    print({trial.number: (trial.state.name, trial.user_attrs.get("earlier")) for trial in study.get_trials()})
    print([(run.info.run_name, run.info.status, run.data.tags.get("error")) for run in runs])


@pytest.mark.slow
def test_a_study_survives_kill_9_of_a_worker_and_then_of_everything(tmp_path: Path) -> None:
    folder = Folder(tmp_path, has_store=True)
    command = ("--trials", "6", "--workers", "2", "--training.epochs", "3")
    process = start(folder, *command)
    wait_for(lambda: len(at_work(folder)) == 2)
    victim = workers(process)[0]
    victim.kill()
    wait_for(lambda: len(workers(process)) == 2 and not victim.is_running())
    wait_for(lambda: counted(journal(folder)) >= 1 and len(at_work(folder)) == 2)
    kill_all(process)
    done = counted(journal(folder))
    assert 1 <= done < 6
    out = end(start(folder, *command))
    assert f"{done} of 6 trials done" in out
    assert "was broken off; it is run again" in out
    study = journal(folder)
    parent = parent_of(folder)
    assert parent.info.status == "FINISHED"
    runs = nested(folder, parent)
    assert_counted_once(study, runs, 6)
    assert {run.info.status for run in runs} == {"FINISHED"}, "each broken-off run was gone on with"
    again = [trial for trial in study.get_trials() if "earlier" in trial.user_attrs]
    assert len(again) >= 2
    best = min((t for t in study.get_trials() if t.state.name == "COMPLETE"), key=lambda t: float(t.value or 0))
    assert parent.data.tags["best_run"] == best.user_attrs["run_id"]
    assert parent.data.tags["best.model.lstm_units"] == str(best.params["model.lstm_units"])
    assert {"study.html", "history.png", "importances.png", "parallel.png", "slice.png"} <= {
        item.path for item in folder.client.list_artifacts(parent.info.run_id)
    }
    (version,) = folder.client.search_model_versions("name='capexp-scenes'")
    assert version.run_id == parent.info.run_id
    assert [path.name for path in (tmp_path / "studies/scenes").iterdir()] == [best.user_attrs["run_id"]]


@pytest.mark.slow
def test_ctrl_c_ends_the_trials_killed_and_the_same_command_goes_on(tmp_path: Path) -> None:
    folder = Folder(tmp_path, has_store=True)
    command = ("--trials", "3", "--workers", "2", "--training.epochs", "4", "--write-best")
    process = start(folder, *command)
    wait_for(lambda: len(at_work(folder)) == 2)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all processes of the command
    said = end(process, status=130)
    assert said.splitlines()[-1] == "capexp.tune: interrupted"
    assert "Traceback" not in said
    parent = parent_of(folder)
    assert parent.info.status == "KILLED"
    killed = [run for run in nested(folder, parent) if run.info.status == "KILLED"]
    assert killed
    assert {run.info.status for run in nested(folder, parent)} <= {"KILLED", "FINISHED"}
    stopped = {run.data.params["model.dropout"] for run in killed}
    out = end(start(folder, *command))
    assert_counted_once(journal(folder), nested(folder, parent), 3)
    done = nested(folder, parent)
    assert {run.info.status for run in done} == {"FINISHED"}
    assert stopped <= {run.data.params["model.dropout"] for run in done}
    assert "registered  capexp-scenes version 1 @champion" in out

    before = (tmp_path / "studies/scenes.journal").read_bytes()
    other = end(start(folder, *command, "--training.epochs", "5"), status=2)
    assert "--study scenes: was made for another experiment or other data: training.epochs was 4, now it is 5" in other
    assert (tmp_path / "studies/scenes.journal").read_bytes() == before

    path = tmp_path / "experiments/scenes-best.toml"
    assert tomllib.loads(path.read_text())["name"] == "scenes-best"
    best = min(float(run.data.metrics["best_dev_loss"]) for run in done)
    assert f"dev loss {best:.4f}" in path.read_text()
    folder.environment["OMP_NUM_THREADS"] = "1"  # as each worker had
    folder.run("train", "--experiment", str(path))
    (run,) = [run for run in folder.runs() if run.info.run_name == "scenes-best"]
    assert run.data.metrics["best_dev_loss"] == pytest.approx(best, abs=0.02)


@pytest.fixture
def server(postgresql: Callable[[str], str], tmp_path: Path) -> Iterator[tuple[str, str]]:
    """The URI of an MLflow server that keeps its runs in PostgreSQL, and the storage for a study."""
    store, storage = postgresql("mlflow"), postgresql("studies")
    server = Server(tmp_path / "server", store)
    try:
        server.start()
        yield server.address.replace("http://", "http://someone:geheim@"), storage
    finally:
        server.stop()


@pytest.mark.slow
def test_machines_share_a_study_through_postgresql_and_an_mlflow_server(
    server: tuple[str, str], tmp_path: Path
) -> None:
    tracking, storage = server
    folders = []
    for name in ("first", "second", "third"):  # each machine has its own files
        (tmp_path / name).mkdir()
        folders.append(Folder(tmp_path / name))
        folders[-1].environment["MLFLOW_TRACKING_URI"] = tracking
    command = ("--trials", "5", "--storage", storage, "--tune.heartbeat", "1", "--training.epochs", "4")
    first = start(folders[0], *command, "--workers", "2")

    def study() -> optuna.Study:
        return optuna.load_study(study_name="scenes", storage=storage)

    wait_for(lambda: list(folders[0].path.glob("studies/scenes/*/last.pt")))
    second = start(folders[1], *command)
    wait_for(lambda: list(folders[1].path.glob("studies/scenes/*/last.pt")))
    wait_for(lambda: list(folders[0].path.glob("studies/scenes/*/ep001*")))  # in the middle of a trial
    kill_all(first)  # the machine is gone, and its files are out of reach
    said = end(second)
    assert "was broken off; it is run again" in said
    assert "5 of 5 trials done" in said
    parent = parent_of(folders[1])
    assert parent.info.status == "FINISHED"
    runs = nested(folders[1], parent)
    assert_counted_once(study(), runs, 5)
    lost = [run for run in runs if run.info.status == "FAILED"]
    assert lost, "begun anew elsewhere, so their runs have ended"
    assert all("its worker vanished" in run.data.tags["error"] for run in lost)

    # A third machine, which has trained nothing, finds the best captioner: it is registered already.
    out = end(start(folders[2], *command))
    assert "5 of 5 trials done" in out
    (version,) = folders[1].client.search_model_versions("name='capexp-scenes'")
    assert "capexp-scenes version 1 @champion" in out
    assert version.run_id == parent.info.run_id

    password = unquote(storage.split(":")[2].split("@")[0])
    for secret in (password, storage.split(":")[2].split("@")[0], "geheim"):
        assert secret not in said + out
        for run in folders[1].runs():
            assert secret not in json.dumps([run.data.params, run.data.tags])
        for path in [*tmp_path.glob("server/artifacts/**/*"), *(file for f in folders for file in f.path.rglob("*"))]:
            if path.is_file():
                assert secret.encode() not in path.read_bytes(), path


@pytest.mark.slow
def test_a_storage_that_goes_away_is_told_in_one_line(postgresql: Callable[[str], str], tmp_path: Path) -> None:
    storage = postgresql("away")
    folder = Folder(tmp_path)
    refused = end(start(folder, "--storage", storage.replace("/away", "/nowhere")), status=2)
    assert refused.count("\n") == 1
    assert 'database "nowhere" does not exist' in refused
    wrong = end(start(folder, "--storage", storage.replace("%40", "%41", 1)), status=2)
    assert "password authentication failed" in wrong
    assert storage.split(":")[2].split("@")[0] not in refused + wrong
    assert list(tmp_path.iterdir()) == [], "nothing was made"


@pytest.mark.slow
def test_one_failing_trial_is_told_and_the_study_goes_on(tmp_path: Path) -> None:
    folder = Folder(tmp_path, has_store=True)
    space = json.dumps({"training.learning_rate": {"choices": [0.01, 1e30]}})
    said = end(folder.start(
        sys.executable, "-m", "capexp.tune", "--trials", "2", "--training.epochs", "1", "--model.lstm_units", "16",
        "--tune.sampler", "random", "--seed", "4", "--tune.search", space,
    ))  # fmt: skip
    parent = parent_of(folder)
    failed = [run for run in nested(folder, parent) if run.info.status == "FAILED"]
    assert failed, said
    assert all("lower training.learning_rate" in run.data.tags["error"] for run in failed)
    assert f"{len(failed)} failed" in said
    assert parent.info.status == "FINISHED"
    assert len(list((tmp_path / "studies/scenes").iterdir())) == 1, "what failed leaves no checkpoints"
