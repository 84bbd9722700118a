"""MLflow's store: made once, told of in one line when it fails, locked while a decision is taken."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import mlflow
from filelock import FileLock
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from sqlalchemy.exc import SQLAlchemyError

from capexp.data.errors import InputError, Outage, shown_uri, without_secrets

_LOCK = ".mlflow.lock"
_SQLITE = "sqlite:///"
_QUICK = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}


def prepare_store() -> None:
    """Makes MLflow's database where it is missing: two processes that do so at once would break it.

    Raises:
        InputError: the tracking server or the store cannot be used.
    """
    with store_lock(), store_faults():
        MlflowClient().search_experiments(max_results=1)


def check_store() -> None:
    """Asks the store whether it can be used, before any work is done; makes none.

    Raises:
        InputError: it cannot.
    """
    if mlflow.get_tracking_uri().startswith(_SQLITE) and Path("mlruns").is_dir() and not os.access("mlruns", os.W_OK):
        raise InputError(f"{Path('mlruns').absolute()}: MLflow's artifacts cannot be written; mend its permissions")
    if store_exists():
        before = {name: os.environ.get(name) for name in _QUICK}
        os.environ.update({name: value for name, value in _QUICK.items() if before[name] is None})
        try:
            prepare_store()
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]


def require_store() -> None:
    """Refuses to look something up where nothing was ever tracked.

    Raises:
        InputError: there is no store here.
    """
    if not store_exists():
        uri = shown_uri(mlflow.get_tracking_uri())
        raise InputError(f"{uri}: nothing was tracked here; go to the folder of the runs, or set MLFLOW_TRACKING_URI")


def store_exists() -> bool:
    """Whether there is a store; a server is taken to be there."""
    uri = mlflow.get_tracking_uri()
    return not uri.startswith(_SQLITE) or Path(uri.removeprefix(_SQLITE)).is_file()


@contextmanager
def store_lock() -> Iterator[None]:
    """Keeps other processes on this machine from changing the same local store meanwhile."""
    uri = mlflow.get_tracking_uri()
    if not uri.startswith(_SQLITE):
        yield
        return
    lock = FileLock(Path(uri.removeprefix(_SQLITE)).parent / _LOCK)
    try:
        lock.acquire()
    except OSError as error:
        raise InputError(
            f"{lock.lock_file}: cannot be written ({error.strerror}); start in a folder that can be, or name another "
            "store with MLFLOW_TRACKING_URI"
        ) from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def undisturbed() -> Iterator[None]:
    """Puts off an interrupt until the block is done: a version without its card would be a riddle."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals reach the main thread only
        return
    late: list[int] = []
    before = {number: signal.signal(number, lambda n, _: late.append(n)) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if late:
        signal.raise_signal(signal.Signals(late[0]))


@contextmanager
def local_write() -> Iterator[None]:
    """Puts off an interrupt until a local store is written: a transaction broken off would keep it locked.

    A server keeps its own store, and may be long in answering.
    """
    with undisturbed() if mlflow.get_tracking_uri().startswith(_SQLITE) else nullcontext():
        yield


@contextmanager
def artifact_faults(run_id: str) -> Iterator[None]:
    """Tells a fault of the place where artifacts are kept in one line.

    Raises:
        Outage: in place of the system's error.
    """
    try:
        yield
    except OSError as error:
        where = error.filename or mlflow.get_artifact_uri()
        raise Outage(
            f"{where}: MLflow's artifacts cannot be written ({error.strerror or error}); make room or mend it, then "
            f"python -m capexp.train --resume {run_id}"
        ) from error


@contextmanager
def store_faults() -> Iterator[None]:
    """Tells a fault of the store or the server in one line.

    Raises:
        Outage: in place of MLflow's and SQLAlchemy's errors.
    """
    try:
        yield
    except (MlflowException, SQLAlchemyError) as error:
        uri = mlflow.get_tracking_uri()
        reason = discreet(str(error).strip().splitlines()[0])[:200]
        raise Outage(
            f"MLflow's store {shown_uri(uri)}: {reason}; mend it, or name another with MLFLOW_TRACKING_URI"
        ) from None


def discreet(text: str) -> str:
    """A text without what is secret in the tracking URI."""
    return without_secrets(text, mlflow.get_tracking_uri())


def is_missing(error: MlflowException) -> bool:
    """Whether MLflow says that something is not there, rather than that it cannot answer."""
    return error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
