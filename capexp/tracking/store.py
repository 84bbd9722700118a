"""MLflow's store: its URI, creation, locking, and one-line errors.

The store is a local SQLite database, another database, or a tracking server. ``prepare_store`` creates a missing local
database under a lock, so that two processes do not create it at the same time. ``store_faults`` and ``artifact_faults``
turn errors of the store into Outage.
"""

import logging
import math
import os
import re
import shlex
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
from mlflow.utils.file_utils import local_file_uri_to_path
from sqlalchemy import create_engine
from sqlalchemy.exc import SQLAlchemyError

from capexp.distributed import environment
from capexp.errors import InputError, Outage, shown_uri, without_secrets
from capexp.files import sync

log = logging.getLogger(__name__)

_LOCK = ".mlflow.lock"
_SQLITE, _WITH_DRIVER = "sqlite:///", "sqlite+pysqlite:///"
_ENCODED = re.compile("%[0-9A-Fa-f]{2}")
_REMOTE_DATABASES = ("postgresql", "mysql", "mssql")  # MLflow can use these directly, without a tracking server
_CONNECT_SECONDS = 10
_RETRIES = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"
_FAIL_FAST = {_RETRIES: "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}  # for the check before any work is done
_PATIENCE = "CAPEXP_PATIENCE"


def database_path(uri: str) -> Path | None:
    """Return the file of a local database, as SQLAlchemy opens it; None if the URI does not name a local database.

    Percent-encoded characters are decoded. MLflow encodes the path of its default store; users may encode theirs.
    """
    for prefix in (_SQLITE, _WITH_DRIVER):
        if uri.startswith(prefix):
            return Path(unquote(uri.removeprefix(prefix).partition("?")[0]))
    return None


def database_uri(path: Path) -> str:
    """Return the URI of a local database, written so that MLflow does not create a folder with a wrong name.

    MLflow creates the folder of a ``sqlite:///`` path, and does not percent-decode the path. So the returned path is
    not encoded if SQLAlchemy can read it as it is. A path with ``?``, or with ``%`` before two hexadecimal digits, must
    be encoded. Its URI then names the driver (``sqlite+pysqlite:///``): MLflow creates no folder for such a URI.
    """
    name = str(path)
    return f"{_WITH_DRIVER}{quote(name)}" if "?" in name or _ENCODED.search(name) else f"{_SQLITE}{name}"


def store_uri() -> str:
    """Return the URI of MLflow's store; a local database's is written as by :func:`database_uri`.

    If MLflow's tracking URI is written differently, it is replaced by the returned one, in MLflow and in the
    environment that child processes inherit. The registry's URI is treated in the same way.
    """
    try:
        given = str(mlflow.get_tracking_uri())
    except UnicodeEncodeError:
        raise InputError(f"{Path.cwd()}: MLflow needs a folder whose name is UTF-8; rename the folder") from None
    uri = _normalized(given)
    if uri != given:
        mlflow.set_tracking_uri(uri)
    registry = str(mlflow.get_registry_uri())
    if _normalized(registry) != registry:
        mlflow.set_registry_uri(_normalized(registry))
    return uri


def _normalized(uri: str) -> str:
    """Return the URI of a local database as :func:`database_uri` writes it, and any other URI unchanged."""
    path = database_path(uri)
    if path is None:
        return uri
    _, separator, query = uri.partition("?")
    return f"{database_uri(path)}{separator}{query}"


def _refuse_folder() -> None:
    """Raise InputError if MLflow cannot use a database because of its own folder's name or the working directory's.

    * The working directory contains the artifacts. MLflow percent-decodes the path of a local artifact folder, although
      it was never encoded.
    * MLflow's own folder contains the migrations of the database's schema. MLflow gives its path to Alembic in a
      configuration in which ``%`` has a special meaning.
    """
    folder = str(Path.cwd())
    if _scheme(store_uri()) not in ("sqlite", *_REMOTE_DATABASES):
        return  # a tracking server uses its own folders
    installed = str(Path(mlflow.__file__).parent)
    if "%" in installed:
        raise InputError(
            f"{installed}: MLflow cannot work where it is installed in a folder whose name holds %; rename the folder, "
            "or install it elsewhere"
        )
    encoded = _ENCODED.search(folder)
    if encoded is not None:
        raise InputError(
            f"{folder}: MLflow decodes {encoded[0]} in the path as a percent-encoded character; rename the folder"
        )
    if ".." in folder.partition("?")[2]:
        raise InputError(f"{folder}: MLflow takes no folder whose path has .. after a question mark; rename the folder")
    try:
        folder.encode()
    except UnicodeEncodeError:
        raise InputError(f"{folder}: MLflow needs a folder whose name is UTF-8; rename the folder") from None


def _scheme(uri: str) -> str:
    """Return the scheme of a URI without a driver: ``postgresql`` for ``postgresql+psycopg://...``."""
    return uri.partition(":")[0].partition("+")[0]


def prepare_store() -> None:
    """Create MLflow's local database if it is missing, and check that the store answers.

    It takes the store's lock, because two processes that create the database at the same time would damage it.
    """
    _refuse_folder()
    with store_lock(), store_faults():
        path = database_path(store_uri())
        if path is not None and not path.is_file():
            _make_local(path)
        MlflowClient().search_experiments(max_results=1)


def _make_local(path: Path) -> None:
    """Create a local database under a temporary name, then give it its own name.

    MLflow runs all migrations of its schema to create a database, which takes seconds. If it is killed meanwhile, the
    half-migrated database can never be opened.
    """
    path = path.resolve()  # a symbolic link stays; the file that it points to is created
    temporary = path.with_name(f".{path.name}.part")
    for leftover in (temporary, temporary.with_name(f"{temporary.name}-journal")):
        leftover.unlink(missing_ok=True)
    MlflowClient(database_uri(temporary)).search_experiments(max_results=1)
    try:
        path.hardlink_to(temporary)
    except FileExistsError:
        pass  # MLflow itself takes no lock: keep the database that another process has created meanwhile
    except OSError:  # a file system without hard links
        temporary.replace(path)
    temporary.unlink(missing_ok=True)
    sync(path.parent)


def check_store(experiment: str | None = None, run_id: str | None = None) -> None:
    """Check that the store can be used, before any work is done. A missing store is not created.

    With the name of an MLflow experiment, or the id of a run in it, also check that the experiment's artifact folder
    exists, and log a warning if the folder belongs to another store.
    """
    _refuse_folder()
    patience()  # refuses an invalid CAPEXP_PATIENCE
    artifacts = Path("mlruns").absolute()
    if is_local() and artifacts.exists():
        if not artifacts.is_dir():
            raise InputError(f"{artifacts}: MLflow's artifacts go into a folder of that name; move the file away")
        if not os.access(artifacts, os.W_OK):
            raise InputError(f"{artifacts}: MLflow's artifacts cannot be written; fix its permissions")
    _refuse_unreachable()
    if store_exists():
        with environment(**{name: os.environ.get(name, value) for name, value in _FAIL_FAST.items()}):
            prepare_store()
            _require_artifacts(experiment, run_id)


def _require_artifacts(experiment: str | None, run_id: str | None) -> None:
    """Check that the folder of an experiment's artifacts exists.

    MLflow stores its absolute path. If the project's folder was moved, MLflow would create the old path again. If it
    was copied, MLflow would write into the original folder. So a missing folder is an error, and a folder that belongs
    to another store gives a warning.
    """
    database, client = database_path(store_uri()), MlflowClient()
    with store_faults():
        try:
            if run_id is not None:
                found = client.get_experiment(client.get_run(run_id).info.experiment_id)
            else:
                found = None if experiment is None else client.get_experiment_by_name(experiment)
        except MlflowException as error:
            if is_missing(error):
                return  # whoever opens the run says so
            raise
    folder = None if found is None else local_folder(found.artifact_location)
    if found is None or folder is None or database is None:
        return
    here = database.resolve().parent
    if folder.resolve().is_relative_to(here) or not (here / "mlruns").is_dir():
        return  # without artifacts beside it, the store is shared by several folders
    project = folder.parent.parent  # the folder that contains mlruns/1
    if not folder.parent.exists():
        raise InputError(
            f"{database}: experiment {found.name} has its artifacts in {folder}, which is gone; if the project's "
            f"folder was moved, let its old path lead to it: {moved_remedy(project)}"
        )
    other = project / database.name
    if other.is_file() and not other.samefile(database):
        log.warning(
            "%s: experiment %s has its artifacts in %s, which belongs to %s; if this folder is a copy, delete its "
            "mlflow.db and mlruns", database, found.name, folder, other,
        )  # fmt: skip


def moved_remedy(project: Path) -> str:
    """Return the command that lets the old path of the project's folder lead to where its store is now."""
    database = database_path(store_uri())
    here = Path.cwd() if database is None else database.resolve().parent
    link = f"ln -s {shlex.quote(str(here))} {shlex.quote(str(project))}"
    return link if project.parent.is_dir() else f"mkdir -p {shlex.quote(str(project.parent))} && {link}"


def local_folder(location: str) -> Path | None:
    """Return the folder of artifacts on this machine, or None if they are elsewhere."""
    if location.startswith("file:"):
        return Path(local_file_uri_to_path(location))
    return None if re.match(r"[a-z0-9+-]+:", location) else Path(location)


def patience() -> float:
    """Return how many seconds a finished run waits at its end for a server that does not respond; default 60."""
    value = os.environ.get(_PATIENCE, "60")
    try:
        seconds = float(value)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds <= 10**6:
        raise InputError(f"{_PATIENCE} = {value!r}: give seconds, from 0 to 1000000")
    return seconds


def short_patience() -> float:
    """Return how many seconds an interrupted or failed run waits at its end: as :func:`patience`, but at most 10."""
    return min(10.0, patience())


def await_store() -> None:
    """Wait for an unreachable server, four times as long as :func:`patience`; then raise Outage.

    It is called between the runs of a group or study, when a delay loses no work.
    """
    end, pause = time.monotonic() + 4 * patience(), 1.0
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


def store_elsewhere() -> str | None:
    """Return the store's URI, without a password, if commands in the working directory would not find it by default."""
    database = database_path(store_uri())
    is_default = database is not None and database.absolute() == Path("mlflow.db").absolute()
    return None if is_default else shown_uri(store_uri())


def is_local() -> bool:
    """Return whether the store is a database file on this machine. Its errors are not retried."""
    return database_path(store_uri()) is not None


@contextmanager
def no_retries() -> Iterator[None]:
    """Make MLflow send each request to a server only once, unless the user has set the number of retries.

    By default MLflow tries eight times in about four minutes and blocks meanwhile. The outbox retries in the background
    instead.
    """
    with environment(**{_RETRIES: os.environ.get(_RETRIES, "0")}):
        yield


def require_store() -> None:
    """Raise InputError if there is no store to look something up in."""
    _refuse_unreachable()
    if not store_exists():
        uri = shown_uri(store_uri())
        raise InputError(f"{uri}: nothing was tracked here; go to the folder of the runs, or set MLFLOW_TRACKING_URI")


def _refuse_unreachable() -> None:
    """Raise an error if the database does not accept a connection at the first try. MLflow would retry for minutes.

    It does not check a tracking server.
    """
    uri = store_uri()
    path = database_path(uri)
    if path is not None:
        if path.exists() and not path.is_file():
            raise InputError(f"{path}: MLflow's database is to be a file; move it away")
    elif _scheme(uri) in _REMOTE_DATABASES:
        arguments = {"connect_timeout": _CONNECT_SECONDS} if _scheme(uri) == "postgresql" else {}
        with store_faults():
            try:
                engine = create_engine(uri, connect_args=arguments)
            except ImportError as error:
                raise InputError(f"{shown_uri(uri)}: needs the module {error.name}; pip install its package") from None
            try:
                engine.connect().close()
            finally:
                engine.dispose()


def store_exists() -> bool:
    """Return whether there is a store. Only local databases are checked; other stores are assumed to exist."""
    path = database_path(store_uri())
    return path is None or path.is_file()


@contextmanager
def store_lock() -> Iterator[None]:
    """Lock a local store against other processes of this project on this machine.

    MLflow itself does not take this lock, so it does not exclude other programs. Other stores are not locked.
    """
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
    """Delay interrupts (SIGINT, SIGTERM) until the end of the block.

    Steps that belong together are then all done: for example, a registered version also gets its model card.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # Python handles signals only in the main thread
        return
    delayed: list[int] = []
    before = {
        number: signal.signal(number, lambda n, _: delayed.append(n)) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if delayed:
        signal.raise_signal(signal.Signals(delayed[0]))


@contextmanager
def local_write() -> Iterator[None]:
    """Delay interrupts until a local store is written: an interrupted transaction would leave the database locked.

    With a server interrupts are not delayed: it completes its transactions itself, and may take long to answer.
    """
    with undisturbed() if is_local() else nullcontext():
        yield


@contextmanager
def artifact_faults(run_id: str) -> Iterator[None]:
    """Turn an OSError from reading or writing a run's artifacts into an Outage of one line."""
    try:
        yield
    except OSError as error:
        location = error.filename or mlflow.get_artifact_uri()
        raise Outage(
            f"{location}: MLflow's artifacts cannot be read or written ({error.strerror or error}); free space or fix "
            f"it, then python -m capexp.train --resume {run_id}"
        ) from error


@contextmanager
def store_faults() -> Iterator[None]:
    """Turn an error of MLflow or SQLAlchemy into an Outage of one line."""
    try:
        yield
    except (MlflowException, SQLAlchemyError) as error:
        raise Outage(f"{fault_of(error)}; fix it, or name another with MLFLOW_TRACKING_URI") from None


def fault_of(error: Exception) -> str:
    """Return one line that says which error the store or the server reports, without credentials."""
    lines = str(error).strip().splitlines()
    # The first line may only name the step of SQLAlchemy in which the error occurred.
    reasons = [line for line in lines if not line.startswith("(raised as a result of")]
    reason = without_credentials((reasons or lines or [type(error).__name__])[0])[:200]
    return reason if isinstance(error, Outage) else f"MLflow's store {shown_uri(store_uri())}: {reason}"


def without_credentials(text: str) -> str:
    """Return a text without the credentials of the tracking URI."""
    return without_secrets(text, store_uri())


def is_missing(error: MlflowException) -> bool:
    """Return whether MLflow has answered that something does not exist, so that a retry would fail too.

    MLflow uses INVALID_PARAMETER_VALUE for a missing alias, a malformed run id and a deleted run. It uses the same code
    for all requests that it rejects as invalid. For those, too, a retry is useless.
    """
    return error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
