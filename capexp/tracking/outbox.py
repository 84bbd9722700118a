"""The journal and the outbox, through which a run logs to MLflow.

Each entry (metrics, params, tags, an input, an artifact) is first written to the journal, a file in the run's folder.
Then the outbox sends it: at once to a local store, from a thread to a server. The thread retries while the server is
unreachable, so that training does not wait. If a process is killed, a later process reads the unsent entries from the
journal and sends them. MLflow's own asynchronous logging would lose them.
"""

import fcntl
import json
import logging
import os
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT

from capexp.errors import InputError
from capexp.files import writing
from capexp.tracking.store import artifact_faults, fault_of, is_missing, local_write, undisturbed

log = logging.getLogger(__name__)

JOURNAL = "journal.jsonl"
"""The journal's name in a run's folder."""
Point = tuple[str, float, int, int]
"""A logged value of a metric: name, value, time in milliseconds since 1970, step."""
METRICS, PARAMS, TAGS, INPUT, ARTIFACT = "metrics", "params", "tags", "input", "artifact"
"""The kinds of entries that an outbox sends. ``TrackedRun`` handles entries of other kinds."""
_KINDS = (METRICS, PARAMS, TAGS, INPUT, ARTIFACT)
_FIRST_WAIT, _LONGEST_WAIT = 1.0, 15.0  # seconds between two tries; doubled after each failure
_METRICS_PER_REQUEST, _PARAMS_PER_REQUEST = 1000, 100  # MLflow's limits
_SENT = "sent"  # the key of an acknowledgement


@dataclass(frozen=True)
class Entry:
    """An entry of the journal: something to log, or to do, once."""

    number: int
    """The entry's number in the journal, counted from 1."""
    kind: str
    """The kind of the entry, such as ``metrics``; it decides how the entry is sent."""
    content: Any
    """The content in JSON values; its structure depends on the kind."""


