"""A trial: as it is to be run, as it is told of, and how far all of them are."""

from collections.abc import Mapping
from dataclasses import dataclass

from capexp.settings import Value


class Pruned(Exception):
    """Thrown into a trial that is not worth going on with."""


@dataclass(frozen=True)
class PendingTrial:
    """A trial to be run."""

    number: int
    values: dict[str, Value]
    earlier: tuple[int, ...]
    """The numbers under which the same values were tried before, and broken off; the last one first."""


@dataclass(frozen=True)
class FinishedTrial:
    """A finished trial."""

    number: int
    run_id: str
    dev_loss: float
    values: dict[str, Value]


@dataclass(frozen=True)
class StudyProgress:
    """How far a study is, over all its workers."""

    wanted: int
    finished: int
    pruned: int
    failed: int
    running: int
    best: FinishedTrial | None
    seconds_left: float | None
    """None as long as no trial has ended."""

    @property
    def counted(self) -> int:
        """Finished and pruned trials."""
        return self.finished + self.pruned


def shown_values(values: Mapping[str, Value]) -> str:
    """Values by their settings, in a line."""
    return ", ".join(f"{name} {_shown(value)}" for name, value in values.items())


def _shown(value: Value) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
