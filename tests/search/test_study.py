"""The study: trials drawn by the seed, counted once, run again where their worker vanished; journal and PostgreSQL."""

import math
from collections.abc import Generator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from optuna import create_study
from optuna.trial import TrialState

from capexp.errors import InputError, Outage
from capexp.search.charts import draw_charts, importances
from capexp.search.storage import JournalStudyStorage, find_storage
from capexp.search.study import Study, require_comparable
from capexp.search.trial import PendingTrial, Pruned
from capexp.settings import Range, TuneConfig
from capexp.training.loop import Epoch, Update

SPACE = {"x": Range(low=-1.0, high=1.0), "n": Range(low=1, high=64, log=True)}
KNOWN = {"training.epochs": "3", "data digest": "0123"}


def config(trials: int, **settings: Any) -> TuneConfig:
    return TuneConfig(trials=trials, search=SPACE, **{"pruner": "none", **settings})


def open_study(folder: Path, trials: int, seed: int = 7, **settings: Any) -> Study:
    return Study(JournalStudyStorage(folder, "study"), "study", config(trials, **settings), seed, 3, KNOWN)


def epoch(number: int, dev_loss: float) -> Update:
    return Update("", Epoch(number, dev_loss, dev_loss, 0.1, 1.0, 1.0, True, 0))


def bowl(attempt: PendingTrial) -> Generator[Update, None, Any]:
    """Losses that fall to a value which follows from what was drawn."""
    x, n = float(attempt.values["x"]), float(attempt.values["n"])
    run_id = f"run-{attempt.number}"
    try:
        for number in (1, 2, 3):
            yield epoch(number, x**2 + abs(math.log(n / 8)) + 1 / number)
    except Pruned:
        return SimpleNamespace(run_id=run_id, is_pruned=True)
    return SimpleNamespace(run_id=run_id, is_pruned=False)


def run_one(study: Study, objective: Any = bowl) -> str | None:
    trial = study.run_trial(objective)
    while True:
        try:
            next(trial)
        except StopIteration as stop:
            return None if stop.value is None else str(stop.value)


def run_all(study: Study) -> list[str]:
    lines = []
    while not study.is_complete():
        line = run_one(study)
        assert line is not None
        lines.append(line)
    return lines


def drawn(study: Study) -> list[tuple[tuple[str, Any], ...]]:
    return [tuple(sorted(trial.params.items())) for trial in study.optuna.get_trials()]


def vanish(study: Study) -> PendingTrial:
    """Begins a trial, and leaves it as a killed worker does: without a sign of life."""
    with ExitStack() as life:
        begun = study._start_trial(life)
        assert begun is not None
        return begun[1]


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_one_seed_gives_the_same_trials_twice_and_a_resumed_study_those_of_an_undisturbed_one(
    tmp_path: Path, sampler: str
) -> None:
    whole, again, parts, other = (tmp_path / name for name in ("whole", "again", "parts", "other"))
    first = open_study(whole, 14, sampler=sampler)
    run_all(first)
    second = open_study(again, 14, sampler=sampler)
    run_all(second)
    assert drawn(first) == drawn(second)
    for trials in (3, 12, 14):  # a new process each time
        run_all(open_study(parts, trials, sampler=sampler))
    assert drawn(open_study(parts, 14, sampler=sampler)) == drawn(first)
    assert len(set(drawn(first))) == 14
    seeded = open_study(other, 14, seed=8, sampler=sampler)
    run_all(seeded)
    assert not set(drawn(seeded)) & set(drawn(first))


def test_a_kill_changes_nothing_that_is_drawn_after_it(tmp_path: Path) -> None:
    whole, disturbed = open_study(tmp_path / "whole", 6), open_study(tmp_path / "disturbed", 6)
    run_all(whole)
    run_one(disturbed)
    half = disturbed.optuna.ask()  # a worker that dies while it samples: it has one of two values
    half.suggest_float("x", -1, 1)
    run_one(disturbed)
    vanish(disturbed)
    run_all(open_study(tmp_path / "disturbed", 6))
    begun = [values for values in drawn(disturbed) if len(values) == 2]
    assert list(dict.fromkeys(begun)) == drawn(whole)


def test_two_workers_draw_different_values_and_begin_no_more_than_are_wanted(tmp_path: Path) -> None:
    one, two = open_study(tmp_path, 3), open_study(tmp_path, 3)
    begun = [study.run_trial(bowl) for study in (one, two, one)]
    for trial in begun:
        next(trial)
    assert len(set(drawn(one))) == 3
    assert run_one(two) is None, "three are at work, which is enough"
    begun[0].close()  # as Ctrl-C does
    assert run_one(two) is not None, "one of the three will not be counted"
    for trial in begun[1:]:
        for _ in trial:
            pass
    assert one.progress().counted == 3
    assert one.is_complete()
    assert two.is_complete()


