"""Where a study is kept: a journal in a file, for the processes of one machine, or a PostgreSQL database, for many.

Either gives what trials counted once need: a lock over all processes of a study, which the system or the database
lets go of when its holder dies; and a sign of life for every trial at work, so that one whose worker has vanished
is found.
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

_LOST_AFTER = 3  # heartbeats missed
_CONNECT_SECONDS = 10


class Storage(ABC):
    """One study's storage."""

    shown: str
    """How it is named to a user: no password in it."""
    is_shared: bool
    """Whether other machines may be at work on the study."""

    @abstractmethod
    def exists(self) -> bool:
        """Whether there is anything yet.

        Raises:
            Outage: it cannot be reached.
        """

    @abstractmethod
    def open(self) -> Any:
        """Optuna's storage, made where it is missing.

        Raises:
            InputError: it cannot be reached, or is not what it should be.
        """

    @abstractmethod
    def alone(self) -> Any:
        """A context in which no other process of the study is in one; not to be entered twice."""

    @abstractmethod
    def alive(self, number: int) -> Any:
        """A context that shows a trial to be at work, as long as this process lives."""

    @abstractmethod
    def fail_lost(self, study: Any) -> None:
        """Tells FAIL of the running trials that show no sign of life. Only to be called ``alone``."""

    @contextmanager
    def faults(self) -> Iterator[None]:
        """Tells a fault of the storage in one line, without a password.

        Raises:
            Outage: in place of the libraries' errors.
        """
        yield


class Journal(Storage):
    """A journal beside its locks: ``NAME.journal``, ``NAME.lock``, and a lock a trial in ``NAME.trials``."""

    is_shared = False

    def __init__(self, folder: Path, name: str) -> None:
        self.shown = str(folder / f"{name}.journal")
        self._path = (folder / f"{name}.journal").absolute()
        self._trials = self._path.with_suffix(".trials")

    def exists(self) -> bool:
        """Whether the journal is there."""
        return self._path.is_file()

    def open(self) -> Any:
        """The journal, a last line that was cut short (by a full disk, a power cut) taken off."""
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
                whole = content.rfind(b"\n") + 1
                if whole < len(content):
                    file.truncate(whole)
        try:
            # A lock of the system's: Optuna's own one outlives a killed process for half a minute.
            return optuna.storages.JournalStorage(JournalFileBackend(str(self._path), lock_obj=appending))
        except (ValueError, KeyError) as error:  # what a journal that is not one leads to
            raise InputError(f"{self.shown}: damaged ({error}); move it away, or give another --study") from None

    def alone(self) -> Any:
        """The study's lock."""
        return FileLock(self._path.with_suffix(".lock"))

    @contextmanager
    def alive(self, number: int) -> Iterator[None]:
        """Holds the trial's lock."""
        lock = self._lock(number)
        lock.acquire(blocking=False)
        try:
            yield
        finally:
            lock.release()
            Path(lock.lock_file).unlink(missing_ok=True)

    def fail_lost(self, study: Any) -> None:
        """Those whose lock is free."""
        from optuna.trial import TrialState

        for trial in study.get_trials(deepcopy=False, states=[TrialState.RUNNING]):
            lock = self._lock(trial.number)
            try:
                lock.acquire(blocking=False)
            except Timeout:
                continue
            # Free also where it has ended since the list was made.
            study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
            lock.release()
            Path(lock.lock_file).unlink(missing_ok=True)

    @contextmanager
    def faults(self) -> Iterator[None]:
        """A full disk, mostly."""
        with writing(self._path):
            yield

    def _lock(self, number: int) -> FileLock:
        return FileLock(self._trials / f"{number}.lock")


