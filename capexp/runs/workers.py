"""The workers of a study: one in this process, or several processes.

The processes are spawned by ``multiprocessing`` rather than started as commands: what they need goes through a
pipe, so that the address of a storage, with its password, is neither in a command line nor on disk.
"""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import NoReturn

import torch

from capexp.data.dataset import Dataset
from capexp.distributed import environment, follow_parent
from capexp.errors import InputError
from capexp.runs.folder import STUDIES
from capexp.runs.study import Trials, comparable_settings
from capexp.search.storage import find_storage
from capexp.search.study import Study
from capexp.settings import Experiment

_LOOK_AGAIN = 1.0  # seconds
_DEATHS_IN_A_ROW = 3  # workers that died while no trial ended: the next would too
_LEAVE_WITHIN = 120.0  # seconds that an interrupted worker has for bringing its trial to an end

Lines = Generator[str | None, None, None]
"""Yields a line for each trial that ends, and None where the status of the study may have changed."""


@dataclass(frozen=True)
class Program:
    """How a process of the command runs: its signals, log and exit statuses."""

    main: Callable[[Callable[[], int]], NoReturn]
    """Runs a function as the command's process, and exits with what it returns."""
    interrupted: int
    """The exit status of an interrupted process."""


@dataclass(frozen=True)
class Task:
    """The work of a worker: a study, and when to stop."""

    experiment: Experiment
    study: str
    storage: str | None
    """The value of ``--storage``."""
    deadline: float | None
    """The time after which no more trials are begun, in seconds since 1970."""

    def open(self, known: dict[str, str]) -> Study:
        """Open the study; ``known`` are the settings that make its losses comparable."""
        config = self.experiment.tune
        storage = find_storage(self.storage, STUDIES, self.study, config.heartbeat)
        return Study(storage, self.study, config, self.experiment.seed, self.experiment.training.epochs, known)

    @property
    def is_over(self) -> bool:
        """Whether the time is up."""
        return self.deadline is not None and time.time() > self.deadline


def work(task: Task, trials: Trials) -> Lines:
    """Run trials until the study is complete or the time is up."""
    while not (trials.study.is_complete() or task.is_over):
        line = yield from trials.study.run_trial(trials.train)
        if line is None:  # others are at the last ones, and might fail
            time.sleep(_LOOK_AGAIN)
        else:
            trials.delete_ended()
        yield line


def work_together(task: Task, count: int, program: Program) -> Lines:
    """Run trials in ``count`` processes, which share the threads; a process that is killed is replaced.

    Closed, it interrupts the processes and waits until their trials have ended.
    """
    crew: dict[BaseProcess, Connection] = {}
    deaths = 0
    threads = max(1, torch.get_num_threads() // count)
    try:
        for _ in range(count):
            crew.update([_start(task, threads, program)])
        while crew:
            wait([*crew.values(), *(process.sentinel for process in crew)], timeout=_LOOK_AGAIN)
            for process, connection in list(crew.items()):
                ended = not process.is_alive()  # before the pipe is read: what it said last is in there
                for line in _said(connection):
                    deaths = 0 if line else deaths
                    yield line
                if ended:
                    del crew[process]
                    assert process.exitcode is not None
                    if process.exitcode < 0:
                        deaths += 1
                        name = signal.Signals(-process.exitcode).name
                        if deaths == _DEATHS_IN_A_ROW:
                            raise InputError(
                                f"workers were killed {deaths} times ({name}) while no trial has ended; "
                                "is there memory for so many? give a lower --workers"
                            )
                        yield f"a worker was killed ({name}): its trial is run again, and another one takes its place"
                        crew.update([_start(task, threads, program)])
                    elif process.exitcode not in (0, program.interrupted):
                        raise SystemExit(process.exitcode)  # it has told why
            yield None
    finally:
        for process in crew:
            process.terminate()
        for process in crew:
            process.join(_LEAVE_WITHIN)
            process.kill()
            process.join()


def _said(connection: Connection) -> Iterator[str | None]:
    """Yield the lines of a worker since the last call; raise the error that ended it."""
    try:
        while connection.poll():
            said = connection.recv()
            if isinstance(said, InputError):
                raise said
            yield said
    except EOFError:
        return


def _start(task: Task, threads: int, program: Program) -> tuple[BaseProcess, Connection]:
    """Start a worker; return its process, and the pipe that its lines come from."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(task, threads, there, program))
    with _spawning(threads):
        process.start()
    there.close()
    return process, here


@contextmanager
def _spawning(threads: int) -> Iterator[None]:
    """Let a new process inherit its number of threads, and ignore SIGINT until it sets a handler of its own."""
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with environment(OMP_NUM_THREADS=str(threads)):
            yield
    finally:
        signal.signal(signal.SIGINT, handler)


def _serve(task: Task, threads: int, connection: Connection, program: Program) -> None:
    """Run a worker, in its process."""

    def tell() -> int:
        follow_parent(partial(os.kill, os.getpid(), signal.SIGTERM))  # an interrupt, to end in order
        torch.set_num_threads(threads)
        try:
            data = Dataset.read(task.experiment)
            study = task.open(comparable_settings(task.experiment, data))
            trials = Trials(task.experiment, data.with_features(task.experiment), study, task.study)
            with closing(work(task, trials)) as lines:
                for line in lines:
                    connection.send(line)
        except KeyboardInterrupt:
            return program.interrupted
        except InputError as error:
            connection.send(error)
        return 0

    program.main(tell)
