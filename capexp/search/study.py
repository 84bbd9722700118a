"""The study: its trials are sampled, run, pruned and counted exactly once, by any number of workers at a time.

A worker starts a trial, and requeues the trials of dead workers, only while it holds the study's lock
(``StudyStorage.lock``). So no two workers sample the same values, and no more trials are started than are still needed.
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
from capexp.experiment import text_before
from capexp.search.storage import StudyStorage
from capexp.search.trial import FinishedTrial, PendingTrial, Pruned, StudyProgress, describe_values
from capexp.settings import Choices, Space, TuneConfig, Value
from capexp.training.loop import Update

log = logging.getLogger(__name__)

_FAILED_IN_A_ROW = 3  # after so many failed trials the cause is not the sampled values
_RETRIES = 2  # how often a trial is run again after its worker has died

# User attributes of the Optuna study.
_PARENTS, _COMPARABLE = "parent_run_ids", "comparable"
# User attributes of a trial.
_RUN = "run_id"  # the id of the trial's MLflow run, set when the trial ends
_BEGUN = "begun"  # set once the trial has a heartbeat
_ERROR = "error"  # why the trial failed; a failed trial without this attribute is run again
_STOPPED = "stopped"  # set if an interrupt or an outage ended the trial, not the death of its worker
_EARLIER = "earlier"  # the numbers of the interrupted trials with the same values, the latest first
_VANISHED = "vanished"  # how many of the earlier trials ended because their worker died


TrainTrial = Callable[[PendingTrial], Generator[Update, None, Any]]
"""A generator that trains a trial and yields its epochs. When ``Pruned`` is thrown into it, it ends the training in an
orderly way. Its result has ``run_id`` and ``is_pruned``."""


class Study:
    """A study as one process sees it. Opening a study that exists continues it."""

    def __init__(
        self, storage: StudyStorage, name: str, config: TuneConfig, seed: int, epochs: int, comparable: dict[str, str]
    ) -> None:
        """Open the study ``name``, or create it.

        ``epochs`` is the largest number of epochs of a trial. ``comparable`` holds all settings that must be equal for
        dev losses to be comparable; InputError is raised if the study was created with different ones. Raises Outage if
        the storage cannot be used.
        """
        import optuna

        self._storage, self._config, self._seed = storage, config, seed
        self._failed_in_a_row = 0
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        optuna_storage = storage.open()
        with self.lock(), storage.faults():
            study = _find_study(optuna_storage, name)
            if study is None:
                study = optuna.create_study(storage=optuna_storage, study_name=name)
            _check_comparable(study, name, comparable)
            self._study = study
            if _COMPARABLE not in study.user_attrs:
                self._name_metric()
                study.set_user_attr(_COMPARABLE, comparable)
        self._study.pruner = {
            "median": lambda: optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=2),
            "hyperband": lambda: optuna.pruners.HyperbandPruner(min_resource=1, max_resource=epochs),
            "none": optuna.pruners.NopPruner,
        }[config.pruner]()

    @property
    def optuna(self) -> Any:
        """The Optuna study."""
        return self._study

    def parent_runs(self) -> list[str]:
        """Return the ids of the MLflow runs under which the trials are nested; the current one comes first."""
        with self._storage.faults():
            return list(self._study.user_attrs.get(_PARENTS, ()))

    def nest_under(self, run_id: str) -> None:
        """Make an MLflow run the current parent of new trials. Only call it while holding the lock."""
        with self._storage.faults():
            self._study.set_user_attr(
                _PARENTS, [run_id, *(parent for parent in self.parent_runs() if parent != run_id)]
            )

    @property
    def is_shared(self) -> bool:
        """Whether workers on other machines may run trials of the study."""
        return self._storage.is_shared

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the study's lock, which excludes all its other processes. Do not run a trial or lock again inside."""
        with ExitStack() as stack:
            with self._storage.faults():
                stack.enter_context(self._storage.lock())
            yield

    def progress(self) -> StudyProgress:
        """Return the progress of the study, with an estimate of the remaining time."""
        trials = self._trials()
        running, ended = trials["RUNNING"], trials["COMPLETE"] + trials["PRUNED"]
        seconds_left = None
        # Estimate the time left: the remaining work, shared by as many workers as there are running trials.
        if ended:
            mean = statistics.mean(max(0.0, trial.duration.total_seconds()) for trial in ended)
            now = datetime.datetime.now()  # local time, as Optuna records it
            ages = [(now - trial.datetime_start).total_seconds() for trial in running]
            to_start = max(0, self._config.trials - len(ended) - len(running))
            work = to_start * mean + sum(max(0.0, mean - age) for age in ages)
            seconds_left = work / max(1, len(running))
        return StudyProgress(
            self._config.trials,
            len(trials["COMPLETE"]),
            len(trials["PRUNED"]),
            sum(_ERROR in trial.user_attrs for trial in trials["FAIL"]),
            len(running),
            self.best(),
            seconds_left,
        )

    def is_complete(self) -> bool:
        """Return whether the wanted number of trials are finished or pruned."""
        trials = self._trials()
        return len(trials["COMPLETE"]) + len(trials["PRUNED"]) >= self._config.trials

    def best(self) -> FinishedTrial | None:
        """Return the finished trial with the lowest dev loss; None if there is no finished trial."""
        finished = self._trials()["COMPLETE"]
        if not finished:
            return None
        best = min(finished, key=lambda trial: (trial.value, trial.number))
        return FinishedTrial(best.number, best.user_attrs[_RUN], best.value, dict(best.params))

    def at_work(self) -> set[int]:
        """Return the numbers of the running trials, and of the interrupted trials that they continue."""
        running = self._trials()["RUNNING"]
        return {number for trial in running for number in (trial.number, *trial.user_attrs.get(_EARLIER, ()))}

    def ended_runs(self) -> set[str]:
        """Return the ids of the MLflow runs of finished and pruned trials, which are never continued."""
        trials = self._trials()
        return {trial.user_attrs[_RUN] for trial in trials["COMPLETE"] + trials["PRUNED"]}

    def run_trial(self, train: TrainTrial) -> Generator[None, None, str | None]:
        """Run one trial; yield after each epoch, and return its outcome in one line.

        Return None if no trial is needed now: enough are done, or will be once the running ones are. An error caused by
        the sampled values (out of memory, a loss that is not finite) fails the trial but not the study; only several
        failed trials in a row raise an InputError, because the next would fail too. If the generator is closed or
        interrupted, the trial will be run again. Raises Outage if the storage or the tracking server is unreachable;
        then, too, the trial will be run again.
        """
        from optuna.exceptions import UpdateFinishedTrialError
        from optuna.trial import TrialState

        with ExitStack() as life:
            started = self._start_trial(life)
            if started is None:
                return None
            trial, pending = started
            # Train; report the dev loss of each epoch, and prune if Optuna says so.
            losses: list[float] = []
            updates = train(pending)
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
            # The outcome: finished or pruned, lost to another worker, to be run again, or failed.
            except StopIteration as stop:
                pruned = stop.value.is_pruned
                state = TrialState.PRUNED if pruned else TrialState.COMPLETE
                note = f"{'pruned, ' if pruned else ''}dev loss {min(losses):.4f}"
                attributes = {_RUN: stop.value.run_id}
            except UpdateFinishedTrialError:
                pass  # another worker has failed it as lost; see is_lost
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
                is_lost = self._end_trial(trial, value, state, attributes)
            if is_lost:
                return f"trial {pending.number}: was taken for lost, and is run elsewhere; this worker gives it up"
        # Stop the study if failures do not depend on the sampled values.
        self._failed_in_a_row = self._failed_in_a_row + 1 if state == TrialState.FAIL else 0
        if self._failed_in_a_row == _FAILED_IN_A_ROW:
            raise InputError(f"{_FAILED_IN_A_ROW} trials in a row have failed, the last so: {note}")
        return f"trial {pending.number}: {describe_values(pending.values)}: {note}"

    def _name_metric(self) -> None:
        """Name the metric for Optuna's own tools, such as its dashboard."""
        import optuna

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            self._study.set_metric_names(["dev loss"])

    def _start_trial(self, life: ExitStack) -> tuple[Any, PendingTrial] | None:
        """Sample the values of the next trial and start its heartbeat, which ends with ``life``.

        Return Optuna's trial and ours, or None if no trial is needed now.
        """
        from optuna.trial import TrialState

        with self.lock(), self._storage.faults(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="optuna")
            # Fail the trials of dead workers, and queue the interrupted ones again.
            self._storage.fail_lost(self._study)
            for trial in self._trials()["RUNNING"]:
                if _BEGUN not in trial.user_attrs:  # only the lock holder samples: its worker died while sampling
                    self._study.tell(trial.number, state=TrialState.FAIL)
            self._requeue_interrupted()
            # Sample the next trial.
            trials = self._trials()
            if sum(len(trials[state]) for state in ("COMPLETE", "PRUNED", "RUNNING")) >= self._config.trials:
                return None
            self._study.sampler = self._sampler(self._count_sampled(trials))
            trial = self._study.ask()
            life.enter_context(self._storage.heartbeat(trial.number))
            trial.set_user_attr(_BEGUN, True)
            values = {name: _suggest(trial, name, space) for name, space in self._config.search.items()}
            return trial, PendingTrial(trial.number, values, tuple(trial.user_attrs.get(_EARLIER, ())))

    def _requeue_interrupted(self) -> None:
        """Queue the values of interrupted trials again. If this is killed half-way, the next worker does the rest."""
        trials = self._trials()
        continued = {trial.user_attrs.get(_EARLIER, [None])[0] for state in trials.values() for trial in state}
        for trial in trials["FAIL"]:
            attributes = trial.user_attrs
            values = _values_of(trial)
            if _ERROR in attributes or trial.number in continued or not values.keys() >= self._config.search.keys():
                continue
            # A worker that had finished the trial's run, but not yet told the study, was not killed by the trial.
            vanished = attributes.get(_VANISHED, 0) + (not {_STOPPED, _RUN} & attributes.keys())
            if vanished <= _RETRIES:
                log.info("trial %d was broken off; it is run again", trial.number)
                earlier = [trial.number, *attributes.get(_EARLIER, ())]
                self._study.enqueue_trial(values, user_attrs={_EARLIER: earlier, _VANISHED: vanished})

    def _end_trial(self, trial: Any, value: float | None, state: Any, attributes: dict[str, object]) -> bool:
        """Report the end of a trial; return whether another worker has meanwhile failed it as lost."""
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

    def _count_sampled(self, trials: dict[str, list[Any]]) -> int:
        """Return how often all values were sampled, so that a kill changes nothing that is sampled after it.

        Trials that run the values of interrupted ones again do not count, nor those whose worker died while sampling.
        """
        every = [trial for of_state in trials.values() for trial in of_state if _EARLIER not in trial.user_attrs]
        return sum(_values_of(trial).keys() >= self._config.search.keys() for trial in every)

    def _sampler(self, number: int) -> Any:
        """Return the sampler after ``number`` samples; its seed depends on that, so that no two trials sample alike."""
        import optuna

        seed = int(np.random.SeedSequence([self._seed, number]).generate_state(1)[0])
        kind = {"tpe": optuna.samplers.TPESampler, "random": optuna.samplers.RandomSampler}[self._config.sampler]
        return kind(seed=seed)

    def _trials(self) -> dict[str, list[Any]]:
        """Return all trials, keyed by the names of their states."""
        from optuna.trial import TrialState

        by_state: dict[str, list[Any]] = {state.name: [] for state in TrialState}
        with self._storage.faults():
            for trial in self._study.get_trials(deepcopy=False):
                by_state[trial.state.name].append(trial)
        return by_state


