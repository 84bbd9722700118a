"""A tracking server that goes away, is slow or fails, in front of real runs: at the end it has what the journal has."""

import json
import os
import signal
import statistics
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from cases import cases
from kinds import KINDS, PARENT, Kind, flags
from mlflow.entities import Run
from tracking_server import Proxy, Server
from user_folder import Folder, Process, wait_for

pytestmark = pytest.mark.slow

SMALL = flags(
    {"model.embedding_size": 32, "model.lstm_units": 32, "model.output_dropout": 0.0, "training.learning_rate": 0.01}
)
PASSWORD = "geheim-im-netz"  # of the server's address: in nothing that is told, logged, kept or sent
Away = tuple[Folder, Server, Proxy]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that the tests of this process use one after another, each with an empty store."""
    server = Server(tmp_path_factory.mktemp("of all") / "server")
    yield server
    server.stop()


@pytest.fixture
def away(running: Server, tmp_path: Path) -> Iterator[Away]:
    """A user's folder whose server is reached through a proxy, by an address with a password."""
    running.start()
    running.clear()
    proxy = Proxy(running)
    folder = Folder(tmp_path)
    address = proxy.address.replace("http://", f"http://someone:{PASSWORD}@")
    folder.environment |= {"MLFLOW_TRACKING_URI": address, "OMP_NUM_THREADS": "1", "CAPEXP_PATIENCE": "300"}
    yield folder, running, proxy
    proxy.close()
    for path in (path for place in (tmp_path, running.folder) for path in place.rglob("*") if path.is_file()):
        with suppress(FileNotFoundError):  # the server is still up, and its database's journal comes and goes
            assert PASSWORD.encode() not in path.read_bytes(), path


def start(folder: Folder, command: tuple[str, ...]) -> Process:
    return folder.start(sys.executable, "-m", f"capexp.{command[0]}", *command[1:])


def begin(folder: Folder, kind: Kind, epochs: int, **settings: Any) -> Process:
    return start(folder, kind.begin(training__epochs=epochs, training__patience=500, **settings))


def end(process: Process, status: int = 0) -> tuple[str, str]:
    out, err = process.communicate(timeout=400)
    print(out, err)
    assert process.returncode == status, f"{out}\n{err}"
    assert PASSWORD not in out + err
    assert "Traceback" not in out + err
    return out, err


