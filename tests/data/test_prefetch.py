"""Bounded prefetch: in order, ahead of need, never further ahead than told."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from capexp.data.prefetch import prefetch


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("limit", [1, 3, 100])
def test_results_come_in_order_and_tasks_are_read_a_few_ahead(workers: int, limit: int) -> None:
    read = 0

    def tasks() -> Iterator[int]:
        nonlocal read
        for task in range(20):
            read += 1
            yield task

    with ThreadPoolExecutor(workers) as pool:
        for taken, result in enumerate(prefetch(pool, lambda task: task * task, tasks(), limit)):
            assert result == taken * taken
            assert read == min(taken + limit, 20), "as many as the limit, this result's task among them"


def test_an_error_is_raised_at_its_place() -> None:
    with ThreadPoolExecutor(2) as pool:
        results = prefetch(pool, lambda task: 1 // task, [1, 1, 0, 1], 4)
        assert [next(results), next(results)] == [1, 1]
        with pytest.raises(ZeroDivisionError):
            next(results)


def test_closed_early_it_cancels_what_has_not_started() -> None:
    started: list[int] = []
    may_end = threading.Event()

    def work(task: int) -> int:
        started.append(task)
        assert task == 0 or may_end.wait(300)
        return task

    with ThreadPoolExecutor(1) as pool:
        results = prefetch(pool, work, range(10), 5)
        assert next(results) == 0
        results.close()  # type: ignore[attr-defined]
        may_end.set()
    assert started in ([0], [0, 1])
