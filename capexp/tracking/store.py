"""MLflow's store: where it is, made once, told of in one line when it fails, locked while a decision is taken."""

import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from urllib.parse import quote, unquote

import mlflow
from filelock import FileLock
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from sqlalchemy import create_engine
from sqlalchemy.exc import SQLAlchemyError

from capexp.distributed import environment
from capexp.errors import InputError, Outage, shown_uri, without_secrets
from capexp.files import sync

_LOCK = ".mlflow.lock"
_SQLITE, _WITH_DRIVER = "sqlite:///", "sqlite+pysqlite:///"
_ENCODED = re.compile("%[0-9A-Fa-f]{2}")
_TIMEOUTS = {"postgresql": "connect_timeout", "mysql": "connect_timeout", "mssql": "timeout"}  # of each one's driver
_CONNECT_SECONDS = 10
_RETRIES = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"
_QUICK = {_RETRIES: "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
_PATIENCE = 240.0  # seconds; MLflow's own, without what is set here


def database_path(uri: str) -> Path | None:
    """Return the file of a local database, as SQLAlchemy opens it; None where the URI names something else.

    Percent-encoded characters are decoded: MLflow encodes the URI of its default store, a user may or may not.
    """
    for prefix in (_SQLITE, _WITH_DRIVER):
        if uri.startswith(prefix):
            return Path(unquote(uri.removeprefix(prefix).partition("?")[0]))
    return None


def database_uri(path: Path) -> str:
    """Return the URI of a local database, in a spelling for which MLflow makes no folder of another name.

    MLflow makes the folder of a ``sqlite:///`` URI without decoding it, so the path stands there as it is. What
    SQLAlchemy would not read back (``?``, or ``%`` with two hexadecimal digits) is encoded, with the driver named: then
    MLflow makes no folder.
    """
    name = str(path)
    return f"{_WITH_DRIVER}{quote(name)}" if "?" in name or _ENCODED.search(name) else f"{_SQLITE}{name}"


def store_uri() -> str:
    """Return the URI of MLflow's store. Everything here that needs it asks this function.

    Where the user or MLflow has spelt the URI of a local database in another way than :func:`database_uri`, MLflow, and
    by the environment each process that is started from here, is told the new spelling. The registry's URI is treated
    alike.

    Raises:
        InputError: the name of the working directory is not UTF-8, which MLflow's default store needs.
    """
    try:
        given = str(mlflow.get_tracking_uri())
    except UnicodeEncodeError:
        raise InputError(f"{Path.cwd()}: MLflow needs a folder whose name is UTF-8; rename the folder") from None
    uri = _spell(given)
    if uri != given:
        mlflow.set_tracking_uri(uri)
    registry = str(mlflow.get_registry_uri())
    if _spell(registry) != registry:
        mlflow.set_registry_uri(_spell(registry))
    return uri


def _spell(uri: str) -> str:
    """Return the URI of a local database in the spelling of :func:`database_uri`, and any other as it is."""
    path = database_path(uri)
    if path is None:
        return uri
    _, separator, query = uri.partition("?")
    return f"{database_uri(path)}{separator}{query}"


def _refuse_folder() -> None:
    """Refuse folders with which MLflow cannot use a database: the working directory, and the one that holds MLflow.

    MLflow decodes the path of a local artifact folder, even where nobody has encoded it. For the database's schema it
    reads files of its own by a setting in which ``%`` has a meaning.
    """
    folder, kind = str(Path.cwd()), store_uri().partition(":")[0].partition("+")[0]
    if kind != "sqlite" and kind not in _TIMEOUTS:
        return  # a server has both
    installed = str(Path(mlflow.__file__).parent)
    if "%" in installed:
        raise InputError(
            f"{installed}: MLflow cannot work where it is installed in a folder whose name holds %; rename the folder, "
            "or install it elsewhere"
        )
    encoded = _ENCODED.search(folder)
    if encoded is not None:
        raise InputError(
            f"{folder}: MLflow takes {encoded[0]} in a folder's name for another letter; rename the folder"
        )
    if ".." in folder.partition("?")[2]:
        raise InputError(f"{folder}: MLflow takes no folder whose path has .. after a question mark; rename the folder")
    try:
        folder.encode()
    except UnicodeEncodeError:
        raise InputError(f"{folder}: MLflow needs a folder whose name is UTF-8; rename the folder") from None


def prepare_store() -> None:
    """Makes MLflow's database where it is missing: two processes that do so at once would break it.

    Raises:
        InputError: the tracking server or the store cannot be used.
    """
    _refuse_folder()
    with store_lock(), store_faults():
        path = database_path(store_uri())
        if path is not None and not path.is_file():
            _make_local(path)
        MlflowClient().search_experiments(max_results=1)


def _make_local(path: Path) -> None:
    """Makes a local database beside its place and puts it there whole.

    MLflow goes through its schema's history to make one, which takes seconds; a database that a kill has left on the
    way could never be opened again.
    """
    path = path.resolve()  # where a link points
    beside = path.with_name(f".{path.name}.part")
    for left in (beside, beside.with_name(f"{beside.name}-journal")):
        left.unlink(missing_ok=True)
    MlflowClient(database_uri(beside)).search_experiments(max_results=1)
    try:
        path.hardlink_to(beside)
    except FileExistsError:
        pass  # MLflow itself takes no lock: what another process has made by now stays
    except OSError:  # a file system without hard links
        beside.replace(path)
    beside.unlink(missing_ok=True)
    sync(path.parent)


def check_store() -> None:
    """Asks the store whether it can be used, before any work is done; makes none.

    Raises:
        InputError: it cannot.
    """
    _refuse_folder()
    artifacts = Path("mlruns").absolute()
    if is_local() and artifacts.exists():
        if not artifacts.is_dir():
            raise InputError(f"{artifacts}: MLflow's artifacts go into a folder of that name; move the file away")
        if not os.access(artifacts, os.W_OK):
            raise InputError(f"{artifacts}: MLflow's artifacts cannot be written; mend its permissions")
    _refuse_unreachable()
    if store_exists():
        with environment(**{name: os.environ.get(name, value) for name, value in _QUICK.items()}):
            prepare_store()


def await_store() -> None:
    """Waits for a server that is away, for some minutes: between two runs of many nothing is lost by that.

    Raises:
        Outage: it stays away.
    """
    end, pause = time.monotonic() + _PATIENCE, 1.0
    while not is_local():
        try:
            MlflowClient().search_experiments(max_results=1)
            return
        except (MlflowException, SQLAlchemyError):
            if time.monotonic() > end:
                with store_faults():
                    raise
        time.sleep(pause)
        pause = min(2 * pause, 15.0)


def is_local() -> bool:
    """Whether the store is a file of this machine, which needs no patience."""
    return database_path(store_uri()) is not None


@contextmanager
def no_retries() -> Iterator[None]:
    """MLflow asks a server that is away once instead of eight times over minutes, unless the user has said how often.

    The journal sends again, and in the background.
    """
    with environment(**{_RETRIES: os.environ.get(_RETRIES, "0")}):
        yield


def require_store() -> None:
    """Refuses to look something up where nothing was ever tracked.

    Raises:
        InputError: there is no store here.
    """
    _refuse_unreachable()
    if not store_exists():
        uri = shown_uri(store_uri())
        raise InputError(f"{uri}: nothing was tracked here; go to the folder of the runs, or set MLFLOW_TRACKING_URI")


def _refuse_unreachable() -> None:
    """Asks a database for a connection: MLflow itself would ask again and again, for minutes."""
    uri = store_uri()
    path = database_path(uri)
    if path is not None:
        if path.exists() and not path.is_file():
            raise InputError(f"{path}: MLflow's database is to be a file; move it away")
    elif (kind := uri.partition(":")[0].partition("+")[0]) in _TIMEOUTS:
        with store_faults():
            try:
                engine = create_engine(uri, connect_args={_TIMEOUTS[kind]: _CONNECT_SECONDS})
            except ImportError as error:
                raise InputError(f"{shown_uri(uri)}: needs the module {error.name}; pip install its package") from None
            try:
                engine.connect().close()
            finally:
                engine.dispose()


def store_exists() -> bool:
    """Whether there is a store; a server is taken to be there."""
    path = database_path(store_uri())
    return path is None or path.is_file()


@contextmanager
def store_lock() -> Iterator[None]:
    """Keeps other processes on this machine from changing the same local store meanwhile."""
    path = database_path(store_uri())
    if path is None:
        yield
        return
    lock = FileLock(path.parent / _LOCK)
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
    with undisturbed() if is_local() else nullcontext():
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
        raise Outage(f"{fault_of(error)}; mend it, or name another with MLFLOW_TRACKING_URI") from None


def fault_of(error: Exception) -> str:
    """What the store or the server has against it, in a line."""
    lines = str(error).strip().splitlines()
    told = [line for line in lines if not line.startswith("(raised as a result of")]  # where, not what
    reason = discreet((told or lines or [type(error).__name__])[0])[:200]
    return reason if isinstance(error, Outage) else f"MLflow's store {shown_uri(store_uri())}: {reason}"


def discreet(text: str) -> str:
    """A text without what is secret in the tracking URI."""
    return without_secrets(text, store_uri())


def is_missing(error: MlflowException) -> bool:
    """Whether MLflow says that something is not there, rather than that it cannot answer."""
    return error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