def _values_of(trial: Any) -> dict[str, Any]:
    """Return the values of a trial that was sampled or queued with values."""
    return {**trial.system_attrs.get("fixed_params", {}), **trial.params}


def _suggest(trial: Any, name: str, space: Space) -> Value:
    """Have Optuna sample a value of a setting for a trial."""
    value: Value
    if isinstance(space, Choices):
        value = trial.suggest_categorical(name, list(space.choices))
    elif space.is_whole:
        value = trial.suggest_int(name, space.low, space.high, log=space.log, step=int(space.step or 1))
    else:
        value = trial.suggest_float(name, space.low, space.high, log=space.log, step=space.step)
    return value


def require_comparable(storage: StudyStorage, name: str, comparable: dict[str, str]) -> None:
    """Raise InputError if a study was created for a different experiment or different data, before anything is written.

    The error names the first setting that differs. Raises Outage if the storage cannot be reached.
    """
    if storage.exists():
        optuna_storage = storage.open()
        with storage.faults():
            study = _find_study(optuna_storage, name)
            if study is not None:
                _check_comparable(study, name, comparable)


def _find_study(optuna_storage: Any, name: str) -> Any:
    """Return the Optuna study of that name, or None."""
    import optuna

    try:
        return optuna.load_study(study_name=name, storage=optuna_storage)
    except KeyError:
        return None


def _check_comparable(study: Any, name: str, comparable: dict[str, str]) -> None:
    before = study.user_attrs.get(_COMPARABLE)
    if before is None and not study.get_trials(deepcopy=False):
        return  # its creator was killed before it could store the settings
    if not isinstance(before, dict):
        raise InputError(f"--study {name}: is not a study of this program, or of an older one; give another name")
    for setting in dict.fromkeys([*comparable, *before]):
        # A setting that was added to the project since then counts as having had its default.
        default = text_before(setting) or "not set"
        old, new = before.get(setting, default), comparable.get(setting, default)
        if old != new:
            raise InputError(
                f"--study {name}: was made for another experiment or other data: {setting} was {old}, now it is {new}; "
                "give another --study, or the old setting"
            )
