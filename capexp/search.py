"""The Optuna study: a search space as data, and an objective that the caller gives."""

from pydantic import BaseModel, ConfigDict


class TuneConfig(BaseModel):
    """placeholder"""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Pruned(Exception):
    """Thrown into a trial that is not worth going on with."""
