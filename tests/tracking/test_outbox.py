import threading
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from capexp.errors import InputError
from capexp.tracking.outbox import JOURNAL, Entry, Journal

CONTENTS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@settings(deadline=None, max_examples=20)
@given(st.lists(st.tuples(st.text(), CONTENTS), max_size=8), st.data())
def test_what_was_written_before_a_kill_is_there_and_the_journal_goes_on(
    tmp_path_factory: pytest.TempPathFactory, written: list[tuple[str, object]], data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("run") / JOURNAL
    journal = Journal(path)
    sizes, entries = [0], []
    for kind, content in written:
        entries.append(journal.write(kind, content))
        sizes.append(path.stat().st_size)
    assert [(entry.kind, entry.content) for entry in Journal(path).waiting] == written
    cut = data.draw(st.integers(0, sizes[-1]))
    path.write_bytes(path.read_bytes()[:cut])
    again = Journal(path)
    whole = sum(size <= cut for size in sizes) - 1
    assert again.entries == again.waiting == entries[:whole]
    entry = again.write("tags", {})
    again.mark_sent(entries[: whole // 2])
    assert Journal(path).entries == [*entries[:whole], entry]
    assert Journal(path).waiting == [*entries[whole // 2 : whole], entry]


def test_threads_that_write_at_once_give_each_entry_a_line_and_a_number(tmp_path: Path) -> None:
    journal = Journal(tmp_path / JOURNAL)

    def write(which: int) -> None:
        for number in range(20):
            journal.mark_sent([journal.write("metrics", [which, number])])

    threads = [threading.Thread(target=write, args=(which,)) for which in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    held = Journal(tmp_path / JOURNAL)
    assert [entry.number for entry in held.entries] == list(range(1, 81))
    assert len({tuple(entry.content) for entry in held.entries}) == 80
    assert held.waiting == []


@pytest.mark.parametrize(
    "line", [b"{}", b"[]", b"\xff", b'{"sent": 3}', b'{"number": "x", "kind": "tags"}', b"[" * 10**5]
)
def test_a_damaged_journal_is_told_with_its_line(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / JOURNAL
    Journal(path).write("tags", {})
    path.write_bytes(path.read_bytes() + line + b"\n")
    with pytest.raises(InputError, match=r"journal.jsonl, line 2: "):
        Journal(path)


def test_numbers_go_on_after_those_of_an_earlier_process(tmp_path: Path) -> None:
    Journal(tmp_path / JOURNAL).write("tags", {})
    assert Journal(tmp_path / JOURNAL).write("tags", {}) == Entry(2, "tags", {})


def test_several_processes_that_write_one_journal_keep_each_others_entries(tmp_path: Path) -> None:
    """As those of a study, which all have its run open."""
    first, second = (Journal(tmp_path / JOURNAL) for _ in range(2))
    kept = first.write("tags", {"by": "first"})
    second.mark_sent([second.write("tags", {"by": "second"})])
    assert Journal(tmp_path / JOURNAL).waiting == [kept]
    first.mark_sent([kept])
    assert [entry.number for entry in Journal(tmp_path / JOURNAL).entries] == [1, 2]
    assert first.write("tags", {}).number == 3
