"""Cases of slow tests: those that are always tried, and those that `make soak` adds."""

from collections.abc import Iterable
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
