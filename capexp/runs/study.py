"""A study's run and its trials, which are nested under it: train and resume trials, and register the best one."""

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
_BUNDLE = "bundle"  # the artifact with the best captioner, for other machines


def comparable_settings(experiment: Experiment, data: Dataset) -> dict[str, str]:
    """Return the settings that must not change during a study, because the losses of its trials are compared."""
    search = experiment.tune.search
    ignored = {"training.device", "training.keep", *search}
    settings = {
        name: value
        for name, value in experiment.flat().items()
        if name not in ignored and name.split(".")[0] in ("name", "seed", "model", "training", "vocabulary")
    }
    # Optuna does not accept different choices, or a different kind of numbers, under the same name.
    kinds = {f"tune.search {name}": space.kind for name, space in search.items()}
    return settings | kinds | {"encoder": data.encoder.key(), "data digest": data.digest()[:16]}


@contextmanager
def study_run(plan: Plan, study: Study) -> Iterator[OpenRun]:
    """Open the run that a study's trials are nested under: the study's existing run, or a new one.

    If other processes are still running trials when this process ends, the run's status stays RUNNING.
    """
    prepare_store()

    def reopen() -> None:
        with suppress(Outage):
            if study.at_work():
                keep_open(study.parent_runs()[0])
                if not study.at_work():  # the last other process has ended in the meantime
                    end_run(study.parent_runs()[0])

    with ExitStack() as stack:
        with study.lock():  # if two processes begin the study at once, the second must find the first's run
            parents = study.parent_runs()
            # A run without tags was deleted.
            resume = parents[0] if parents and adopted_run() is None and run_tags(parents[0]) else None
            stack.callback(reopen)  # called after the run has ended
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
    """The study's name."""

    @property
    def folder(self) -> Path:
        """The folder that contains the folders of the trials."""
        return STUDIES / self.name

    def train(self, trial: PendingTrial) -> Generator[Update, None, Result]:
        """Train a trial; yield its epochs and return its result.

        If the trial was interrupted before and its folder is on this machine, continue from its last checkpoint. If
        workers on other machines share the study and this captioner is the best so far, log its bundle as an artifact.
        """
        parents = self.study.parent_runs()
        plan = Plan(
            replace_settings(self.experiment, trial.values), self.data, f"trial {trial.number}",
            tags={TRIAL: str(trial.number)}, parent=parents[0], folder=self.folder, registers=False,
        )  # fmt: skip
        try:
            result = yield from child(plan, self._interrupted_run(trial, parents))
        except Outage:
            raise
        except (InputError, torch.OutOfMemoryError):
            failed = find_nested(parents, TRIAL, str(trial.number))
            if failed is not None:  # a failed trial is never continued
                shutil.rmtree(self.folder / failed, ignore_errors=True)
            raise
        if self.study.is_shared and not result.is_pruned:
            best = self.study.best()
            assert result.best is not None
            if best is None or result.best.dev_loss < best.dev_loss:
                add_artifacts(result.run_id, result.bundle, _BUNDLE)
        return result

    def delete_ended(self) -> None:
        """Delete the folders of the trials that have ended, except the best trial's."""
        # List the ended trials first: one that becomes the best in between is then not among them.
        ended, best = self.study.ended_runs(), self.study.best()
        for run_id in ended - {best.run_id if best else ""}:
            shutil.rmtree(self.folder / run_id, ignore_errors=True)

    def end_lost(self) -> None:
        """End the runs that dead workers have left RUNNING, as FAILED."""
        for parent in self.study.parent_runs():
            end_nested(
                parent,
                TRIAL,
                lambda: {str(number) for number in self.study.at_work()},
                "its worker vanished; the trial was run again, or given up after three times",
            )

    def register_best(self, run: OpenRun, best: FinishedTrial) -> Version:
        """Register the best captioner under the study's run, and set the best values as tags of that run."""
        experiment = replace_settings(self.experiment, best.values)
        local = RunFolder(self.folder / best.run_id).best_bundle(experiment)
        bundle = local or fetch_artifacts(best.run_id, _BUNDLE)
        if bundle is None:
            raise InputError(
                f"trial {best.number} is the best, but its captioner is not in {self.folder / best.run_id}; "
                "give the same command where it was trained"
            )
        points = run.tracked.log_metrics({"best_dev_loss": best.dev_loss}, best.number, time.time_ns() // 1_000_000)
        tags = {f"best.{name}": str(value) for name, value in best.values.items()}
        run.tracked.set_tags({"best_trial": str(best.number), "best_run": best.run_id} | tags)
        version = register_bundle(run.with_experiment(experiment), bundle, points)
        values = ", ".join(f"{name} = {value}" for name, value in best.values.items())
        result = f"The best trial is {best.number}, with dev loss {best.dev_loss:.4f} nats per token and {values}."
        run.tracked.describe(describe_run(self.experiment, self.data, [result, describe_use(version.numbered_uri)]))
        return version

    def best_experiment(self, best: FinishedTrial, name: str) -> str:
        """Return the experiment with the best trial's values, as the text of a TOML file.

        Comments at its top say where the values come from.
        """
        experiment = replace_settings(self.experiment, {**best.values, "name": name})
        header = [
            f"Question:  how good is {self.experiment.name} with the best values that a study has found?",
            f"System:    {self.experiment.name} with " + ", ".join(f"{n} = {v}" for n, v in best.values.items()),
            f"Command:   python -m capexp.train --experiment {name}",
            f"Expected:  dev loss {best.dev_loss:.4f}, as trial {best.number} of the study (run {best.run_id})",
        ]
        return "".join(f"# {line}\n" for line in header) + "\n" + to_toml(experiment)

    def _interrupted_run(self, trial: PendingTrial, parents: list[str]) -> EarlierRun | None:
        """Return the interrupted run of the trial, if its folder is on this machine and no process is training it."""
        for number in trial.earlier:
            run_id = find_nested(parents, TRIAL, str(number))
            if run_id is not None and (self.folder / run_id).is_dir():
                if RunFolder(self.folder / run_id).is_locked():
                    return None
                return EarlierRun(run_id)
        return None
