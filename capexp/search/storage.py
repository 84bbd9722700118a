"""The storage of a study: a journal file for the processes of one machine, or a PostgreSQL database for many machines.

Each trial must be counted exactly once, also when workers are killed. A storage therefore has

* a lock that excludes all other processes of the study, and that the operating system or the database releases when
  its holder dies;
* a heartbeat for every running trial, so that trials of dead workers are found.
"""

import logging
import threading
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from capexp.errors import InputError, Outage, shown_uri, without_secrets
from capexp.files import writing

log = logging.getLogger(__name__)

_LOST_AFTER = 3  # missed heartbeats after which a trial counts as lost
_CONNECT_SECONDS = 10


class StudyStorage(ABC):
    """The storage of one study."""

    shown: str
    """Its name in messages, without a password."""
    is_shared: bool
    """Whether workers on other machines may run trials of the study."""

    @abstractmethod
    def exists(self) -> bool:
        """Return whether the storage exists already. Raises Outage if it cannot be reached."""

    @abstractmethod
    def open(self) -> Any:
        """Return Optuna's storage, created if it does not exist."""

    @abstractmethod
    def lock(self) -> Any:
        """Return a context manager that locks the study for this process. It is not reentrant."""

    @abstractmethod
    def heartbeat(self, number: int) -> Any:
        """Return a context manager that marks a trial as running until the block ends or this process dies."""

    @abstractmethod
    def fail_lost(self, study: Any) -> None:
        """Set the state of running trials without a heartbeat to FAIL. Only call it while holding the lock."""

    @contextmanager
    def faults(self) -> Iterator[None]:
        """Turn errors of the storage's library or disk into a one-line Outage; subclasses override this."""
        yield


class JournalStudyStorage(StudyStorage):
    """Optuna's journal file ``NAME.journal``, and the study's lock ``NAME.lock``.

    ``NAME.append.lock`` is held while the journal is written, and ``NAME.trials`` has a lock for each running trial.

    A trial's lock is its heartbeat: the operating system releases it when the worker dies.
    """

    is_shared = False

    def __init__(self, folder: Path, name: str) -> None:
        self.shown = str(folder / f"{name}.journal")
        self._path = (folder / f"{name}.journal").absolute()
        self._trials = self._path.with_suffix(".trials")

    def exists(self) -> bool:
        """Return whether the journal file exists."""
        return self._path.is_file()

    def open(self) -> Any:
        """Open the journal. A last line that is incomplete (after a full disk or a power cut) is removed first."""
        import optuna
        from optuna.storages.journal import JournalFileBackend

        with writing(self._path):
            self._trials.mkdir(parents=True, exist_ok=True)
            appending = FileLock(self._path.with_suffix(".append.lock"))
            with appending, self._path.open("a+b") as file:
                file.seek(0)
                content = file.read()
                if content and not content.startswith(b"{"):
                    raise InputError(f"{self.shown}: not a journal; move it away, or give another --study")
                complete = content.rfind(b"\n") + 1
                if complete < len(content):
                    file.truncate(complete)
        try:
            # The operating system's lock: Optuna's own lock stays for half a minute after its process is killed.
            return optuna.storages.JournalStorage(JournalFileBackend(str(self._path), lock_obj=appending))
        except (ValueError, KeyError) as error:  # raised by Optuna for lines that are not its own
            raise InputError(f"{self.shown}: damaged ({error}); move it away, or give another --study") from None

    def lock(self) -> Any:
        """Return the study's file lock."""
        return FileLock(self._path.with_suffix(".lock"))

    @contextmanager
    def heartbeat(self, number: int) -> Iterator[None]:
        """Hold the trial's file lock."""
        lock = self._trial_lock(number)
        lock.acquire(blocking=False)
        try:
            yield
        finally:
            lock.release()
            Path(lock.lock_file).unlink(missing_ok=True)

    def fail_lost(self, study: Any) -> None:
        """Set running trials to FAIL if their file lock is free."""
        from optuna.trial import TrialState

        for trial in study.get_trials(deepcopy=False, states=[TrialState.RUNNING]):
            lock = self._trial_lock(trial.number)
            try:
                lock.acquire(blocking=False)
            except Timeout:
                continue
            # The lock is also free if the trial has ended since the list was made.
            study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
            lock.release()
            Path(lock.lock_file).unlink(missing_ok=True)

    @contextmanager
    def faults(self) -> Iterator[None]:
        """Turn errors of writing to the disk, such as a full disk, into an Outage."""
        with writing(self._path):
            yield

    def _trial_lock(self, number: int) -> FileLock:
        return FileLock(self._trials / f"{number}.lock")


