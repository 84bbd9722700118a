"""Searches settings with Optuna: every trial is an ordinary experiment, tracked under the study's run."""

import re
import shutil
import time
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING

from capexp import command

if TYPE_CHECKING:
    from capexp.runs import Result
    from capexp.search import Value
    from capexp.training.fit import Epoch

STUDIES = Path("studies")


def tune(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = command.Parser("tune", __doc__, "The search space is [tune.search] of the experiment's file.")
    command.add_experiment(parser)
    parser.add_argument("--trials", help="finished and pruned ones together, over all sittings (tune.trials)")
    parser.add_argument("--study", help="the study's name (default: the experiment's)")
    parser.add_argument("--timeout", type=float, metavar="S", help="begin no trial after so many seconds")
    parser.add_argument("--promote", action="store_true", help="make the best model champion whatever it scores")
    arguments, settings = parser.parse(argv)
    if arguments.trials is not None:
        settings["tune.trials"] = arguments.trials

    from capexp import experiment as experiments, runs
    from capexp.preparation import comparable, prepare
    from capexp.search import Study
    from capexp.tracking.store import check_store

    experiment = experiments.load(experiments.find(arguments.experiment), settings)
    experiments.check_search_space(experiment)
    if not re.fullmatch(experiments.NAME, arguments.study or "study"):
        parser.error(f"--study {arguments.study!r}: letters, digits, blanks and . _ - only")
    check_store()
    prepared = prepare(experiment)
    name = arguments.study or experiment.name
    folder, config = STUDIES / name, experiment.tune
    study = Study(STUDIES, name, config, experiment.seed, comparable(experiment, prepared))
    print(f"study {name}: {study.counted()} of {config.trials} trials done, searching {', '.join(config.search)}")
    try:
        with runs.study_run(experiment, prepared, name, study.run_id) as tracked:
            study.run_id = tracked.run_id

            def objective(values: "dict[str, Value]") -> "Generator[Epoch, None, Result]":
                trial = experiments.replace(experiment, values)
                return runs.run(trial, prepared, parent=tracked.run_id, folder=folder, register_model=False)

            start = time.monotonic()
            while study.counted() < config.trials:
                if arguments.timeout is not None and time.monotonic() - start > arguments.timeout:
                    print(f"--timeout {arguments.timeout:g}: no more trials are begun")
                    break
                print(study.run_trial(objective), flush=True)
                best = study.best()
                _keep_only(folder, best.run_id if best else None)
            best = study.best()
            if best is None:
                print("no trial has finished: nothing to register")
                return 1
            version = runs.register_trial(tracked, folder / best.run_id, prepared, promote=arguments.promote)
            tracked.set_tags({"best_trial": str(best.number), "best_run": best.run_id})
            tracked.log_metrics({"best_dev_loss": best.dev_loss}, best.number, time.time_ns() // 1_000_000)
    finally:
        study.close()
    print(f"\nbest        trial {best.number}, run {best.run_id}: dev loss {best.dev_loss:.4f} nats per token")
    for setting, value in best.values.items():
        print(f"            {setting} = {value}")
    print(f"registered  {version.describe()}")
    return 0


def _keep_only(folder: Path, best_run: str | None) -> None:
    """Only the best trial's checkpoints are needed again; the others are deleted."""
    for trial in folder.iterdir():
        if trial.name != best_run:
            shutil.rmtree(trial, ignore_errors=True)


if __name__ == "__main__":
    command.main("tune", tune)