class Journal:
    """A file of JSON lines, which threads and processes may share.

    A line is either an entry or an acknowledgement, the list of the numbers of entries that were sent. An entry is on
    disk (fsync) before it is sent. An acknowledgement may be lost in a power cut, so sending an entry twice must change
    nothing.
    """

    def __init__(self, path: Path) -> None:
        """Create the file, or read it. An incomplete last line, left by a kill, is removed."""
        self.path = path
        self._entries: dict[int, Entry] = {}
        self._sent: set[int] = set()
        self._lock = threading.Lock()
        self._size, self._lines = 0, 0  # the bytes and lines of the file that this object has read or written
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        with self._opened():
            pass

    @property
    def entries(self) -> list[Entry]:
        """All entries, in the order of their numbers."""
        with self._lock:
            return list(self._entries.values())

    @property
    def waiting(self) -> list[Entry]:
        """The entries that are not sent yet, in the order of their numbers."""
        with self._lock:
            return [entry for entry in self._entries.values() if entry.number not in self._sent]

    def write(self, kind: str, content: Any) -> Entry:
        """Append an entry and flush it to disk; return it."""
        with undisturbed(), self._lock, self._opened() as file:
            entry = Entry(max(self._entries, default=0) + 1, kind, content)
            self._append(file, {"number": entry.number, "kind": kind, "content": content}, durable=True)
            self._entries[entry.number] = entry
        return entry

    def mark_sent(self, entries: Iterable[Entry]) -> None:
        """Append an acknowledgement: these entries were sent, or need not be sent any more."""
        numbers = [entry.number for entry in entries]
        if numbers:
            with undisturbed(), self._lock, self._opened() as file:
                self._append(file, {_SENT: numbers}, durable=False)
                self._sent.update(numbers)

    @contextmanager
    def _opened(self) -> Iterator[FileIO]:
        """Open the file under a lock, and read the lines that other processes have appended.

        The processes of a study share the study's run, and so its journal.
        """
        with writing(self.path), self.path.open("a+b", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # until it is closed
            file.seek(self._size)
            content = file.readall()
            whole = content.rfind(b"\n") + 1
            if whole < len(content):
                file.truncate(self._size + whole)
            self._size += whole
            for line in content[:whole].splitlines():
                self._lines += 1
                self._read(self._lines, line)
            yield file

    def _append(self, file: FileIO, line: dict[str, Any], durable: bool) -> None:
        """Append a line to the opened file; with ``durable``, flush it to disk."""
        content = json.dumps(line).encode() + b"\n"
        remaining = content
        try:
            while remaining:
                remaining = remaining[file.write(remaining) :]
            if durable:
                os.fsync(file.fileno())
        except OSError:
            file.truncate(self._size)  # the next line must not be appended to half a line
            raise
        self._size += len(content)
        self._lines += 1

    def _read(self, number: int, line: bytes) -> None:
        """Parse a line of the file, an entry or an acknowledgement; ``number`` is the line's, for the error."""
        try:
            record = json.loads(line)
            if _SENT in record:
                self._sent.update(map(int, record[_SENT]))
            else:
                entry = Entry(int(record["number"]), str(record["kind"]), record["content"])
                self._entries[entry.number] = entry
        except (ValueError, TypeError, KeyError, RecursionError):
            raise InputError(
                f"{self.path}, line {number}: not a line of a run's journal; restore the file, or delete it and "
                "lose the entries that were not sent yet"
            ) from None


class Outbox:
    """Sends the entries of a run's journal in order.

    To a local store they are sent by the caller of :meth:`log`, and errors are raised there. To a server they are sent
    by a thread, which retries after errors; only :meth:`drain` waits for it.
    """

    def __init__(self, run_id: str, folder: Path, journal: Journal, in_background: bool) -> None:
        """Queue the entries that an earlier process has not sent. Artifacts are files of ``folder``."""
        self._run_id, self._folder, self._journal = run_id, folder, journal
        self._client = MlflowClient()
        self._changed = threading.Condition(threading.RLock())
        self._queue = [entry for entry in journal.waiting if entry.kind in _KINDS]
        self._is_closed = False
        self._last_sent_at = time.monotonic()
        self._failure: Exception | None = None  # the error of the last try; None if it succeeded
        self._thread: threading.Thread | None = None
        if in_background:
            self._thread = threading.Thread(target=self._send_until_closed, name="capexp-outbox", daemon=True)
            self._thread.start()

    def log(self, kind: str, content: Any) -> None:
        """Write an entry to the journal and send it: at once to a local store, from the thread to a server.

        Raises MLflow's exception if a local store fails or the server has rejected a request for good, mostly because
        the run was deleted; Outage if the journal or an artifact cannot be written.
        """
        with undisturbed(), self._changed:
            self._queue.append(self._journal.write(kind, content))
            self._changed.notify_all()
        if self._thread is None:
            self.flush()
        else:
            self._raise_if_missing()

    def flush(self) -> None:
        """Send all queued entries from the calling thread; raise MLflow's exception if the store fails."""
        with self._changed:
            while self._queue:
                with local_write():
                    self._send_batch()

    def drain(self, seconds: float) -> Exception | None:
        """Wait until all entries are sent, or until none was sent for ``seconds``.

        Return None if all are sent, else the last error. Raises MLflow's exception if the run does not exist. With a
        local store this method itself sends the entries.
        """
        if self._thread is None:
            self.flush()
            return None
        start = time.monotonic()
        with self._changed:
            self._changed.notify_all()  # the thread may be waiting between two tries: try now
            while self._queue:
                self._raise_if_missing()
                seconds_left = max(start, self._last_sent_at) + seconds - time.monotonic()
                if seconds_left <= 0:
                    return self._failure or TimeoutError(f"the server accepted nothing for {seconds:.0f} s")
                self._changed.wait(seconds_left)
        return None

    def close(self) -> None:
        """Make the thread stop. Entries that are still queued stay unsent in the journal."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def _send_until_closed(self) -> None:
        """Send entries and retry after errors: the loop of the thread."""
        pause = _FIRST_WAIT
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._is_closed)
                if self._is_closed:
                    return
            try:
                self._send_batch()
            except Exception as error:  # an artifact store may raise any exception of its library
                with self._changed:
                    if self._is_closed:
                        return
                    if self._failure is None:
                        log.warning(
                            "%s; the entries that are not sent yet are kept in %s",
                            fault_of(error), self._journal.path,
                        )  # fmt: skip
                    self._failure = error
                    self._changed.notify_all()
                    if isinstance(error, MlflowException) and is_missing(error):
                        return  # see _raise_if_missing
                    self._changed.wait(pause)
                pause = min(2 * pause, _LONGEST_WAIT)
            else:
                pause = _FIRST_WAIT
                with self._changed:
                    if self._failure is not None:
                        log.warning("MLflow's store answers again")
                    self._failure = None

    def _raise_if_missing(self) -> None:
        """Raise the last error if it makes retrying useless, mostly because the run was deleted."""
        failure = self._failure
        if isinstance(failure, MlflowException) and is_missing(failure):
            raise failure

    def _send_batch(self) -> None:
        """Send the first queued entry, together with those after it that fit into the same request."""
        with self._changed:
            batch = _first_batch(self._queue)
        send(self._client, self._run_id, self._folder, batch)
        with self._changed:
            self._journal.mark_sent(batch)
            del self._queue[: len(batch)]
            self._last_sent_at = time.monotonic()
            self._changed.notify_all()


def _first_batch(queue: Sequence[Entry]) -> list[Entry]:
    """Return the first entry; if it holds metrics, with the following metrics that fit into the same request.

    After an outage many metrics are queued, and one request per entry would be slow.
    """
    batch = [queue[0]]
    if queue[0].kind == METRICS:
        count = len(queue[0].content)
        for entry in queue[1:]:
            count += len(entry.content)
            if entry.kind != METRICS or count > _METRICS_PER_REQUEST:
                break
            batch.append(entry)
    return batch


def send(client: MlflowClient, run_id: str, folder: Path, entries: Sequence[Entry]) -> None:
    """Send one entry, or several entries of metrics. Sending them again changes nothing.

    Raises MLflow's exception if the store fails, and Outage if an artifact cannot be stored.
    """
    first = entries[0]
    if first.kind == METRICS:
        # values: (name, value, timestamp, step)
        client.log_batch(run_id, metrics=[Metric(*values) for entry in entries for values in entry.content])
    elif first.kind == PARAMS:
        # MLflow rejects a second value for a param, and ``mlflow run -P`` has already logged its params as typed.
        existing = client.get_run(run_id).data.params
        missing = [Param(name, value) for name, value in first.content.items() if name not in existing]
        for start in range(0, len(missing), _PARAMS_PER_REQUEST):
            client.log_batch(run_id, params=missing[start : start + _PARAMS_PER_REQUEST])
    elif first.kind == TAGS:
        client.log_batch(run_id, tags=[RunTag(name, value) for name, value in first.content.items()])
    elif first.kind == INPUT:
        context = InputTag(MLFLOW_DATASET_CONTEXT, first.content["context"])
        dataset = Dataset(**first.content["dataset"])
        client.log_inputs(run_id, [DatasetInput(dataset, [context])])
    elif first.kind == ARTIFACT:
        path = folder / first.content
        if not path.is_file():
            log.warning("%s: is gone, and will not be among the run's artifacts", path)
            return
        with artifact_faults(run_id):
            subfolder = str(Path(first.content).parent)
            client.log_artifact(run_id, str(path), None if subfolder == "." else subfolder)
    else:
        raise AssertionError(first.kind)
