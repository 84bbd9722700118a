"""Search settings with Optuna. Each trial trains a captioner, as a run nested under the run of the study."""

import math
import re
import sys
import time
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from capexp import cli

if TYPE_CHECKING:
    from capexp.runs.lifecycle import OpenRun
    from capexp.runs.study import Trials
    from capexp.search.study import Study
    from capexp.search.trial import StudyProgress


def tune(argv: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = cli.Parser("tune", __doc__)
    cli.add_experiment(parser)
    parser.add_argument(
        "--trials", help="total number of finished and pruned trials of the study, same as --tune.trials"
    )
    parser.add_argument(
        "--workers", type=int, default=1, metavar="N", help="number of trials at a time, each in its own process"
    )
    parser.add_argument("--study", help="the study's name (default: the experiment's)")
    parser.add_argument(
        "--storage",
        metavar="URL",
        help="URL of a PostgreSQL database, needed to share a study between machines (default: a file)",
    )
    parser.add_argument("--timeout", type=float, metavar="S", help="start no more trials after S seconds")
    parser.add_argument(
        "--promote", action="store_true", help="make the best captioner champion even if the current one is better"
    )
    parser.add_argument(
        "--write-best",
        nargs="?",
        type=Path,
        const=Path(),
        metavar="FILE.toml",
        help="write the experiment of the best trial to this file (without a file name: experiments/STUDY-best.toml)",
    )
    arguments, settings = parser.parse(argv)
    if arguments.trials is not None:
        settings["tune.trials"] = arguments.trials
    if arguments.workers < 1:
        parser.error(f"--workers {arguments.workers}: at least 1")
    if arguments.timeout is not None and not 0 < arguments.timeout < math.inf:
        parser.error(f"--timeout {arguments.timeout:g}: a number of seconds")

    from capexp.experiment import check_search_space, find_experiment, load_experiment
    from capexp.settings import NAME

    if not re.fullmatch(NAME, arguments.study or "study"):
        parser.error(f"--study {arguments.study!r}: letters, digits, spaces and . _ - only")
    experiment = load_experiment(find_experiment(arguments.experiment), settings)
    check_search_space(experiment)
    name = arguments.study or experiment.name
    best_file: Path | None = arguments.write_best
    if best_file == Path():
        best_file = Path("experiments", f"{name}-best.toml")
    else:
        cli.refuse_output(parser, best_file, "--write-best")

    from capexp.captioning.captioner import check_fits
    from capexp.data.dataset import Dataset
    from capexp.runs.folder import STUDIES
    from capexp.runs.study import Trials, comparable_settings, study_plan, study_run
    from capexp.runs.workers import Program, Task, work, work_together
    from capexp.search.storage import find_storage
    from capexp.search.study import require_comparable
    from capexp.tracking.known_runs import adopted_run
    from capexp.tracking.store import check_store

    storage = find_storage(arguments.storage, STUDIES, name, experiment.tune.heartbeat)
    check_store(experiment.name, adopted_run())
    data = Dataset.read(experiment)
    check_fits(experiment, data)
    known = comparable_settings(experiment, data)
    require_comparable(storage, name, known)
    data = data.with_features()
    deadline = None if arguments.timeout is None else time.time() + arguments.timeout
    task = Task(experiment, name, arguments.storage, deadline)
    study = task.open(known)
    trials = Trials(experiment, data, study, name)
    print(
        f"study {name} in {storage.shown}: {study.progress().counted} of {experiment.tune.trials} trials done, "
        f"searching {', '.join(experiment.tune.search)}",
        flush=True,
    )
    with study_run(study_plan(experiment, data, name, arguments.promote), study) as run:
        trials.end_lost()
        if arguments.workers == 1:
            lines = work(task, trials)
        else:
            lines = work_together(task, arguments.workers, Program(partial(cli.main, "tune"), cli.INTERRUPTED))
        with closing(lines), closing(_Display(study)) as display:
            for line in lines:
                display.show(line)
        trials.end_lost()
        trials.delete_ended()
        if not study.is_complete():
            print(f"{study.progress().counted} of {experiment.tune.trials} trials are done; the same command goes on")
            if study.at_work():
                print("others are at work on the study: the last of them registers the best")
                return 0
        with study.lock():  # if two processes finish at the same time, the second finds what the first has registered
            return _finish(trials, run, best_file)


def _finish(trials: "Trials", run: "OpenRun", best_file: Path | None) -> int:
    """Draw the charts, register the best captioner, print the results; return the command's exit status."""
    from capexp.files import write_whole, writing
    from capexp.search.charts import draw_charts, importances

    best = trials.study.best()
    if best is None:
        print("no trial has finished: nothing to register")
        return 1
    for chart in draw_charts(trials.study.optuna, f"Study {trials.name}", run.folder.path):
        run.tracked.log_artifact(chart)
    version = trials.register_best(run, best)
    print(f"\nbest        trial {best.number}, run {best.run_id}: dev loss {best.dev_loss:.4f} nats per token")
    for setting, value in best.values.items():
        print(f"            {setting} = {value}")
    for setting, share in importances(trials.study.optuna).items():
        print(f"importance  {share:.2f} {setting}")
    print(f"registered  {version.describe()}")
    print(f"charts      study.html and pictures, among the artifacts of run {run.run_id}")
    if best_file is not None:
        with writing(best_file):
            best_file.parent.mkdir(parents=True, exist_ok=True)
        print(f"written     {write_whole(best_file, trials.best_experiment(best, best_file.stem))}")
    return 0


class _Display:
    """Prints a line when a trial ends, with the progress of the study; on a terminal, the progress is a status line."""

    def __init__(self, study: "Study") -> None:
        from tqdm import tqdm

        self._study = study
        self._is_live = sys.stderr.isatty()
        self._bar = tqdm(bar_format="{desc}", disable=not self._is_live, leave=False)
        self._shown_at = 0.0
        self.show(None)

    def show(self, line: str | None) -> None:
        """Print a line, if there is one, and the progress of the study."""
        if line is not None:
            self._bar.write(line)
        if self._is_live and (line is not None or time.monotonic() - self._shown_at > 1):
            self._bar.set_description_str(_describe_progress(self._study.progress()))
            self._shown_at = time.monotonic()
        elif line is not None:
            self._bar.write(f"  {_describe_progress(self._study.progress())}")
            sys.stdout.flush()

    def close(self) -> None:
        """Remove the status line."""
        self._bar.close()


def _describe_progress(progress: "StudyProgress") -> str:
    """Return the progress of a study in words."""
    parts = [f"{progress.counted} of {progress.wanted} trials done ({progress.pruned} pruned)"]
    if progress.failed:
        parts.append(f"{progress.failed} failed")
    parts.append(f"{progress.running} running")
    if progress.best is not None:
        parts.append(f"best {progress.best.dev_loss:.4f} (trial {progress.best.number})")
    if progress.seconds_left is not None and progress.counted < progress.wanted:
        minutes = progress.seconds_left / 60
        parts.append(f"about {f'{minutes:.0f} min' if minutes >= 2 else f'{progress.seconds_left:.0f} s'} left")
    return ", ".join(parts)


if __name__ == "__main__":
    cli.main("tune", tune)