def test_the_trial_of_a_vanished_worker_is_run_again_at_most_twice(tmp_path: Path) -> None:
    study = open_study(tmp_path, 2)
    first, second, third = vanish(study), vanish(study), vanish(study)
    assert (first.earlier, second.earlier, third.earlier) == ((), (0,), (1, 0))
    assert first.values == second.values == third.values
    run_all(study)
    states = [trial.state.name for trial in study.optuna.get_trials()]
    assert states == ["FAIL", "FAIL", "FAIL", "COMPLETE", "COMPLETE"]
    assert study.progress().counted == 2
    assert first.values not in [trial.params for trial in study.optuna.get_trials()[3:]]


def test_a_trial_whose_run_had_ended_is_run_again_however_often_its_worker_was_killed(tmp_path: Path) -> None:
    for _ in range(4):
        with ExitStack() as life:
            begun = open_study(tmp_path, 1)._start_trial(life)
            assert begun is not None
            begun[0].set_user_attr("run_id", "run")  # killed before it could tell the study
    study = open_study(tmp_path, 1)
    assert run_one(study) is not None and study.is_complete()
    assert len(set(drawn(study)) - {()}) == 1, "the same values again"


def test_a_stopped_trial_is_run_again_however_often_it_was_stopped(tmp_path: Path) -> None:
    study = open_study(tmp_path, 1)
    for _ in range(5):
        stopped = study.run_trial(bowl)
        next(stopped)
        stopped.close()
    run_all(open_study(tmp_path, 1))
    assert len(set(drawn(study))) == 1
    assert [trial.state.name for trial in study.optuna.get_trials()] == ["FAIL"] * 5 + ["COMPLETE"]


def test_a_trial_at_work_is_not_taken_for_lost(tmp_path: Path) -> None:
    one, two = open_study(tmp_path, 5), open_study(tmp_path, 5)
    at_work = one.run_trial(bowl)
    next(at_work)
    run_one(two)
    assert [trial.state.name for trial in two.optuna.get_trials()] == ["RUNNING", "COMPLETE"]
    assert one.at_work() == {0}
    for _ in at_work:
        pass
    assert [trial.state.name for trial in two.optuna.get_trials()] == ["COMPLETE", "COMPLETE"]
    assert not list((tmp_path / "study.trials").iterdir())


def test_a_trial_that_was_taken_away_ends_without_counting(tmp_path: Path) -> None:
    study = open_study(tmp_path, 2)
    trial = study.run_trial(bowl)
    next(trial)
    study.optuna.tell(0, state=TrialState.FAIL)  # as one that slept too long finds it
    with pytest.raises(StopIteration) as ended:
        next(trial)
    assert "taken for lost" in ended.value.value
    assert study.progress().counted == 0


@pytest.mark.parametrize("fault", [InputError("the loss is nan"), torch.OutOfMemoryError("CUDA out of memory")])
def test_a_fault_of_the_values_fails_the_trial_and_three_in_a_row_the_study(tmp_path: Path, fault: Exception) -> None:
    def failing(attempt: PendingTrial) -> Generator[Update, None, Any]:
        yield epoch(1, 1.0)
        raise fault

    study = open_study(tmp_path, 2)
    for _ in range(2):
        assert f"failed: {fault}" in str(run_one(study, failing))
    run_one(study)
    for _ in range(2):
        run_one(study, failing)
    with pytest.raises(InputError, match="3 trials in a row have failed"):
        run_one(study, failing)
    assert len(set(drawn(study))) == 6, "none of them is run again"
    assert (study.progress().failed, study.progress().counted) == (5, 1)
    assert study.optuna.get_trials()[0].user_attrs["error"] == str(fault)


def test_an_outage_stops_the_worker_and_its_trial_is_run_again(tmp_path: Path) -> None:
    def cut_off(attempt: PendingTrial) -> Generator[Update, None, Any]:
        yield epoch(1, 1.0)
        raise Outage("MLflow's store: no answer")

    study = open_study(tmp_path, 1)
    with pytest.raises(Outage):
        run_one(study, cut_off)
    run_all(study)
    assert [trial.state.name for trial in study.optuna.get_trials()] == ["FAIL", "COMPLETE"]
    assert len(set(drawn(study))) == 1


@pytest.mark.parametrize("pruner", ["median", "hyperband"])
def test_bad_trials_are_pruned_and_counted(tmp_path: Path, pruner: str) -> None:
    study = open_study(tmp_path, 30, pruner=pruner)
    lines = run_all(study)
    progress = study.progress()
    assert progress.pruned > 0
    assert progress.finished + progress.pruned == progress.counted == 30
    assert sum("pruned" in line for line in lines) == progress.pruned
    assert progress.best is not None
    assert progress.best.dev_loss == min(t.value for t in study.optuna.get_trials() if t.state.name == "COMPLETE")