def journals_of(folder: Folder) -> dict[str, list[dict[str, Any]]]:
    """The lines of each run's journal, by the run's id."""
    return {
        path.parent.name: [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
        for pattern in ("checkpoints/*", "checkpoints/*/*", "studies/*/*")
        for path in folder.path.glob(f"{pattern}/journal.jsonl")
    }


def epochs_of(folder: Folder) -> int:
    """How many epochs the journals hold; a resumed run logs those before it again."""
    logged = [
        (run_id, step)
        for run_id, lines in journals_of(folder).items()
        for line in lines
        if line.get("kind") == "metrics"
        for name, _, _, step in line["content"]
        if name == "train_loss"
    ]
    return len(set(logged))


def epochs_sent(folder: Folder) -> list[int]:
    """How many epochs of each run the server has; a study deletes the folders of trials that have ended."""
    trained = [folder.client.get_metric_history(run.info.run_id, "train_loss") for run in folder.runs()]
    return [len(epochs) for epochs in trained if epochs]


def artifacts_of(folder: Folder, run: Run, inside: str | None = None) -> set[str]:
    found: set[str] = set()
    for item in folder.client.list_artifacts(run.info.run_id, inside):
        found |= artifacts_of(folder, run, item.path) if item.is_dir else {item.path}
    return found


def assert_server_equals_journals(folder: Folder, status: str = "FINISHED") -> Run:
    """Each run on the server has what its journal has, and nothing else of it waits; returns the one above all."""
    by_id = {run.info.run_id: run for run in folder.runs()}
    journals = journals_of(folder)
    for run_id, lines in journals.items():
        assert_server_equals_journal(folder, by_id[run_id], lines, status)
    assert not list(folder.path.glob("checkpoints/*/bundle")), "the store has it"
    (top,) = [by_id[run_id] for run_id in journals if PARENT not in by_id[run_id].data.tags]
    return top


def assert_server_equals_journal(folder: Folder, run: Run, lines: list[dict[str, Any]], status: str) -> None:
    entries = [line for line in lines if "kind" in line]
    assert {n for line in lines for n in line.get("sent", ())} == {entry["number"] for entry in entries}
    held: dict[str, set[tuple[float, int, int]]] = {}
    tags: dict[str, str] = {}
    params: dict[str, str] = {}
    for entry in entries:
        if entry["kind"] == "metrics":
            for name, value, timestamp, step in entry["content"]:
                held.setdefault(name, set()).add((value, timestamp, step))
        elif entry["kind"] == "params":
            params = entry["content"] | params  # a run keeps those that it was started with
        elif entry["kind"] == "tags":
            tags |= entry["content"]
    assert run.data.params == params
    assert held.keys() == run.data.metrics.keys()
    for name, points in held.items():
        history = folder.client.get_metric_history(run.info.run_id, name)
        assert sorted((point.value, point.timestamp, point.step) for point in history) == sorted(points), name
    if status == "FINISHED":
        tags = {name: value for name, value in tags.items() if name not in ("stopped", "error")}
        assert not {"stopped", "error"} & run.data.tags.keys()
    assert tags.items() <= run.data.tags.items()
    files = {entry["content"] for entry in entries if entry["kind"] == "artifact"}
    assert files == artifacts_of(folder, run)
    assert len(run.inputs.dataset_inputs) == 2
    assert run.info.status == status


def assert_one_model(folder: Folder, run: Run, versions: int = 1) -> None:
    """The run has logged one model, of which there are so many versions."""
    (model,) = folder.client.search_logged_models([run.info.experiment_id])
    assert str(model.status) == "READY"
    assert model.source_run_id == run.info.run_id
    found = folder.client.search_model_versions("name='capexp-scenes'")
    assert [version.run_id for version in found] == [run.info.run_id] * versions
    # Beside those of it that were deleted, in no order: MLflow does not take a run's output back.
    assert model.model_id in [output.model_id for output in run.outputs.model_outputs]
    if versions:
        assert folder.client.get_model_version_by_alias("capexp-scenes", "champion").run_id == run.info.run_id


@pytest.mark.parametrize("name", cases("seeds", "study"))
def test_a_server_that_is_stopped_and_started_during_training_misses_nothing(away: Away, name: str) -> None:
    folder, server, _ = away
    kind = KINDS[name]
    process = begin(folder, kind, 12 // kind.count)
    wait_for(lambda: epochs_of(folder) >= 1)
    server.stop()
    there = epochs_of(folder)
    wait_for(lambda: epochs_of(folder) >= there + 2)  # training goes on
    os.killpg(process.pid, signal.SIGSTOP)  # a server takes as long to start as the whole training
    server.start()
    os.killpg(process.pid, signal.SIGCONT)
    _, said = end(process)
    for told in ("the entries that are not sent yet are kept in ", "MLflow's store answers again"):
        assert 1 <= said.count(told) <= (1 if name == "single" else 2), "by the one that trains and the one above it"
    run = assert_server_equals_journals(folder)
    assert_one_model(folder, run)
    assert any(name.startswith("system/") for name in run.data.metrics)
    assert epochs_sent(folder) == [12 // kind.count] * kind.count


@pytest.mark.parametrize("name", cases("ensemble", of=("seeds", "ensemble", "study")))
def test_a_server_that_stays_away_stops_what_has_more_runs_to_do_and_it_goes_on_later(away: Away, name: str) -> None:
    folder, _, proxy = away
    folder.environment["CAPEXP_PATIENCE"] = "5"
    kind = KINDS[name]
    process = begin(folder, kind, 4)
    wait_for(lambda: epochs_of(folder) >= 1)
    proxy.is_away = True
    _, said = end(process, status=3)
    run_id = said.split()[-1]
    assert said.splitlines()[-1].endswith(f"nothing is lost: when the server is back, python -m capexp.sync {run_id}")
    assert run_id in journals_of(folder)
    proxy.is_away, folder.environment["CAPEXP_PATIENCE"] = False, "300"
    assert {run.info.status for run in folder.runs()} == {"RUNNING"}
    assert "ended       FINISHED" in folder.run("sync", run_id).stdout
    folder.run(*kind.go_on(folder, training__epochs=4, training__patience=500))
    assert_one_model(folder, assert_server_equals_journals(folder))
    assert epochs_sent(folder) == [4] * kind.count


def test_what_a_server_that_stays_away_has_missed_is_sent_by_sync(away: Away, tmp_path: Path) -> None:
    folder, _, proxy = away
    folder.environment["CAPEXP_PATIENCE"] = "5"
    process = begin(folder, KINDS["single"], 4)
    wait_for(lambda: epochs_of(folder) >= 1)
    proxy.is_away = True
    _, said = end(process, status=3)
    (run_id,) = journals_of(folder)
    assert said.splitlines()[-1].endswith(f"python -m capexp.sync {run_id}")
    away_still = folder.run("sync", run_id, status=2)
    assert away_still.stderr.count("\n") == 1
    proxy.is_away, folder.environment["CAPEXP_PATIENCE"] = False, "300"
    assert folder.runs()[0].info.status == "RUNNING"
    printed = folder.run("sync", run_id)
    assert "registered  capexp-scenes version 1 @champion (the first champion)" in printed.stdout
    assert "ended       FINISHED" in printed.stdout
    run = assert_server_equals_journals(folder)
    assert_one_model(folder, run)
    assert run.data.metrics["best_dev_loss"] > 0
    before = folder.runs()[0].to_dictionary()
    assert "no entries" in folder.run("sync", run_id).stdout
    assert folder.runs()[0].to_dictionary() == before
    assert_one_model(folder, run)
    folder.run("evaluate", "--model", "models:/capexp-scenes@champion")
    (tmp_path / "elsewhere").mkdir()
    elsewhere = Folder(tmp_path / "elsewhere")
    elsewhere.environment["MLFLOW_TRACKING_URI"] = folder.store
    assert "start where it was trained" in elsewhere.run("sync", run_id, status=2).stderr
    # Everything sent once more, as if the journal had lost what it knew of that: nothing changes.
    (path,) = folder.path.glob("checkpoints/*/journal.jsonl")
    lines = [line for line in path.read_text().splitlines() if '"kind"' in line and '"claim"' not in line]
    path.write_text("\n".join(lines) + "\n")
    folder.run("sync", run_id)
    run = assert_server_equals_journals(folder)
    assert_one_model(folder, run)


@pytest.mark.parametrize("name", cases("single"))
def test_a_slow_server_does_not_slow_training_down(away: Away, name: str) -> None:
    folder, _, proxy = away
    process = begin(folder, KINDS[name], 10, training__batch_size=32)  # epochs of a second
    wait_for(lambda: epochs_of(folder) >= 1)
    proxy.delay = 4.0
    wait_for(lambda: epochs_of(folder) >= 9)
    proxy.delay = 0.0
    end(process)
    assert_server_equals_journals(folder)
    first = next(run for run in folder.runs() if "train_loss" in run.data.metrics)
    history = {
        name: folder.client.get_metric_history(first.info.run_id, name) for name in ("dev_loss", "epoch_seconds")
    }
    ended = [point.timestamp / 1000 for point in history["dev_loss"]]
    seconds = [point.value for point in history["epoch_seconds"]]
    between = [after - before - took for before, after, took in zip(ended, ended[1:], seconds[1:], strict=False)]
    print("seconds beside the epochs themselves, while each request takes 4 s:", between[1:-1])
    assert statistics.median(between[1:-1]) < 3.0


@pytest.mark.parametrize("name", cases("seeds"))
def test_a_server_that_answers_500_or_loses_its_answers_gets_everything_once(away: Away, name: str) -> None:
    folder, _, proxy = away
    folder.environment["CAPEXP_PATIENCE"] = "20"
    kind = KINDS[name]
    process = begin(folder, kind, 8)
    wait_for(lambda: epochs_of(folder) >= 1)
    proxy.fails = True
    there = epochs_of(folder)
    wait_for(lambda: epochs_of(folder) >= there + 2 and proxy.failed > 1)
    proxy.loses, proxy.fails = True, False
    for _ in range(8):
        out, said = process.communicate(timeout=400)
        print(out, said, process.returncode, sorted(proxy.lost))
        assert PASSWORD not in out + said
        assert "Traceback" not in out + said
        if process.returncode == 0:
            break
        assert process.returncode == 3 or (process.returncode == 2 and name != "single")  # a run to be begun
        if name == "single":
            (run_id,) = journals_of(folder)
            assert f"python -m capexp.sync {run_id}" in said
            process = start(folder, ("sync", run_id))
        else:
            process = start(folder, kind.go_on(folder, training__epochs=8, training__patience=500))
    assert process.returncode == 0, said
    assert any("model-versions" in path for _, path in proxy.lost)
    assert_one_model(folder, assert_server_equals_journals(folder))
    assert epochs_sent(folder) == [8] * kind.count


@pytest.mark.parametrize("name", cases("single"))
def test_an_interrupt_and_a_kill_while_the_server_is_away_lose_nothing(away: Away, name: str) -> None:
    folder, _, proxy = away
    kind = KINDS[name]
    epochs = 20 if kind.count == 1 else 14
    settings = {"training__epochs": epochs, "training__patience": 500}
    process = begin(folder, kind, epochs)
    wait_for(lambda: epochs_of(folder) >= 1)
    proxy.is_away = True
    there = epochs_of(folder)
    wait_for(lambda: epochs_of(folder) >= there + 1)
    process.send_signal(signal.SIGINT)
    _, said = end(process, status=130)
    proxy.is_away = False
    for run_id in journals_of(folder):
        assert f"python -m capexp.sync {run_id}" in said
        assert "ended       KILLED" in folder.run("sync", run_id).stdout
    run = assert_server_equals_journals(folder, status="KILLED")
    if name == "single":  # the best captioner so far
        assert_one_model(folder, run, versions=0)
    there = epochs_of(folder)
    process = start(folder, kind.go_on(folder, **settings))
    wait_for(lambda: epochs_of(folder) >= there + 1)
    proxy.is_away = True
    there = epochs_of(folder)
    wait_for(lambda: epochs_of(folder) >= there + 1)
    process.kill()
    process.communicate()
    proxy.is_away = False
    for run_id in journals_of(folder):
        told = folder.run("sync", run_id).stdout
        again = kind.is_resumed and run_id == run.info.run_id
        assert "it was interrupted: " in told
        assert (f"python -m capexp.train --resume {run_id}" in told) == again, "what would be refused is not advised"
    done = sum(len(folder.client.get_metric_history(run_id, "train_loss")) for run_id in journals_of(folder))
    assert done == epochs_of(folder)
    folder.run(*kind.go_on(folder, **settings))
    run = assert_server_equals_journals(folder)
    assert epochs_sent(folder) == [epochs] * kind.count
    assert folder.client.get_model_version_by_alias("capexp-scenes", "champion").run_id == run.info.run_id


def test_the_workers_of_a_study_get_over_an_outage(away: Away) -> None:
    folder, _, proxy = away
    space = json.dumps({"model.dropout": {"low": 0.1, "high": 0.5}})
    small = flags({"training.epochs": 4, "training.batch_size": 128})
    words = ("--trials", "4", "--workers", "2", "--tune.pruner", "none")
    process = start(folder, ("tune", *SMALL, *small, *words, "--tune.search", space))
    wait_for(lambda: len(list(folder.path.glob("studies/scenes/*/ep*"))) >= 2)
    proxy.is_away = True
    journals = folder.path.glob("studies/scenes/*/journal.jsonl")
    sizes = {path: path.stat().st_size for path in journals}
    wait_for(lambda: all(not path.exists() or path.stat().st_size > size for path, size in sizes.items()))
    proxy.is_away = False
    end(process)
    parent, *trials = folder.runs()
    assert {run.info.status for run in (parent, *trials)} == {"FINISHED"}
    assert len(trials) == 4
    for run in trials:
        assert len(folder.client.get_metric_history(run.info.run_id, "dev_loss")) == 4
    (version,) = folder.client.search_model_versions("name='capexp-scenes'")
    assert version.run_id == parent.info.run_id
    assert "study.html" in {item.path for item in folder.client.list_artifacts(parent.info.run_id)}
