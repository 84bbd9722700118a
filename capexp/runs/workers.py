"""The workers of a study: one in this process, or several processes.

The processes are forks of a server of ``multiprocessing`` that imports the libraries once for all of them. They are not
started as commands: their arguments are sent through a pipe, so that the address of a storage, with its password, is
neither in a command line nor on disk.
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

_POLL_SECONDS = 1.0  # between two checks of the study or the workers
_DEATHS_IN_A_ROW = 3  # if so many workers are killed and no trial ends between, the next would be killed too
# What workers import, or would when they first need it: the last is MLflow's store in a database without a server.
_PRELOADED = [__name__, "optuna", "matplotlib.figure", "mlflow.store.tracking.sqlalchemy_store"]
_STOP_SECONDS = 120.0  # how long an interrupted worker may take to end its trial before it is killed

Lines = Generator[str | None, None, None]
"""A generator that yields a line for each trial that ends, and None if the study's status may have changed."""


@dataclass(frozen=True)
class Program:
    """How a process of the command runs: its signal handlers, log and exit statuses."""

    main: Callable[[Callable[[], int]], NoReturn]
    """Runs a function as the main function of the process, and exits with the status that it returns."""
    interrupted: int
    """The exit status of an interrupted process."""


@dataclass(frozen=True)
class Task:
    """The task of a worker: the study to work on, and when to stop."""

    experiment: Experiment
    study: str
    """The study's name."""
    storage: str | None
    """The value of ``--storage``."""
    deadline: float | None
    """The time after which no more trials are started, in seconds since 1970; None without a limit."""

    def open(self, comparable: dict[str, str]) -> Study:
        """Open the study; ``comparable`` holds all settings that must be equal for dev losses to be comparable."""
        config = self.experiment.tune
        storage = find_storage(self.storage, STUDIES, self.study, config.heartbeat)
        return Study(storage, self.study, config, self.experiment.seed, self.experiment.training.epochs, comparable)

    @property
    def is_over(self) -> bool:
        """Whether the deadline has passed."""
        return self.deadline is not None and time.time() > self.deadline


def work(task: Task, trials: Trials) -> Lines:
    """Run trials until the study is complete or the deadline has passed."""
    while not (trials.study.is_complete() or task.is_over):
        line = yield from trials.study.run_trial(trials.train)
        if line is None:  # other workers run the last trials, which might fail
            time.sleep(_POLL_SECONDS)
        else:
            trials.delete_ended()
        yield line


def work_together(task: Task, count: int, program: Program) -> Lines:
    """Run trials in ``count`` processes, which share the CPU threads; replace a process that is killed.

    When the generator is closed, it interrupts the processes and waits until their trials have ended.
    """
    workers: dict[BaseProcess, Connection] = {}
    deaths = 0
    threads = max(1, torch.get_num_threads() // count)
    try:
        for _ in range(count):
            workers.update([_start(task, threads, program)])
        while workers:
            wait([*workers.values(), *(process.sentinel for process in workers)], timeout=_POLL_SECONDS)
            for process, connection in list(workers.items()):
                ended = not process.is_alive()  # checked before the pipe is read, so that no line is lost
                for line in _received(connection):
                    deaths = 0 if line else deaths
                    yield line
                if ended:
                    del workers[process]
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
                        workers.update([_start(task, threads, program)])
                    elif process.exitcode not in (0, program.interrupted):
                        raise SystemExit(process.exitcode)  # the worker has reported the reason
            yield None
    finally:
        for process in workers:
            process.terminate()
        for process in workers:
            process.join(_STOP_SECONDS)
            process.kill()
            process.join()


def _received(connection: Connection) -> Iterator[str | None]:
    """Yield the lines that a worker has sent since the last call; raise the error that ended it."""
    try:
        while connection.poll():
            message = connection.recv()
            if isinstance(message, InputError):
                raise message
            yield message
    except EOFError:
        return


def _start(task: Task, threads: int, program: Program) -> tuple[BaseProcess, Connection]:
    """Start a worker; return its process, and the end of a pipe that receives its lines."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(task, threads, sender, program))
    with _inheritance(threads):
        process.start()
    sender.close()
    return process, receiver


@contextmanager
def _inheritance(threads: int) -> Iterator[None]:
    """Set the environment and signals that the server, if it is started in the block, inherits and hands on.

    A worker inherits its number of threads, and ignores SIGINT until it sets its own handler.
    """
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with environment(OMP_NUM_THREADS=str(threads)):
            yield
    finally:
        signal.signal(signal.SIGINT, handler)


def _serve(task: Task, threads: int, connection: Connection, program: Program) -> None:
    """Run a worker in its own process, and send its lines through the pipe."""

    def run_worker() -> int:
        follow_parent(partial(os.kill, os.getpid(), signal.SIGTERM))  # interrupts this process, so that it ends cleanly
        torch.set_num_threads(threads)
        try:
            data = Dataset.read(task.experiment)
            study = task.open(comparable_settings(task.experiment, data))
            trials = Trials(task.experiment, data.with_features(), study, task.study)
            with closing(work(task, trials)) as lines:
                for line in lines:
                    connection.send(line)
        except KeyboardInterrupt:
            return program.interrupted
        except InputError as error:
            connection.send(error)
        return 0

    program.main(run_worker)
