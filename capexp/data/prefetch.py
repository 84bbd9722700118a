"""Bounded prefetch: a pool of threads or processes computes results ahead of need."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from itertools import islice
from typing import TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")


def prefetch(pool: Executor, work: Callable[[Task], Result], tasks: Iterable[Task], limit: int) -> Iterator[Result]:
    """Yield ``work(task)`` for each task, in order, computed by the pool ahead of need.

    At most ``limit`` tasks are submitted and not yet yielded, and ``tasks`` is read no further. Closing the iterator
    cancels the tasks that have not started.
    """
    tasks = iter(tasks)
    submitted: deque[Future[Result]] = deque()
    try:
        while True:
            for task in islice(tasks, limit - len(submitted)):
                submitted.append(pool.submit(work, task))
            if not submitted:
                return
            yield submitted.popleft().result()
    finally:
        for future in submitted:
            future.cancel()
