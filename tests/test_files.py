"""Files that are whole or not there."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from capexp.errors import InputError
from capexp.files import write_whole

ROOT = Path(__file__).parents[1]


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
    reader.join(timeout=300)
    assert read == ["scores"]
    assert pipe.is_fifo()


def test_a_file_that_others_write_to_as_well_is_written_in_place(tmp_path: Path) -> None:
    (tmp_path / "log.txt").write_text("before\n")
    program = "from pathlib import Path; from capexp.files import write_whole; write_whole(Path('/dev/stdout'), 'x')"
    with (tmp_path / "log.txt").open("ab") as log:
        subprocess.run([sys.executable, "-c", program], cwd=ROOT, stdout=log, check=True)
    assert (tmp_path / "log.txt").read_text() == "before\nx"
    piped = subprocess.run([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, check=True)
    assert piped.stdout == b"x"


def test_a_file_keeps_its_permissions(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("old")
    (tmp_path / "x.json").chmod(0o600)
    write_whole(tmp_path / "x.json", "new")
    assert (tmp_path / "x.json").stat().st_mode & 0o777 == 0o600


def test_what_cannot_be_written_leaves_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("old")
    (tmp_path / f".x.json.{os.getpid()}.part").mkdir()  # in the way
    with pytest.raises(InputError, match="cannot be written"):
        write_whole(tmp_path / "x.json", "new")
    assert (tmp_path / "x.json").read_text() == "old"
