"""A study's trials as MLflow runs: nested under the study's run, gone on with, tidied up, the best one registered."""

import shutil
import time
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from capexp import experiment as experiments, run_folder, runs
from capexp.data.errors import InputError, Outage
from capexp.experiment import Experiment
from capexp.preparation import Prepared
from capexp.registration import register_bundle
from capexp.search.study import Study
from capexp.search.trial import Attempt, Trial
from capexp.tracking.registry import Version
from capexp.tracking.run import (
    TrackedRun,
    add_artifacts,
    adopted_run,
    end_nested,
    fetch_artifacts,
    find_nested,
    keep_open,
    run_tags,
    tracked_run,
)
from capexp.tracking.store import await_store, prepare_store
from capexp.training.epoch import Epoch

TRIAL = "trial"
"""The tag of a nested run that holds its trial's number."""
_BUNDLE = "bundle"  # the artifact by which another machine finds the best captioner


@dataclass(frozen=True)
class Trials:
    """The trials of a study, as one process runs them."""

    experiment: Experiment
    prepared: Prepared
    study: Study
    folder: Path
    """Of their checkpoints."""

    def train(self, attempt: Attempt) -> Generator[Epoch, None, runs.Result]:
        """Trains one, from its last checkpoint where it was broken off and that is reachable.

        Where other machines are at work too, the best captioner so far is put among its run's artifacts.
        """
        parents = self.study.parent_runs()
        await_store()
        try:
            result = yield from runs.run(
                experiments.replace(self.experiment, attempt.values),
                self.prepared,
                resume=self._broken_off(attempt, parents),
                parent=parents[0],
                name=f"trial {attempt.number}",
                tags={TRIAL: str(attempt.number)},
                folder=self.folder,
                register_model=False,
            )
        except Outage:
            raise
        except (InputError, torch.OutOfMemoryError):
            failed = find_nested(parents, TRIAL, str(attempt.number))
            if failed is not None:
                shutil.rmtree(self.folder / failed, ignore_errors=True)
            raise
        if self.study.is_shared and result.dev_loss_blind is not None:
            best = self.study.best()
            if best is None or result.best.dev_loss < best.dev_loss:
                add_artifacts(result.run_id, result.bundle, _BUNDLE)
        return result

    def tidy(self) -> None:
        """Deletes the checkpoints of the trials that have ended, but for the best one."""
        ended, best = self.study.ended_runs(), self.study.best()  # in this order: a new best one is not among the ended
        for run_id in ended - {best.run_id if best else ""}:
            shutil.rmtree(self.folder / run_id, ignore_errors=True)

    def end_lost(self) -> None:
        """Ends FAILED the runs that vanished workers have left running."""
        for parent in self.study.parent_runs():
            end_nested(
                parent,
                TRIAL,
                lambda: {str(number) for number in self.study.at_work()},
                "its worker vanished; the trial was run again, or given up after three times",
            )

    def register_best(self, tracked: TrackedRun, best: Trial, promote: bool) -> Version:
        """Registers the best captioner under the study's run, which is told what its values are.

        Raises:
            InputError: its trial was run on another machine, and the captioner is nowhere to be found.
        """
        local = run_folder.best_bundle(self.folder / best.run_id, self.experiment)
        bundle = local or fetch_artifacts(best.run_id, _BUNDLE)
        if bundle is None:
            raise InputError(
                f"trial {best.number} is the best, but its captioner is not in {self.folder / best.run_id}; "
                "give the same command where it was trained"
            )
        experiment = experiments.replace(self.experiment, best.values)
        tracked.log_metrics({"best_dev_loss": best.dev_loss}, best.number, time.time_ns() // 1_000_000)
        values = {f"best.{name}": str(value) for name, value in best.values.items()}
        tracked.set_tags({"best_trial": str(best.number), "best_run": best.run_id} | values)
        return register_bundle(tracked, experiment, self.prepared, bundle, promote)

    def best_experiment(self, best: Trial, name: str) -> str:
        """The experiment with the best trial's values, as a TOML file with a head that tells where they are from."""
        experiment = experiments.replace(self.experiment, {**best.values, "name": name})
        head = [
            f"Question:  how good is {self.experiment.name} with the best values that a study has found?",
            f"System:    {self.experiment.name} with " + ", ".join(f"{n} = {v}" for n, v in best.values.items()),
            f"Command:   python -m capexp.train --experiment {name}",
            f"Expected:  dev loss {best.dev_loss:.4f}, as trial {best.number} of the study (run {best.run_id})",
        ]
        return "".join(f"# {line}\n" for line in head) + "\n" + experiment.to_toml()

    def _broken_off(self, attempt: Attempt, parents: list[str]) -> str | None:
        """The run in which the attempt was begun before, if its checkpoints are here and nobody is training it."""
        for number in attempt.earlier:
            run_id = find_nested(parents, TRIAL, str(number))
            if run_id is not None and (self.folder / run_id).is_dir():
                return None if run_folder.is_training(self.folder / run_id) else run_id
        return None


@contextmanager
def study_run(experiment: Experiment, prepared: Prepared, study: Study, name: str) -> Iterator[TrackedRun]:
    """The run that a study's trials are nested under: the one it had, or a new one.

    While others are at work on the study it stays open, however this process leaves it.
    """
    prepare_store()

    def leave() -> None:
        with suppress(Outage):
            if study.at_work():
                keep_open(study.parent_runs()[0])

    with ExitStack() as stack:
        with study.alone():  # of two that begin the study at once, the second must find the first's run
            run_folder.refuse_trained(run_folder.CHECKPOINTS)
            held = study.parent_runs()
            resume = held[0] if held and adopted_run() is None and run_tags(held[0]) else None
            stack.callback(leave)
            tracked = stack.enter_context(tracked_run(name, experiment.name, run_folder.CHECKPOINTS, resume=resume))
            study.nest_under(tracked.run_id)
        settings = experiment.model_dump(mode="json", exclude={"ensemble"})
        tracked.log_params({key: str(value) for key, value in experiments.flatten(settings)})
        tracked.set_tags(run_folder.tags_of(prepared) | {"study": name, "device": experiment.training.device})
        yield tracked
