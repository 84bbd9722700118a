"""The Optuna study: a search space as data, an objective that the caller gives, trials counted once."""

import logging
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, field_validator, model_validator

from capexp.data.errors import InputError
from capexp.training.fit import Epoch

log = logging.getLogger(__name__)

Value = int | float | str
Finite = Annotated[float, Field(allow_inf_nan=False)]
_FAILED_IN_A_ROW = 3  # failed trials after which the fault is not in the values drawn
RUN_ID = "run_id"
"""The attribute of a trial, and of the study, that names its MLflow run."""


class Range(BaseModel):
    """Numbers from ``low`` to ``high``, whole ones where both are whole."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    low: int | Finite
    high: int | Finite
    log: bool = False
    step: Annotated[int, Field(gt=0)] | Annotated[Finite, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _in_order(self) -> "Range":
        if self.low >= self.high:
            raise ValueError(f"tune.search: low = {self.low} is not below high = {self.high}")
        if isinstance(self.step, float) and isinstance(self.low, int) and isinstance(self.high, int):
            raise ValueError(f"tune.search: step = {self.step} between whole numbers; give a whole step")
        if self.log and (self.low <= 0 or self.step is not None):
            raise ValueError("tune.search: log = true needs low above 0, and takes no step")
        return self


class Choices(BaseModel):
    """One of some values."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    choices: tuple[Value, ...] = Field(min_length=2)

    @field_validator("choices", mode="before")
    @classmethod
    def _listed(cls, choices: object) -> object:
        """Strict validation takes a list of JSON for a tuple, but not one that a validator has passed on."""
        return tuple(choices) if isinstance(choices, list) else choices


def _kind(space: object) -> str:
    choices = "choices" in space if isinstance(space, Mapping) else isinstance(space, Choices)
    return "Choices" if choices else "Range"


Space = Annotated[Annotated[Range, Tag("Range")] | Annotated[Choices, Tag("Choices")], Discriminator(_kind)]
"""A range or choices; which, a key tells, so that a fault is told of that one alone."""


_DEFAULT: dict[str, Space] = {
    "model.embedding_size": Range(low=64, high=512, log=True),
    "model.lstm_units": Range(low=64, high=512, log=True),
    "model.dropout": Range(low=0.2, high=0.7),
}


