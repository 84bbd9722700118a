"""The study: trials drawn, run, pruned and counted once, by any number of workers at a time.

A worker takes a trial, and looks after those of vanished workers, only while it is alone (``Storage.alone``). So
no two draw the same, and no more trials are begun than are still wanted.
"""

import datetime
import logging
import statistics
import warnings
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch

from capexp.errors import InputError, Outage
from capexp.search.storage import Storage
from capexp.search.trial import FinishedTrial, PendingTrial, Pruned, StudyProgress, shown_values
from capexp.settings import Choices, Space, TuneConfig, Value
from capexp.training.loop import Update

log = logging.getLogger(__name__)

_FAILED_IN_A_ROW = 3  # failed trials after which the fault is not in the values drawn
_RUN_AGAIN = 2  # times that the trial of a vanished worker is run again

# Attributes that Optuna keeps with the study,
_PARENTS, _COMPARABLE = "parent_run_ids", "comparable"
# and with a trial.
_RUN = "run_id"  # once it has ended
_BEGUN = "begun"  # set once a trial shows signs of life
_ERROR = "error"  # why it failed; a failed trial without one is run again
_STOPPED = "stopped"  # by an interrupt or an outage, not by its worker's death
_EARLIER = "earlier"  # the numbers under which it was run before
_VANISHED = "vanished"  # how many of these vanished with their workers


TrainTrial = Callable[[PendingTrial], Generator[Update, None, Any]]
"""Trains a trial and yields its epochs; thrown ``Pruned``, it ends in order. Its result has ``run_id`` and
``is_pruned``."""


