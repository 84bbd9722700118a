"""Photos decoded to pixels ahead of need, in order, by threads or by processes.

A process that decodes imports this module and nothing heavy, so that it starts in a third of a second.
"""

import multiprocessing
import os
import shutil
import signal
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from itertools import islice
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from capexp.data.photo_transform import PhotoTransform
from capexp.data.photos import read_photo
from capexp.data.prefetch import prefetch
from capexp.distributed import follow_parent
from capexp.errors import InputError, Outage

Pixels = NDArray[np.uint8] | InputError
"""A photo's pixels (size, size, 3), or the error of a photo that cannot be read."""

TASKS_PER_WORKER: Final = 2  # for each thread or process: one that it works on, one that waits
PHOTOS_PER_TASK: Final = 16  # photos in one task of a process
_MAXIMUM_PROCESSES: Final = 32  # enough to feed the fastest GPU
_CORES_FOR_THREADS: Final = 4  # with at most this many cores, threads decode as fast as processes
_PHOTOS_FOR_PROCESSES: Final = 1000  # fewer are decoded in less time than processes take to start


def decoding_processes(photos: int, size: int) -> int:
    """Return the number of processes that should decode ``photos`` photos for a GPU; 0 if threads are as fast.

    Threads share one interpreter, which cannot keep up with a GPU. Processes take time to start.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if cores <= _CORES_FOR_THREADS or photos < _PHOTOS_FOR_PROCESSES or multiprocessing.current_process().daemon:
        return 0
    processes = min(cores - 1, _MAXIMUM_PROCESSES)
    if Path("/dev/shm").is_dir():  # containers may have 64 MB there; a process that writes more is killed
        bytes_per_process = TASKS_PER_WORKER * PHOTOS_PER_TASK * size * size * 3
        processes = min(processes, shutil.disk_usage("/dev/shm").free // (2 * bytes_per_process))
    return processes


def decode_photo(photo: Path, transform: PhotoTransform) -> Pixels:
    """Return a photo's pixels, or the error of a photo that cannot be read."""
    try:
        return transform(read_photo(photo))
    except InputError as error:
        return error


def decode_by_threads(photos: Iterable[Path], transform: PhotoTransform) -> Iterator[Pixels]:
    """Yield the pixels of photos, in order, decoded by threads."""
    with ThreadPoolExecutor() as pool:
        decode = partial(decode_photo, transform=transform)
        yield from prefetch(pool, decode, photos, TASKS_PER_WORKER * PHOTOS_PER_TASK)


def decode_by_processes(photos: Iterable[Path], transform: PhotoTransform, processes: int) -> Iterator[Pixels]:
    """Yield the pixels of photos, in order, decoded by processes that end with this one, however it ends.

    Pixels are passed through shared memory: reading them from pipes would take this process longer than all its other
    work.

    Raises:
        Outage: a process was killed.
    """
    tasks = TASKS_PER_WORKER * processes
    shape = (tasks, PHOTOS_PER_TASK, transform.size, transform.size, 3)
    memory = SharedMemory(create=True, size=int(np.prod(shape)))
    slots = np.ndarray(shape, np.uint8, memory.buf)
    try:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(processes, context, _open_memory, (memory.name, shape, transform)) as pool:
            # Task i writes to slot i % tasks, which is free again: prefetch has at most `tasks` tasks in flight.
            numbered = ((i % tasks, batch) for i, batch in enumerate(batched(photos, PHOTOS_PER_TASK)))
            for i, faults in enumerate(prefetch(pool, _decode_to_slot, numbered, tasks)):
                # Copied, because the caller may keep pixels after the shared memory is freed; one copy for all is fast.
                for pixels, fault in zip(slots[i % tasks].copy(), faults, strict=False):
                    yield pixels if fault is None else fault
    except BrokenProcessPool:
        raise Outage(
            "a process that decodes photos was killed, probably because memory ran out; free memory, then run the same "
            "command again: the features in the file are kept"
        ) from None
    finally:
        del slots
        memory.unlink()
        memory.close()


def batched(photos: Iterable[Path], size: int) -> Iterator[list[Path]]:
    """Yield lists of ``size`` photos, the last one shorter, each read when it is asked for (``itertools.batched``)."""
    rest = iter(photos)
    while batch := list(islice(rest, size)):
        yield batch


class _Slots:
    """The shared memory, in a process that decodes."""

    memory: SharedMemory
    pixels: NDArray[np.uint8]  # (tasks, PHOTOS_PER_TASK, size, size, 3)
    transform: PhotoTransform


def _open_memory(name: str, shape: tuple[int, ...], transform: PhotoTransform) -> None:
    """Open the shared memory in a process that decodes; leave Ctrl-C to the parent, and exit when the parent dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    follow_parent(partial(os._exit, 1))
    _Slots.memory = SharedMemory(name)
    _Slots.pixels = np.ndarray(shape, np.uint8, _Slots.memory.buf)
    _Slots.transform = transform


def _decode_to_slot(task: tuple[int, list[Path]]) -> list[InputError | None]:
    """Decode the photos of a task into its slot; return each photo's error, or None."""
    slot, photos = task
    faults: list[InputError | None] = []
    for row, photo in zip(_Slots.pixels[slot], photos, strict=False):
        pixels = decode_photo(photo, _Slots.transform)
        if isinstance(pixels, InputError):
            faults.append(pixels)
        else:
            row[:] = pixels
            faults.append(None)
    return faults