def test_a_line_of_the_journal_that_was_cut_short_is_taken_off(tmp_path: Path) -> None:
    run_all(open_study(tmp_path, 2))
    journal = tmp_path / "study.journal"
    whole = journal.read_bytes()
    journal.write_bytes(whole + b'{"op_code":6,"worker_id":"3')
    study = open_study(tmp_path, 3)
    assert study.progress().counted == 2
    assert journal.read_bytes() == whole
    run_all(study)
    assert open_study(tmp_path, 3).progress().counted == 3


@pytest.mark.parametrize("content", [b"notes\n", b"notes", b'{"no":"journal"}\n{"two":2}\n'])
def test_a_file_that_is_no_journal_is_told_and_left_alone(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "study.journal").write_bytes(content)
    with pytest.raises(InputError, match=r"study\.journal"):
        open_study(tmp_path, 2)
    assert (tmp_path / "study.journal").read_bytes() == content


@pytest.mark.parametrize(
    ("setting", "value"), [("training.epochs", "4"), ("data digest", "4567"), ("tune.search x", "whole numbers")]
)
def test_a_study_of_something_else_is_refused_by_what_differs_and_left_alone(
    tmp_path: Path, setting: str, value: str
) -> None:
    run_all(open_study(tmp_path, 2))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    storage = JournalStudyStorage(tmp_path, "study")
    with pytest.raises(InputError, match=f"{setting} was .*, now it is {value}"):
        require_comparable(storage, "study", KNOWN | {setting: value})
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    require_comparable(storage, "study", KNOWN)
    require_comparable(JournalStudyStorage(tmp_path / "elsewhere", "study"), "study", KNOWN)
    assert not (tmp_path / "elsewhere").exists(), "looking makes nothing"


def test_a_setting_that_was_added_since_a_study_began_had_its_default_then(tmp_path: Path) -> None:
    run_all(open_study(tmp_path, 2))
    storage = JournalStudyStorage(tmp_path, "study")
    require_comparable(storage, "study", KNOWN | {"training.average": "0.0"})
    with pytest.raises(InputError, match=r"training\.average was 0\.0, now it is 0\.9"):
        require_comparable(storage, "study", KNOWN | {"training.average": "0.9"})


def test_a_study_whose_maker_was_killed_on_the_spot_is_taken_over(tmp_path: Path) -> None:
    create_study(storage=JournalStudyStorage(tmp_path, "study").open(), study_name="study")
    run_all(open_study(tmp_path, 2))
    with pytest.raises(InputError, match=r"training\.epochs was 3"):
        require_comparable(JournalStudyStorage(tmp_path, "study"), "study", KNOWN | {"training.epochs": "4"})


def test_a_study_of_another_program_is_refused(tmp_path: Path) -> None:
    study = create_study(storage=JournalStudyStorage(tmp_path, "study").open(), study_name="study")
    study.ask()
    with pytest.raises(InputError, match="not a study of this program"):
        open_study(tmp_path, 2)


@pytest.mark.slow
def test_the_charts_show_the_study(tmp_path: Path) -> None:
    study = open_study(tmp_path, 12)
    run_all(study)
    shares = importances(study.optuna)
    assert set(shares) == {"x", "n"}
    assert sum(shares.values()) == pytest.approx(1)
    assert list(shares.values()) == sorted(shares.values(), reverse=True)
    paths = draw_charts(study.optuna, "study <i>", tmp_path)
    assert [path.name for path in paths] == [
        "study.html", "history.png", "importances.png", "parallel.png", "slice.png"
    ]  # fmt: skip
    page = paths[0].read_text()
    assert page.count('class="plotly-graph-div"') == 4
    assert "study &lt;i&gt;" in page
    assert 'src="http' not in page
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths[1:])


def test_one_finished_trial_has_no_importances(tmp_path: Path) -> None:
    study = open_study(tmp_path, 1)
    run_all(study)
    assert importances(study.optuna) == {}
    assert "importances.png" not in [path.name for path in draw_charts(study.optuna, "one", tmp_path)]


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("postgresql://u:geheim@127.0.0.1:9/studies", "postgresql://127.0.0.1:9/studies: connection failed"),
        ("postgresql://u:geheim@127.0.0.1:port/studies", "not a URL"),
        ("postgresql://127.0.0.1:9/studies?user=u&password=geheim", "postgresql://127.0.0.1:9/studies: connection"),
        ("mysql://u:geheim@127.0.0.1/studies", "mysql://127.0.0.1/studies: not a PostgreSQL database"),
        ("sqlite:///geheim/../studies.db", "not a PostgreSQL database"),
        ("nonsense", "not a URL"),
        ("", "not a URL"),
    ],
)
def test_a_storage_that_cannot_be_reached_is_told_in_one_line_without_its_password(url: str, says: str) -> None:
    pytest.importorskip("psycopg", reason="psycopg is not here; pip install 'psycopg[binary]'")
    with pytest.raises(InputError) as refused:
        require_comparable(find_storage(url, Path("studies"), "study", 20), "study", KNOWN)
    message = str(refused.value)
    assert says in message
    assert "\n" not in message
    assert "geheim" not in message or url.startswith("sqlite")
    print(message)