class Study:
    """A study in a storage, opened by one process; opened again, it goes on where it stopped."""

    def __init__(
        self, storage: Storage, name: str, config: TuneConfig, seed: int, epochs: int, comparable: dict[str, str]
    ) -> None:
        """Opens or makes the study ``name``, whose trials have ``epochs`` at most.

        ``comparable`` is all that must be equal for losses to compare; a study only goes on under the same.

        Raises:
            InputError: it was made for another experiment or other data.
            Outage: the storage cannot be used.
        """
        import optuna

        self._storage, self._config, self._seed = storage, config, seed
        self._failed_in_a_row = 0
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        kept = storage.open()
        with self.alone(), storage.faults():
            held = _held(kept, name)
            if held is None:
                held = optuna.create_study(storage=kept, study_name=name)
            _refuse_other(held, name, comparable)
            self._study = held
            if _COMPARABLE not in held.user_attrs:
                self._name_metric()
                held.set_user_attr(_COMPARABLE, comparable)
        self._study.pruner = {
            "median": lambda: optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=2),
            "hyperband": lambda: optuna.pruners.HyperbandPruner(min_resource=1, max_resource=epochs),
            "none": optuna.pruners.NopPruner,
        }[config.pruner]()

    @property
    def optuna(self) -> Any:
        """Optuna's study."""
        return self._study

    def parent_runs(self) -> list[str]:
        """The MLflow runs that its trials are nested under; the present one first."""
        with self._storage.faults():
            return list(self._study.user_attrs.get(_PARENTS, ()))

    def nest_under(self, run_id: str) -> None:
        """Makes an MLflow run the present one. Only to be called ``alone``."""
        with self._storage.faults():
            self._study.set_user_attr(_PARENTS, [run_id, *(held for held in self.parent_runs() if held != run_id)])

    @property
    def is_shared(self) -> bool:
        """Whether other machines may be at work on it."""
        return self._storage.is_shared

    @contextmanager
    def alone(self) -> Iterator[None]:
        """No other process of the study is in such a context; in it, begin no trial and enter no other one."""
        with ExitStack() as stack:
            with self._storage.faults():
                stack.enter_context(self._storage.alone())
            yield

    def progress(self) -> StudyProgress:
        """How far it is."""
        trials = self._trials()
        running, ended = trials["RUNNING"], trials["COMPLETE"] + trials["PRUNED"]
        left = None
        if ended:
            mean = statistics.mean(max(0.0, trial.duration.total_seconds()) for trial in ended)
            now = datetime.datetime.now()  # as Optuna, which writes down local time
            ages = [(now - trial.datetime_start).total_seconds() for trial in running]
            to_begin = max(0, self._config.trials - len(ended) - len(running))
            work = to_begin * mean + sum(max(0.0, mean - age) for age in ages)
            left = work / max(1, len(running))
        return StudyProgress(
            self._config.trials,
            len(trials["COMPLETE"]),
            len(trials["PRUNED"]),
            sum(_ERROR in trial.user_attrs for trial in trials["FAIL"]),
            len(running),
            self.best(),
            left,
        )

    def is_complete(self) -> bool:
        """Whether as many trials as wanted are finished or pruned."""
        trials = self._trials()
        return len(trials["COMPLETE"]) + len(trials["PRUNED"]) >= self._config.trials

    def best(self) -> FinishedTrial | None:
        """The finished trial of the lowest dev loss."""
        done = self._trials()["COMPLETE"]
        if not done:
            return None
        best = min(done, key=lambda trial: (trial.value, trial.number))
        return FinishedTrial(best.number, best.user_attrs[_RUN], best.value, dict(best.params))

    def at_work(self) -> set[int]:
        """The numbers of the running trials, and those that they were run under before."""
        running = self._trials()["RUNNING"]
        return {number for trial in running for number in (trial.number, *trial.user_attrs.get(_EARLIER, ()))}

    def ended_runs(self) -> set[str]:
        """The MLflow runs of trials that will not be gone on with."""
        trials = self._trials()
        return {trial.user_attrs[_RUN] for trial in trials["COMPLETE"] + trials["PRUNED"]}

    def run_trial(self, train: TrainTrial) -> Generator[None, None, str | None]:
        """Runs one trial; yields after each epoch, and returns what came of it in a line.

        Returns None where no trial is to be begun now: enough are done, or will be if those at work end well. A
        fault of the values drawn (memory, a loss that is not finite) fails the trial and not the study. Closed or
        interrupted, it leaves the trial to be run again.

        Raises:
            InputError: several trials in a row have failed, so the next would too.
            Outage: storage or tracking server are away; the trial is to be run again.
        """
        from optuna.exceptions import UpdateFinishedTrialError
        from optuna.trial import TrialState

        with ExitStack() as life:
            begun = self._begin(life)
            if begun is None:
                return None
            trial, attempt = begun
            losses: list[float] = []
            updates = train(attempt)
            state, note = TrialState.FAIL, ""
            attributes: dict[str, object] = {}
            try:
                while True:
                    epoch = next(updates).epoch
                    losses.append(epoch.dev_loss)
                    with self._storage.faults():
                        trial.report(epoch.dev_loss, epoch.number)
                        prune = trial.should_prune()
                    if prune:
                        updates.throw(Pruned())
                    yield
            except StopIteration as stop:
                pruned = stop.value.is_pruned
                state = TrialState.PRUNED if pruned else TrialState.COMPLETE
                note = f"{'pruned, ' if pruned else ''}dev loss {min(losses):.4f}"
                attributes = {_RUN: stop.value.run_id}
            except UpdateFinishedTrialError:
                pass  # told of below
            except Outage:
                attributes = {_STOPPED: True}
                raise
            except (InputError, torch.OutOfMemoryError) as error:
                note = f"failed: {error}"
                attributes = {_ERROR: str(error)}
            except (KeyboardInterrupt, GeneratorExit):
                attributes = {_STOPPED: True}
                raise
            finally:
                updates.close()
                value = min(losses) if state == TrialState.COMPLETE else None
                taken = self._end(trial, value, state, attributes)
            if taken:
                return f"trial {attempt.number}: was taken for lost, and is run elsewhere; given up here"
        self._failed_in_a_row = self._failed_in_a_row + 1 if state == TrialState.FAIL else 0
        if self._failed_in_a_row == _FAILED_IN_A_ROW:
            raise InputError(f"{_FAILED_IN_A_ROW} trials in a row have failed, the last so: {note}")
        return f"trial {attempt.number}: {shown_values(attempt.values)}: {note}"

    def _name_metric(self) -> None:
        """For Optuna's own tools, such as its dashboard."""
        import optuna

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            self._study.set_metric_names(["dev loss"])

    def _begin(self, life: ExitStack) -> tuple[Any, PendingTrial] | None:
        """Draws the next trial, whose signs of life end with ``life``; None where none is wanted now."""
        from optuna.trial import TrialState

        with self.alone(), self._storage.faults(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="optuna")
            self._storage.fail_lost(self._study)
            for trial in self._trials()["RUNNING"]:
                if _BEGUN not in trial.user_attrs:  # nobody else is drawing now: its worker died while it did
                    self._study.tell(trial.number, state=TrialState.FAIL)
            self._queue_again()
            trials = self._trials()
            if sum(len(trials[state]) for state in ("COMPLETE", "PRUNED", "RUNNING")) >= self._config.trials:
                return None
            self._study.sampler = self._sampler(sum(map(len, trials.values())))
            trial = self._study.ask()
            life.enter_context(self._storage.alive(trial.number))
            trial.set_user_attr(_BEGUN, True)
            values = {name: _draw(trial, name, space) for name, space in self._config.search.items()}
            return trial, PendingTrial(trial.number, values, tuple(trial.user_attrs.get(_EARLIER, ())))

    def _queue_again(self) -> None:
        """Queues the values of trials that were broken off; whoever is killed here leaves it to the next."""
        trials = self._trials()
        gone_on_with = {trial.user_attrs.get(_EARLIER, [None])[0] for state in trials.values() for trial in state}
        for trial in trials["FAIL"]:
            held = trial.user_attrs
            values = {**trial.system_attrs.get("fixed_params", {}), **trial.params}
            if _ERROR in held or trial.number in gone_on_with or not values:
                continue
            vanished = held.get(_VANISHED, 0) + (_STOPPED not in held)
            if vanished <= _RUN_AGAIN:
                log.info("trial %d was broken off; it is run again", trial.number)
                earlier = [trial.number, *held.get(_EARLIER, ())]
                self._study.enqueue_trial(values, user_attrs={_EARLIER: earlier, _VANISHED: vanished})

    def _end(self, trial: Any, value: float | None, state: Any, attributes: dict[str, object]) -> bool:
        """Tells what came of a trial; returns whether it was taken away meanwhile, as one that is lost."""
        from optuna.exceptions import UpdateFinishedTrialError

        with self._storage.faults():
            try:
                for name, attribute in attributes.items():
                    trial.set_user_attr(name, attribute)
                self._study.tell(trial, value, state=state)
            except (UpdateFinishedTrialError, ValueError):
                if trial.number in self.at_work():
                    raise
                return True
        return False

    def _sampler(self, number: int) -> Any:
        """A sampler for the trial of that number: its seed follows from the number, so that no two draw the same."""
        import optuna

        seed = int(np.random.SeedSequence([self._seed, number]).generate_state(1)[0])
        kind = {"tpe": optuna.samplers.TPESampler, "random": optuna.samplers.RandomSampler}[self._config.sampler]
        return kind(seed=seed)

    def _trials(self) -> dict[str, list[Any]]:
        """All trials by the names of their states."""
        from optuna.trial import TrialState

        found: dict[str, list[Any]] = {state.name: [] for state in TrialState}
        with self._storage.faults():
            for trial in self._study.get_trials(deepcopy=False):
                found[trial.state.name].append(trial)
        return found


