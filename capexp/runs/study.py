"""A study: its run, and its trials nested under it, gone on with, cleaned up, the best one registered."""

import shutil
import time
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from capexp.data.dataset import Dataset
from capexp.errors import InputError, Outage
from capexp.experiment import replace_settings, to_toml
from capexp.report.model_card import describe_run, describe_use
from capexp.runs.folder import STUDIES, STUDY, RunFolder
from capexp.runs.lifecycle import OpenRun, Plan, opened
from capexp.runs.registration import register_bundle
from capexp.runs.run import EarlierRun, Result, child
from capexp.search.study import Study
from capexp.search.trial import FinishedTrial, PendingTrial
from capexp.settings import Experiment, flatten
from capexp.tracking.known_runs import (
    add_artifacts,
    adopted_run,
    end_nested,
    end_run,
    fetch_artifacts,
    find_nested,
    keep_open,
    run_tags,
)
from capexp.tracking.registry import Version
from capexp.tracking.store import prepare_store
from capexp.training.loop import Update

TRIAL = "trial"
"""The tag of a nested run that holds its trial's number."""
_BUNDLE = "bundle"  # the artifact by which another machine finds the best captioner


def comparable_settings(experiment: Experiment, data: Dataset) -> dict[str, str]:
    """Return the settings that must stay equal while a study goes on, because losses of trials are compared."""
    space = experiment.tune.search
    free = {"training.device", "training.keep", *space}
    settings = {
        name: value
        for name, value in experiment.flat().items()
        if name not in free and name.split(".")[0] in ("name", "seed", "model", "training", "vocabulary")
    }
    # Optuna cannot go on with other choices, or another kind of numbers, under the same name.
    kinds = {f"tune.search {name}": drawn.kind for name, drawn in space.items()}
    return settings | kinds | {"encoder": data.encoder.key(), "data digest": data.digest()[:16]}


@contextmanager
def study_run(plan: Plan, study: Study) -> Iterator[OpenRun]:
    """Open the run that a study's trials are nested under: the one it had, or a new one.

    While other processes are at work on the study it stays open, however this process leaves it.
    """
    prepare_store()

    def leave() -> None:
        with suppress(Outage):
            if study.at_work():
                keep_open(study.parent_runs()[0])
                if not study.at_work():  # the last of the others has ended meanwhile
                    end_run(study.parent_runs()[0])

    with ExitStack() as stack:
        with study.lock():  # of two that begin the study at once, the second must find the first's run
            earlier = study.parent_runs()
            resume = earlier[0] if earlier and adopted_run() is None and run_tags(earlier[0]) else None
            stack.callback(leave)
            run = stack.enter_context(opened(plan, resume))
            study.nest_under(run.run_id)
        tune = flatten({"tune": plan.experiment.tune.model_dump(mode="json")})
        run.tracked.log_params({name: str(value) for name, value in tune.items()})
        yield run


def study_plan(experiment: Experiment, data: Dataset, name: str, promote: bool) -> Plan:
    """Return the plan of a study's run."""
    return Plan(experiment, data, name, tags={STUDY: name}, promote=promote, is_shared=True)


@dataclass(frozen=True)
class Trials:
    """The trials of a study, as one process runs them."""

    experiment: Experiment
    data: Dataset
    study: Study
    name: str
    """Of the study."""

    @property
    def folder(self) -> Path:
        """Where the trials have their folders."""
        return STUDIES / self.name

    def train(self, trial: PendingTrial) -> Generator[Update, None, Result]:
        """Train one, from its last checkpoint where it was broken off and that is reachable.

        Where other machines are at work too, the best captioner so far is put among its run's artifacts.
        """
        parents = self.study.parent_runs()
        plan = Plan(
            replace_settings(self.experiment, trial.values), self.data, f"trial {trial.number}",
            tags={TRIAL: str(trial.number)}, parent=parents[0], folder=self.folder, registers=False,
        )  # fmt: skip
        try:
            result = yield from child(plan, self._broken_off(trial, parents))
        except Outage:
            raise
        except (InputError, torch.OutOfMemoryError):
            failed = find_nested(parents, TRIAL, str(trial.number))
            if failed is not None:
                shutil.rmtree(self.folder / failed, ignore_errors=True)
            raise
        if self.study.is_shared and not result.is_pruned:
            best = self.study.best()
            assert result.best is not None
            if best is None or result.best.dev_loss < best.dev_loss:
                add_artifacts(result.run_id, result.bundle, _BUNDLE)
        return result

    def delete_ended(self) -> None:
        """Delete the folders of the trials that have ended, but for the best one."""
        ended, best = self.study.ended_runs(), self.study.best()  # in this order: a new best one is not among the ended
        for run_id in ended - {best.run_id if best else ""}:
            shutil.rmtree(self.folder / run_id, ignore_errors=True)

    def end_lost(self) -> None:
        """End FAILED the runs that vanished workers have left running."""
        for parent in self.study.parent_runs():
            end_nested(
                parent,
                TRIAL,
                lambda: {str(number) for number in self.study.at_work()},
                "its worker vanished; the trial was run again, or given up after three times",
            )

    def register_best(self, run: OpenRun, best: FinishedTrial) -> Version:
        """Register the best captioner under the study's run, whose tags tell the best values."""
        experiment = replace_settings(self.experiment, best.values)
        local = RunFolder(self.folder / best.run_id).best_bundle(experiment)
        bundle = local or fetch_artifacts(best.run_id, _BUNDLE)
        if bundle is None:
            raise InputError(
                f"trial {best.number} is the best, but its captioner is not in {self.folder / best.run_id}; "
                "give the same command where it was trained"
            )
        run.tracked.log_metrics({"best_dev_loss": best.dev_loss}, best.number, time.time_ns() // 1_000_000)
        tags = {f"best.{name}": str(value) for name, value in best.values.items()}
        run.tracked.set_tags({"best_trial": str(best.number), "best_run": best.run_id} | tags)
        version = register_bundle(run.with_experiment(experiment), bundle)
        values = ", ".join(f"{name} = {value}" for name, value in best.values.items())
        result = f"The best trial is {best.number}, with dev loss {best.dev_loss:.4f} nats per token and {values}."
        run.tracked.describe(describe_run(self.experiment, self.data, [result, describe_use(version.numbered_uri)]))
        return version

    def best_experiment(self, best: FinishedTrial, name: str) -> str:
        """Return the experiment with the best trial's values as a TOML file, whose head tells where they are from."""
        experiment = replace_settings(self.experiment, {**best.values, "name": name})
        head = [
            f"Question:  how good is {self.experiment.name} with the best values that a study has found?",
            f"System:    {self.experiment.name} with " + ", ".join(f"{n} = {v}" for n, v in best.values.items()),
            f"Command:   python -m capexp.train --experiment {name}",
            f"Expected:  dev loss {best.dev_loss:.4f}, as trial {best.number} of the study (run {best.run_id})",
        ]
        return "".join(f"# {line}\n" for line in head) + "\n" + to_toml(experiment)

    def _broken_off(self, trial: PendingTrial, parents: list[str]) -> EarlierRun | None:
        """Return the run in which the trial was begun before, if its folder is here and nobody is training it."""
        for number in trial.earlier:
            run_id = find_nested(parents, TRIAL, str(number))
            if run_id is not None and (self.folder / run_id).is_dir():
                if RunFolder(self.folder / run_id).is_locked():
                    return None
                return EarlierRun(run_id)
        return None