class Database(Storage):
    """A PostgreSQL database, its advisory locks, and Optuna's heartbeats."""

    is_shared = True

    def __init__(self, url: str, name: str, heartbeat: int) -> None:
        self.shown = shown_uri(url)
        self._url = url
        self._name = name
        self._heartbeat = heartbeat
        self._storage: Any = None
        try:
            import psycopg  # noqa: F401
        except ImportError:
            raise InputError(f"--storage {self.shown}: needs psycopg; pip install 'psycopg[binary]'") from None

    def exists(self) -> bool:
        """Whether Optuna's tables are there."""
        import sqlalchemy

        with self.faults():
            engine = self._engine()
            try:
                return bool(sqlalchemy.inspect(engine).has_table("studies"))
            finally:
                engine.dispose()

    def open(self) -> Any:
        """The database, with Optuna's tables."""
        import optuna

        with self.faults():
            engine = self._engine()
            with engine.begin() as connection:
                _take_lock(connection, "capexp: tables")  # two first processes at once would both make them
                try:
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                        self._storage = optuna.storages.RDBStorage(
                            self._url,
                            engine_kwargs=_engine_options(),
                            heartbeat_interval=self._heartbeat,
                            grace_period=_LOST_AFTER * self._heartbeat,
                        )
                except RuntimeError as error:  # tables of another version of Optuna
                    raise InputError(f"--storage {self.shown}: {error}") from None
                except KeyError:  # whose table of versions is not Optuna's
                    raise InputError(
                        f"--storage {self.shown}: holds another program's tables; give the study a database of its own"
                    ) from None
            engine.dispose()
        return self._storage

    @contextmanager
    def alone(self) -> Iterator[None]:
        """An advisory lock of the database's; the server lets go of it when the connection ends."""
        from sqlalchemy.exc import SQLAlchemyError

        with self.faults():
            connection = self._storage.engine.connect()
            _take_lock(connection, f"capexp: {self._name}")
        try:
            yield
        finally:
            with suppress(SQLAlchemyError):  # where the connection is gone, so is the lock
                connection.rollback()
                connection.close()

    @contextmanager
    def alive(self, number: int) -> Iterator[None]:
        """Heartbeats, from a thread."""
        study = self._storage.get_study_id_from_name(self._name)
        trial = self._storage.get_trial_id_from_study_id_trial_number(study, number)
        self._storage.record_heartbeat(trial)
        over = threading.Event()

        def beat() -> None:
            while not over.wait(self._heartbeat):
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
            over.set()
            thread.join()

    def fail_lost(self, study: Any) -> None:
        """Those whose last heartbeat is too long ago."""
        import optuna

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            optuna.storages.fail_stale_trials(study)

    @contextmanager
    def faults(self) -> Iterator[None]:
        """Whatever SQLAlchemy, or Optuna about it, has to say."""
        from optuna.exceptions import StorageInternalError
        from sqlalchemy.exc import SQLAlchemyError

        try:
            yield
        except (SQLAlchemyError, StorageInternalError) as error:
            cause = error.__cause__ or error  # what the database itself says
            reason = without_secrets(str(cause).strip().splitlines()[0], self._url)
            raise Outage(f"--storage {self.shown}: {reason}; mend it, then give the same command again") from None

    def _engine(self) -> Any:
        import sqlalchemy

        return sqlalchemy.create_engine(self._url, **_engine_options())


def find_storage(url: str | None, folder: Path, name: str, heartbeat: int) -> Storage:
    """The storage that ``--storage`` names; the journal in ``folder`` where it names none.

    Raises:
        InputError: not a URL of a PostgreSQL database, or its driver is not installed.
    """
    if url is None:
        return Journal(folder, name)
    from sqlalchemy import make_url

    wanted = "postgresql://USER@HOST:PORT/DATABASE; without --storage a study is kept in a file"
    try:
        parsed = make_url(url)
        dialect = parsed.get_backend_name()
    except Exception:  # of many kinds, each quoting some of the URL, the password perhaps
        raise InputError(f"--storage: not a URL; give {wanted}") from None
    if dialect != "postgresql":
        raise InputError(f"--storage {shown_uri(url)}: not a PostgreSQL database; give {wanted}")
    return Database(url, name, heartbeat)


def _engine_options() -> dict[str, Any]:
    return {"pool_pre_ping": True, "connect_args": {"connect_timeout": _CONNECT_SECONDS}}


def _take_lock(connection: Any, name: str) -> None:
    """Waits for an advisory lock that lasts as long as the connection's transaction."""
    from sqlalchemy import text

    # A machine that drops from the network is noticed within a minute, and its lock set free.
    for setting, seconds in (("idle", 30), ("interval", 10)):
        connection.execute(text(f"SET LOCAL tcp_keepalives_{setting} = {seconds}"))
    connection.execute(text("SELECT pg_advisory_xact_lock(hashtext(:name))"), {"name": name})
