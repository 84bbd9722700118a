"""Photos decoded ahead of need, in order, by threads or by processes.

A process that decodes imports this module and nothing heavy, so that it starts in a third of a second.
"""

import multiprocessing
import os
import shutil
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from capexp.data.photos import read_photo, squash
from capexp.errors import InputError, Outage

Pixels = NDArray[np.uint8] | InputError
"""A photo squashed to (size, size, 3), or what is wrong with it."""

AHEAD: Final = 2  # tasks at hand for each thread or process: one at work, one waiting
PART: Final = 16  # photos that a process decodes at a time
_PROCESSES: Final = 32  # at most: as many feed the fastest GPU
_ENOUGH: Final = 4  # cores that threads use as well as processes would
_WORTH: Final = 1000  # photos that take longer to decode than processes to start

T = TypeVar("T")


def decoding_processes(photos: int, size: int) -> int:
    """How many processes should decode so many photos for a GPU: 0 where threads do as well.

    Threads share one interpreter, which a GPU outpaces; a process costs its start.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if cores <= _ENOUGH or photos < _WORTH or multiprocessing.current_process().daemon:
        return 0
    processes = min(cores - 1, _PROCESSES)
    if Path("/dev/shm").is_dir():  # containers may have 64 MB there, and whoever writes more than there is dies
        processes = min(processes, shutil.disk_usage("/dev/shm").free // (2 * AHEAD * PART * size * size * 3))
    return processes


def decode_photo(photo: Path, size: int) -> Pixels:
    """A photo squashed to a square, or what is wrong with it."""
    try:
        return squash(read_photo(photo), size)
    except InputError as error:
        return error


def decode_by_threads(photos: Iterable[Path], size: int) -> Iterator[Pixels]:
    """Photos as pixels, in order, by a thread a core."""
    with ThreadPoolExecutor() as pool:
        yield from ahead(pool, decode_photo, ((photo, size) for photo in photos), AHEAD * PART)


def decode_by_processes(photos: Iterable[Path], size: int, processes: int) -> Iterator[Pixels]:
    """Photos as pixels, in order, by processes that end with this one, however it ends.

    Pixels come through shared memory: through pipes they would cost this process more than all else that it does.

    Raises:
        Outage: a process was killed.
    """
    tasks = AHEAD * processes
    shape = (tasks, PART, size, size, 3)
    memory = SharedMemory(create=True, size=int(np.prod(shape)))
    slots = np.ndarray(shape, np.uint8, memory.buf)
    try:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(processes, context, _begin, (memory.name, shape)) as pool:
            # With at most so many tasks begun and not yet taken, a task's slot is free when it comes round again.
            numbered = ((i % tasks, part) for i, part in enumerate(parts(photos, PART)))
            for i, faults in enumerate(ahead(pool, _decode_part, numbered, tasks)):
                # Copied, all at once: behind the last photo the memory is gone, whoever looks at it.
                for pixels, fault in zip(slots[i % tasks].copy(), faults, strict=False):
                    yield pixels if fault is None else fault
    except BrokenProcessPool:
        raise Outage(
            "a process that decodes photos was killed, mostly for want of memory; make room and start again: "
            "what is there is kept"
        ) from None
    finally:
        del slots
        memory.unlink()
        memory.close()


def parts(photos: Iterable[Path], size: int) -> Iterator[list[Path]]:
    """Photos, so many at a time, taken as they are asked for."""
    rest = iter(photos)
    while part := list(islice(rest, size)):
        yield part


def ahead(pool: Executor, work: Callable[..., T], tasks: Iterator[tuple[object, ...]], limit: int) -> Iterator[T]:
    """What work makes of tasks, in order, with at most so many of them begun and not yet taken."""
    begun: deque[Future[T]] = deque()
    try:
        while True:
            for task in islice(tasks, limit - len(begun)):
                begun.append(pool.submit(work, *task))
            if not begun:
                return
            yield begun.popleft().result()
    finally:
        for future in begun:
            future.cancel()  # an interrupt waits for what is at work, not for what is waiting


class _Slots:
    """The shared memory in a process that decodes."""

    memory: SharedMemory
    pixels: NDArray[np.uint8]  # (tasks, PART, size, size, 3)


def _begin(name: str, shape: tuple[int, ...]) -> None:
    """Opens the shared memory. An interrupt is the parent's matter; the parent's end is this process's too."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_follow_parent, daemon=True).start()
    _Slots.memory = SharedMemory(name)
    _Slots.pixels = np.ndarray(shape, np.uint8, _Slots.memory.buf)


def _follow_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _decode_part(slot: int, photos: list[Path]) -> list[InputError | None]:
    """Decodes photos into a slot, and tells what is wrong with each."""
    faults: list[InputError | None] = []
    for row, photo in zip(_Slots.pixels[slot], photos, strict=False):
        pixels = decode_photo(photo, len(row))
        fault = pixels if isinstance(pixels, InputError) else None
        if not isinstance(pixels, InputError):
            row[:] = pixels
        faults.append(fault)
    return faults
