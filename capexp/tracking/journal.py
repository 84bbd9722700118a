"""What is to be logged to a run, kept in the run's folder from before it is sent."""

import json
import os
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from capexp.errors import InputError
from capexp.files import writing
from capexp.tracking.store import undisturbed

JOURNAL = "journal.jsonl"
"""Its name in a run's folder."""
_SENT = "sent"


@dataclass(frozen=True)
class Entry:
    """Something to be logged."""

    number: int
    kind: str
    content: Any
    """Plain values, as JSON has them."""


class Journal:
    """A file with a line of JSON an entry, and a line that tells the numbers of those that the store has taken.

    An entry is on disk before anything is done about it. What was taken just before a power cut may be told of as
    waiting; so whatever an entry asks for, doing it again must change nothing.
    """

    def __init__(self, path: Path) -> None:
        """Makes the file, or goes on with it; a last line that a kill has cut short is taken off.

        Raises:
            InputError: it cannot be written, or holds something else.
        """
        self.path = path
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            content = path.read_bytes() if path.exists() else b""
            whole = content.rfind(b"\n") + 1
            if whole < len(content):
                os.truncate(path, whole)
            else:
                path.touch()
        self._entries: dict[int, Entry] = {}
        self._sent: set[int] = set()
        self._lock = threading.Lock()
        for number, line in enumerate(content[:whole].splitlines(), 1):
            self._read(number, line)

    @property
    def entries(self) -> list[Entry]:
        """All, in order."""
        with self._lock:
            return list(self._entries.values())

    @property
    def waiting(self) -> list[Entry]:
        """Those that the store has not taken, in order."""
        with self._lock:
            return [entry for entry in self._entries.values() if entry.number not in self._sent]

    def write(self, kind: str, content: Any) -> Entry:
        """Adds an entry; it survives a power cut.

        Raises:
            InputError: the disk is full, or the file cannot be written.
        """
        with undisturbed(), self._lock:
            entry = Entry(max(self._entries, default=0) + 1, kind, content)
            self._append({"number": entry.number, "kind": kind, "content": content}, durable=True)
            self._entries[entry.number] = entry
        return entry

    def mark_sent(self, entries: Iterable[Entry]) -> None:
        """Notes that the store has taken entries.

        Raises:
            InputError: as :meth:`write`.
        """
        numbers = [entry.number for entry in entries]
        if numbers:
            with undisturbed(), self._lock:
                self._append({_SENT: numbers}, durable=False)
                self._sent.update(numbers)

    def _append(self, line: dict[str, Any], durable: bool) -> None:
        content = json.dumps(line).encode() + b"\n"
        with writing(self.path), self.path.open("ab", buffering=0) as file:
            before = file.tell()
            try:
                while content:
                    content = content[file.write(content) :]
                if durable:
                    os.fsync(file.fileno())
            except OSError:
                file.truncate(before)  # half a line would spoil the next one
                raise

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
