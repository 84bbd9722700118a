"""Cases of tests: those that are always tried, and those that `make test-all` or `make soak` adds."""

from collections.abc import Iterable, Sequence
from itertools import product
from typing import Any

import pytest
from kinds import KINDS


def cases(*always: Any, of: Iterable[Any] = tuple(KINDS)) -> list[Any]:
    """Return all cases as pytest's parameters; those not in ``always`` are marked ``soak``.

    So `make test-all` tries each disturbance with some kinds of runs, and `make soak` with the others.
    """
    every = list(of)
    assert set(always) <= set(every), "a case that is not in the table"
    values = {case: case if isinstance(case, tuple) else (case,) for case in every}
    return [pytest.param(*values[case], marks=() if case in always else pytest.mark.soak) for case in every]


def combined(*axes: Sequence[Any]) -> list[Any]:
    """Return all combinations of the axes' values as pytest's parameters; a tuple stands for several parameters.

    A few, in which each value occurs, are tried by `make test`; the others are marked ``slow``.
    """
    few = [tuple(axis[i % len(axis)] for axis in axes) for i in range(max(map(len, axes)))]
    return [
        pytest.param(
            *(part for value in values for part in (value if isinstance(value, tuple) else (value,))),
            marks=() if values in few else pytest.mark.slow,
        )
        for values in product(*axes)
    ]
