"""What a run logs on its way to MLflow: written to a journal in the run's folder, then sent and retried.

To a local store it is sent at once, to a server by a thread, so that a server that is away holds nobody up. MLflow's
own queue for asynchronous logging does not survive a kill.
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
METRICS, PARAMS, TAGS, INPUT, ARTIFACT = "metrics", "params", "tags", "input", "artifact"
"""The kinds of entries that an outbox sends; other kinds are the business of :class:`TrackedRun`."""
_KINDS = (METRICS, PARAMS, TAGS, INPUT, ARTIFACT)
_FIRST_WAIT, _LONGEST_WAIT = 1.0, 15.0  # seconds between two tries
_MOST_METRICS = 1000  # that MLflow takes at once,
_MOST_PARAMS = 100  # and of params
_SENT = "sent"


@dataclass(frozen=True)
class Entry:
    """Something to log."""

    number: int
    kind: str
    content: Any
    """JSON values."""


class Journal:
    """A file of JSON lines: one for each entry, and one for each acknowledgement, with the numbers of entries sent.

    An entry is on disk (fsync) before it is sent. An acknowledgement may be lost in a power cut, so sending an entry
    twice must change nothing.
    """

    def __init__(self, path: Path) -> None:
        """Create the file, or read it; a last line that a kill has cut short is removed."""
        self.path = path
        self._entries: dict[int, Entry] = {}
        self._sent: set[int] = set()
        self._lock = threading.Lock()
        self._size, self._lines = 0, 0  # of what was read, and written here
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        with self._opened():
            pass

    @property
    def entries(self) -> list[Entry]:
        """All entries, in order."""
        with self._lock:
            return list(self._entries.values())

    @property
    def waiting(self) -> list[Entry]:
        """The entries that are not sent yet, in order."""
        with self._lock:
            return [entry for entry in self._entries.values() if entry.number not in self._sent]

    def write(self, kind: str, content: Any) -> Entry:
        """Append an entry durably; return it."""
        with undisturbed(), self._lock, self._opened() as file:
            entry = Entry(max(self._entries, default=0) + 1, kind, content)
            self._append(file, {"number": entry.number, "kind": kind, "content": content}, durable=True)
            self._entries[entry.number] = entry
        return entry

    def mark_sent(self, entries: Iterable[Entry]) -> None:
        """Record that entries are sent."""
        numbers = [entry.number for entry in entries]
        if numbers:
            with undisturbed(), self._lock, self._opened() as file:
                self._append(file, {_SENT: numbers}, durable=False)
                self._sent.update(numbers)

    @contextmanager
    def _opened(self) -> Iterator[FileIO]:
        """Open the file for this process alone, and read what others have written: a study's run has several."""
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
        content = json.dumps(line).encode() + b"\n"
        left = content
        try:
            while left:
                left = left[file.write(left) :]
            if durable:
                os.fsync(file.fileno())
        except OSError:
            file.truncate(self._size)  # half a line would spoil the next one
            raise
        self._size += len(content)
        self._lines += 1

    def _read(self, number: int, line: bytes) -> None:
        try:
            record = json.loads(line)
            if _SENT in record:
                self._sent.update(map(int, record[_SENT]))
            else:
                entry = Entry(int(record["number"]), str(record["kind"]), record["content"])
                self._entries[entry.number] = entry
        except (ValueError, TypeError, KeyError, RecursionError):
            raise InputError(
                f"{self.path}, line {number}: no line of a run's journal; restore the file, or delete it to give up "
                "what was not sent yet"
            ) from None


