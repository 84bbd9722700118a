"""Files that are whole or not there."""

import os
import threading
from pathlib import Path

import pytest

from capexp.data.errors import InputError
from capexp.data.files import write_whole


def test_a_link_stays_and_its_file_is_written(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there/scores.json").write_text("old")
    (tmp_path / "link.json").symlink_to("there/scores.json")
    write_whole(tmp_path / "link.json", "new")
    assert (tmp_path / "link.json").is_symlink()
    assert (tmp_path / "there/scores.json").read_text() == "new"


def test_a_pipe_stays_one_and_is_written_to(tmp_path: Path) -> None:
    pipe, read = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    write_whole(pipe, "scores")
    reader.join(timeout=10)
    assert read == ["scores"]
    assert pipe.is_fifo()


def test_what_cannot_be_written_leaves_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("old")
    (tmp_path / f".x.json.{os.getpid()}.part").mkdir()  # in the way
    with pytest.raises(InputError, match="cannot be written"):
        write_whole(tmp_path / "x.json", "new")
    assert (tmp_path / "x.json").read_text() == "old"