class TuneConfig(BaseModel):
    """What a study searches, how, and for how long."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    trials: int = Field(default=20, ge=1)
    """Finished and pruned ones together."""
    sampler: Literal["tpe", "random"] = "tpe"
    pruner: Literal["median", "hyperband", "none"] = "median"
    search: Mapping[str, Space] = Field(default=_DEFAULT, min_length=1)
    """Setting by dotted name to range or choices."""

    @field_validator("search", mode="before")
    @classmethod
    def _dotted(cls, search: object) -> object:
        """TOML reads ``model.dropout = {...}`` as nested tables: back to dotted names."""
        if not isinstance(search, Mapping):
            return search
        flat: dict[str, object] = {}
        waiting = list(search.items())
        while waiting:
            name, value = waiting.pop(0)
            if isinstance(value, Mapping) and not {"low", "high", "choices"} & value.keys():
                waiting += [(f"{name}.{inner}", table) for inner, table in value.items()]
            else:
                flat[name] = value
        return flat


class Pruned(Exception):
    """Thrown into a trial that is not worth going on with."""


@dataclass(frozen=True)
class Trial:
    """A finished trial."""

    number: int
    run_id: str
    dev_loss: float
    values: dict[str, Value]


class Study:
    """A study on disk, one process at a time; opened again, it goes on where it stopped."""

    def __init__(self, folder: Path, name: str, config: TuneConfig, seed: int, comparable: str) -> None:
        """Opens or makes the study ``name``.

        ``comparable`` stands for all that makes losses comparable; a study is only continued under the same.

        Raises:
            InputError: the study is at work elsewhere, or was made for another experiment or other data.
        """
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{name}.journal"
        self._lock = FileLock(self.path.with_suffix(".lock"))
        try:
            self._lock.acquire(blocking=False)
        except Timeout:
            raise InputError(f"--study {name}: another process is at work on {self.path}; wait for it") from None
        self._config = config
        self._failed_in_a_row = 0
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        try:
            self._study = optuna.create_study(
                storage=JournalStorage(JournalFileBackend(str(self.path))), study_name=name, load_if_exists=True
            )
        except (ValueError, KeyError) as error:  # what a journal that is not one leads to
            self.close()
            raise InputError(f"{self.path}: damaged ({error}); move it away, or give another --study") from None
        held = self._study.user_attrs.get("comparable")
        if held not in (None, comparable):
            self.close()
            raise InputError(f"--study {name}: was made for another experiment or other data; give another name")
        self._study.set_user_attr("comparable", comparable)
        for stale in self._study.get_trials(states=[optuna.trial.TrialState.RUNNING]):
            log.warning("trial %d was broken off; it is not counted", stale.number)
            self._study.tell(stale.number, state=optuna.trial.TrialState.FAIL)
        # A continued study must not draw the numbers of its first part again.
        drawn = seed + len(self._study.trials)
        self._study.sampler = {
            "tpe": lambda: optuna.samplers.TPESampler(seed=drawn),
            "random": lambda: optuna.samplers.RandomSampler(seed=drawn),
        }[config.sampler]()
        self._study.pruner = {
            "median": lambda: optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=2),
            "hyperband": optuna.pruners.HyperbandPruner,
            "none": optuna.pruners.NopPruner,
        }[config.pruner]()

    @property
    def run_id(self) -> str | None:
        """The MLflow run of the study, once it has one."""
        held = self._study.user_attrs.get(RUN_ID)
        return None if held is None else str(held)

    @run_id.setter
    def run_id(self, run_id: str) -> None:
        self._study.set_user_attr(RUN_ID, run_id)

    def counted(self) -> int:
        """Trials that are finished or pruned."""
        from optuna.trial import TrialState

        return len(self._study.get_trials(deepcopy=False, states=[TrialState.COMPLETE, TrialState.PRUNED]))

    def best(self) -> Trial | None:
        """The finished trial of the lowest dev loss."""
        from optuna.trial import TrialState

        done = self._study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
        if not done:
            return None
        best = self._study.best_trial
        assert best.value is not None
        return Trial(best.number, best.user_attrs[RUN_ID], best.value, dict(best.params))

    def run_trial(self, objective: Callable[[dict[str, Value]], Generator[Epoch, None, Any]]) -> str:
        """Runs one trial, and returns what came of it in a line.

        The objective takes the values drawn and yields epochs; thrown ``Pruned``, it ends in order. What it
        returns has a ``run_id``. A fault of the values drawn (memory, a loss that is not finite) fails the
        trial and not the study.

        Raises:
            InputError: several trials in a row have failed, so the next would too.
        """
        from optuna.trial import TrialState

        trial = self._study.ask()
        values: dict[str, Value] = {}
        losses: list[float] = []
        epochs: Generator[Epoch, None, Any] | None = None
        state, note = TrialState.FAIL, "broken off"
        try:
            values = {name: _suggest(trial, name, space) for name, space in self._config.search.items()}
            epochs = objective(values)
            while True:
                epoch = next(epochs)
                losses.append(epoch.dev_loss)
                trial.report(epoch.dev_loss, epoch.number)
                if trial.should_prune():
                    epochs.throw(Pruned())
        except StopIteration as stop:
            trial.set_user_attr(RUN_ID, stop.value.run_id)
            pruned = stop.value.dev_loss_blind is None
            state = TrialState.PRUNED if pruned else TrialState.COMPLETE
            note = f"{'pruned, ' if pruned else ''}dev loss {min(losses):.4f}"
        except InputError as error:
            note = f"failed: {error}"
        finally:
            if epochs is not None:
                epochs.close()
            self._study.tell(trial, min(losses) if state == TrialState.COMPLETE else None, state=state)
        self._failed_in_a_row = self._failed_in_a_row + 1 if state == TrialState.FAIL else 0
        if self._failed_in_a_row == _FAILED_IN_A_ROW:
            raise InputError(f"{_FAILED_IN_A_ROW} trials in a row have failed, the last so: {note}")
        shown = ", ".join(
            f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}" for name, value in values.items()
        )
        return f"trial {trial.number}: {shown}: {note}"

    def close(self) -> None:
        """Leaves the study to other processes."""
        self._lock.release()


def _suggest(trial: Any, name: str, space: Range | Choices) -> Value:
    value: Value
    if isinstance(space, Choices):
        value = trial.suggest_categorical(name, list(space.choices))
    elif isinstance(space.low, int) and isinstance(space.high, int):
        value = trial.suggest_int(name, space.low, space.high, log=space.log, step=int(space.step or 1))
    else:
        value = trial.suggest_float(name, space.low, space.high, log=space.log, step=space.step)
    return value