class Outbox:
    """Sends a run's journal in order. What a server does not take is retried, and nobody waits for it."""

    def __init__(self, run_id: str, folder: Path, journal: Journal, in_background: bool) -> None:
        """Begin with the entries that an earlier process has left unsent; ``folder`` holds the artifacts."""
        self._run_id, self._folder, self._journal = run_id, folder, journal
        self._client = MlflowClient()
        self._changed = threading.Condition(threading.RLock())
        self._queue = [entry for entry in journal.waiting if entry.kind in _KINDS]
        self._is_closed = False
        self._moved_at = time.monotonic()
        self._fault: Exception | None = None  # why the last try failed
        self._thread: threading.Thread | None = None
        if in_background:
            self._thread = threading.Thread(target=self._work, name="capexp-outbox", daemon=True)
            self._thread.start()

    def log(self, kind: str, content: Any) -> None:
        """Write an entry to the journal and send it: at once to a local store, from the thread to a server.

        Raises MLflow's exception where a local store refuses it, or a server does not know the run.
        """
        with undisturbed(), self._changed:
            self._queue.append(self._journal.write(kind, content))
            self._changed.notify_all()
        if self._thread is None:
            self.flush()
        else:
            self._refuse_missing()

    def flush(self) -> None:
        """Send all that waits, from the calling thread; raises MLflow's exception where the store refuses it."""
        with self._changed:
            while self._queue:
                with local_write():
                    self._send_some()

    def drain(self, seconds: float) -> Exception | None:
        """Wait until all is sent, or nothing was sent for so many seconds; return the fault, if any."""
        if self._thread is None:
            self.flush()
            return None
        start = time.monotonic()
        with self._changed:
            self._changed.notify_all()  # ends a wait between two tries
            while self._queue:
                self._refuse_missing()
                left = max(start, self._moved_at) + seconds - time.monotonic()
                if left <= 0:
                    return self._fault or TimeoutError(f"nothing was taken for {seconds:.0f} s")
                self._changed.wait(left)
        return None

    def close(self) -> None:
        """Stop sending."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def _work(self) -> None:
        pause = _FIRST_WAIT
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._is_closed)
                if self._is_closed:
                    return
            try:
                self._send_some()
            except Exception as error:  # stores for artifacts raise what their libraries do
                with self._changed:
                    if self._is_closed:
                        return
                    if self._fault is None:
                        log.warning(
                            "%s; the run goes on, and what is to be logged waits in %s",
                            fault_of(error), self._journal.path,
                        )  # fmt: skip
                    self._fault = error
                    self._changed.notify_all()
                    if isinstance(error, MlflowException) and is_missing(error):
                        return
                    self._changed.wait(pause)
                pause = min(2 * pause, _LONGEST_WAIT)
            else:
                pause = _FIRST_WAIT
                with self._changed:
                    if self._fault is not None:
                        log.warning("MLflow's store answers again")
                    self._fault = None

    def _refuse_missing(self) -> None:
        """Raise the fault that makes retrying useless: a run that was deleted."""
        fault = self._fault
        if isinstance(fault, MlflowException) and is_missing(fault):
            raise fault

    def _send_some(self) -> None:
        """Send the first entry that waits, with those behind it that fit into one request."""
        with self._changed:
            some = _together(self._queue)
        send(self._client, self._run_id, self._folder, some)
        with self._changed:
            self._journal.mark_sent(some)
            del self._queue[: len(some)]
            self._moved_at = time.monotonic()
            self._changed.notify_all()


def _together(queue: Sequence[Entry]) -> list[Entry]:
    """Return the first entry; of metrics as many as fit into one request, to catch up quickly after an outage."""
    some = [queue[0]]
    if queue[0].kind == METRICS:
        count = len(queue[0].content)
        for entry in queue[1:]:
            count += len(entry.content)
            if entry.kind != METRICS or count > _MOST_METRICS:
                break
            some.append(entry)
    return some


def send(client: MlflowClient, run_id: str, folder: Path, entries: Sequence[Entry]) -> None:
    """Send one entry, or several of metrics; sent again, they change nothing.

    Raises MLflow's exception where the store refuses them, and :class:`Outage` where an artifact cannot be stored.
    """
    first = entries[0]
    if first.kind == METRICS:
        # (name, value, timestamp, step)
        client.log_batch(run_id, metrics=[Metric(*values) for entry in entries for values in entry.content])
    elif first.kind == PARAMS:
        held = client.get_run(run_id).data.params  # ``mlflow run -P`` has logged its own as text
        lacking = [Param(name, value) for name, value in first.content.items() if name not in held]
        for start in range(0, len(lacking), _MOST_PARAMS):
            client.log_batch(run_id, params=lacking[start : start + _MOST_PARAMS])
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
            inside = str(Path(first.content).parent)
            client.log_artifact(run_id, str(path), None if inside == "." else inside)
    else:
        raise AssertionError(first.kind)