def _draw(trial: Any, name: str, space: Space) -> Value:
    """Have Optuna draw a value for a trial."""
    drawn: Value
    if isinstance(space, Choices):
        drawn = trial.suggest_categorical(name, list(space.choices))
    elif space.is_whole:
        drawn = trial.suggest_int(name, space.low, space.high, log=space.log, step=int(space.step or 1))
    else:
        drawn = trial.suggest_float(name, space.low, space.high, log=space.log, step=space.step)
    return drawn


def refuse_other(storage: Storage, name: str, comparable: dict[str, str]) -> None:
    """Refuses a study that was made for another experiment or other data, before anything is made.

    Raises:
        InputError: naming the first setting that differs.
        Outage: the storage cannot be reached.
    """
    if storage.exists():
        kept = storage.open()
        with storage.faults():
            held = _held(kept, name)
            if held is not None:
                _refuse_other(held, name, comparable)


def _held(kept: Any, name: str) -> Any:
    """The study of that name, or None."""
    import optuna

    try:
        return optuna.load_study(study_name=name, storage=kept)
    except KeyError:
        return None


def _refuse_other(held: Any, name: str, comparable: dict[str, str]) -> None:
    before = held.user_attrs.get(_COMPARABLE)
    if before is None and not held.get_trials(deepcopy=False):
        return  # who made it was killed on the spot
    if not isinstance(before, dict):
        raise InputError(f"--study {name}: is not a study of this program, or of an older one; give another name")
    for setting in dict.fromkeys([*comparable, *before]):
        old, new = before.get(setting, "not set"), comparable.get(setting, "not set")
        if old != new:
            raise InputError(
                f"--study {name}: was made for another experiment or other data: {setting} was {old}, now it is {new}; "
                "give another --study, or the old setting"
            )
