"""The search space as data: which settings a study draws, from what, and how."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, field_validator, model_validator

if TYPE_CHECKING:
    import optuna

Value = int | float | str
Finite = Annotated[float, Field(allow_inf_nan=False)]
Whole = Annotated[int, Field(ge=-(2**53), le=2**53)]
_MOST_STEPS = 1_000_000


class Range(BaseModel):
    """Numbers from ``low`` to ``high``, whole ones where both are whole."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    low: Whole | Finite
    high: Whole | Finite
    log: bool = False
    step: Annotated[Whole, Field(gt=0)] | Annotated[Finite, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _in_order(self) -> "Range":
        if self.low >= self.high:
            raise ValueError(f"tune.search: low = {self.low} is not below high = {self.high}")
        if isinstance(self.step, float) and isinstance(self.low, int) and isinstance(self.high, int):
            raise ValueError(f"tune.search: step = {self.step} between whole numbers; give a whole step")
        if self.log and (self.low <= 0 or self.step is not None):
            raise ValueError("tune.search: log = true needs low above 0, and takes no step")
        if self.step is not None and not 1 <= (self.high - self.low) / self.step <= _MOST_STEPS:
            span = f"from {self.low} to {self.high}"
            raise ValueError(f"tune.search: step = {self.step} {span}; give one of 1 to {_MOST_STEPS:,} steps")
        return self

    @property
    def is_whole(self) -> bool:
        """Whether whole numbers are drawn."""
        return isinstance(self.low, int) and isinstance(self.high, int)

    @property
    def kind(self) -> str:
        """What must stay as it is while a study goes on; low, high and step may change."""
        return f"{'whole' if self.is_whole else 'real'} numbers{' by logarithm' if self.log else ''}"

    def draw(self, trial: "optuna.Trial", name: str) -> Value:
        """A number drawn for a trial."""
        if self.is_whole:
            whole: int = trial.suggest_int(name, self.low, self.high, log=self.log, step=int(self.step or 1))
            return whole
        real: float = trial.suggest_float(name, self.low, self.high, log=self.log, step=self.step)
        return real


class Choices(BaseModel):
    """One of some values."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    choices: tuple[Value, ...] = Field(min_length=2)

    @field_validator("choices", mode="before")
    @classmethod
    def _listed(cls, choices: object) -> object:
        """Strict validation takes a list of JSON for a tuple, but not one that a validator has passed on."""
        return tuple(choices) if isinstance(choices, list) else choices

    @property
    def kind(self) -> str:
        """What must stay as it is while a study goes on."""
        return f"one of {', '.join(map(repr, self.choices))}"

    def draw(self, trial: "optuna.Trial", name: str) -> Value:
        """A choice drawn for a trial."""
        drawn: Value = trial.suggest_categorical(name, list(self.choices))
        return drawn


def _which(space: object) -> str:
    choices = "choices" in space if isinstance(space, Mapping) else isinstance(space, Choices)
    return "Choices" if choices else "Range"


Space = Annotated[Annotated[Range, Tag("Range")] | Annotated[Choices, Tag("Choices")], Discriminator(_which)]
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
    heartbeat: int = Field(default=20, ge=1, le=3600)
    """Seconds between a trial's signs of life in a database; after three without one it is taken for lost."""
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
