"""The records of trials: one to run, a finished one, and the progress of all of them."""

from collections.abc import Mapping
from dataclasses import dataclass

from capexp.settings import Value


class Pruned(Exception):
    """Thrown into the generator of a trial to prune it."""


@dataclass(frozen=True)
class PendingTrial:
    """A trial to run."""

    number: int
    values: dict[str, Value]
    earlier: tuple[int, ...]
    """The numbers of the interrupted trials that had the same values before; the latest first."""


@dataclass(frozen=True)
class FinishedTrial:
    """A trial that was trained to its end."""

    number: int
    run_id: str
    dev_loss: float
    values: dict[str, Value]


@dataclass(frozen=True)
class StudyProgress:
    """The progress of a study over all its workers."""

    wanted: int
    finished: int
    pruned: int
    failed: int
    running: int
    best: FinishedTrial | None
    seconds_left: float | None
    """None until the first trial has ended."""

    @property
    def counted(self) -> int:
        """The number of finished and pruned trials."""
        return self.finished + self.pruned


def describe_values(values: Mapping[str, Value]) -> str:
    """Return the names and values of settings in one line."""
    return ", ".join(f"{name} {_format(value)}" for name, value in values.items())


def _format(value: Value) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