class DatabaseStudyStorage(StudyStorage):
    """A PostgreSQL database, with its advisory locks and with Optuna's heartbeats."""

    is_shared = True

    def __init__(self, url: str, name: str, heartbeat: int) -> None:
        self.shown = shown_uri(url)
        self._url = url
        self._name = name
        self._interval = heartbeat
        self._storage: Any = None
        try:
            import psycopg  # noqa: F401
        except ImportError:
            raise InputError(f"--storage {self.shown}: needs psycopg; pip install 'psycopg[binary]'") from None

    def exists(self) -> bool:
        """Return whether Optuna's tables exist."""
        import sqlalchemy

        with self.faults():
            engine = self._engine()
            try:
                return bool(sqlalchemy.inspect(engine).has_table("studies"))
            finally:
                engine.dispose()

    def open(self) -> Any:
        """Open the database; create Optuna's tables if they do not exist."""
        import optuna

        with self.faults():
            engine = self._engine()
            with engine.begin() as connection:
                _take_lock(connection, "capexp: tables")  # otherwise two processes could both create the tables
                try:
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                        self._storage = optuna.storages.RDBStorage(
                            self._url,
                            engine_kwargs=_engine_options(),
                            heartbeat_interval=self._interval,
                            grace_period=_LOST_AFTER * self._interval,
                        )
                except RuntimeError as error:  # tables of another version of Optuna
                    raise InputError(f"--storage {self.shown}: {error}") from None
                except KeyError:  # the version table is another program's
                    raise InputError(
                        f"--storage {self.shown}: holds another program's tables; give the study a database of its own"
                    ) from None
            engine.dispose()
        return self._storage

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold an advisory lock of the database, which the server releases when the connection ends."""
        from sqlalchemy.exc import SQLAlchemyError

        with self.faults():
            connection = self._storage.engine.connect()
            _take_lock(connection, f"capexp: {self._name}")
        try:
            yield
        finally:
            with suppress(SQLAlchemyError):  # a lost connection has released the lock already
                connection.rollback()
                connection.close()

    @contextmanager
    def heartbeat(self, number: int) -> Iterator[None]:
        """Record heartbeats of the trial from a thread."""
        study = self._storage.get_study_id_from_name(self._name)
        trial = self._storage.get_trial_id_from_study_id_trial_number(study, number)
        self._storage.record_heartbeat(trial)
        stopped = threading.Event()

        def beat() -> None:
            while not stopped.wait(self._interval):
                try:
                    with self.faults():
                        self._storage.record_heartbeat(trial)
                except Outage as outage:
                    log.warning("%s", outage)

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stopped.set()
            thread.join()

    def fail_lost(self, study: Any) -> None:
        """Set running trials to FAIL if their last heartbeat is too old."""
        import optuna

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            optuna.storages.fail_stale_trials(study)

    @contextmanager
    def faults(self) -> Iterator[None]:
        """Turn errors of SQLAlchemy, and Optuna's errors about them, into an Outage."""
        from optuna.exceptions import StorageInternalError
        from sqlalchemy.exc import SQLAlchemyError

        try:
            yield
        except (SQLAlchemyError, StorageInternalError) as error:
            cause = error.__cause__ or error  # the database's own message
            reason = without_secrets(str(cause).strip().splitlines()[0], self._url)
            raise Outage(f"--storage {self.shown}: {reason}; fix it, then run the same command again") from None

    def _engine(self) -> Any:
        import sqlalchemy

        return sqlalchemy.create_engine(self._url, **_engine_options())


def find_storage(url: str | None, folder: Path, name: str, heartbeat: int) -> StudyStorage:
    """Return the storage that ``--storage`` names, or without a ``url`` the journal in ``folder``.

    ``heartbeat`` is the number of seconds between two heartbeats in a database.
    """
    if url is None:
        return JournalStudyStorage(folder, name)
    from sqlalchemy import make_url

    expected = "postgresql://USER@HOST:PORT/DATABASE; without --storage a study is kept in a file"
    try:
        parsed = make_url(url)
        dialect = parsed.get_backend_name()
    except Exception:  # exceptions of many types, whose messages may quote the password in the URL
        raise InputError(f"--storage: not a URL; give {expected}") from None
    if dialect != "postgresql":
        raise InputError(f"--storage {shown_uri(url)}: not a PostgreSQL database; give {expected}")
    return DatabaseStudyStorage(url, name, heartbeat)


def _engine_options() -> dict[str, Any]:
    return {"pool_pre_ping": True, "connect_args": {"connect_timeout": _CONNECT_SECONDS}}


def _take_lock(connection: Any, name: str) -> None:
    """Wait for an advisory lock, which is held until the connection's transaction ends."""
    from sqlalchemy import text

    # The server notices within two minutes that a machine has left the network, and releases its lock.
    for setting, seconds in (("idle", 30), ("interval", 10)):
        connection.execute(text(f"SET LOCAL tcp_keepalives_{setting} = {seconds}"))
    connection.execute(text("SELECT pg_advisory_xact_lock(hashtext(:name))"), {"name": name})
