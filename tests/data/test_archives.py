"""Downloads over a real server that misbehaves, and archives that nobody should unpack."""

import io
import json
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from capexp.data.archives import ArchiveError, fetch, unpack
from capexp.errors import InputError

ROOT = Path(__file__).parents[2]


def zipped(entries: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, content in entries.items():
            archive.writestr(zipfile.ZipInfo(name), content, method)
    return file.getvalue()


CONTENT = zipped({"photos/a.jpg": random.Random(0).randbytes(3_000_000)})
OTHER = zipped({"photos/b.jpg": random.Random(1).randbytes(2_900_000)})


class Mirror(ThreadingHTTPServer):
    """Serves one file as told, and notes which bytes it sent."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.content = CONTENT
        self.etag: str | None = '"one"'
        self.cuts: list[int] = []
        """After how many bytes each of the next answers breaks off."""
        self.statuses: list[int] = []
        """The next answers' own."""
        self.ranges = True
        self.headers: dict[str, str] = {}
        """These replace what is right."""
        self.after_answer: Callable[[], None] = lambda: None
        self.stall = threading.Event()
        self.stall.set()
        self.sent: list[tuple[int, int]] = []
        """From where to where, an answer each."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/some.zip"

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that was killed is no fault."""


class Answer(BaseHTTPRequestHandler):
    server: Mirror

    def do_GET(self) -> None:
        mirror, start, status = self.server, 0, 200
        content = mirror.content
        if mirror.statuses:
            self.send_response(mirror.statuses.pop(0))
            self.send_header("Location", mirror.url)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        asked = self.headers.get("Range")
        if asked and mirror.ranges and self.headers.get("If-Range") == mirror.etag:
            status, start = 206, int(asked.removeprefix("bytes=").removesuffix("-"))
        headers = {"Content-Length": str(len(content) - start), "Content-Type": "application/octet-stream"}
        if status == 206:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        if mirror.etag:
            headers["ETag"] = mirror.etag
        self.send_response(status)
        for name, value in (headers | mirror.headers).items():
            self.send_header(name, value)
        self.end_headers()
        end = min(start + mirror.cuts.pop(0), len(content)) if mirror.cuts else len(content)
        mirror.sent.append((start, end))
        self.wfile.write(content[start:end])
        mirror.after_answer()
        mirror.stall.wait()

    def log_message(self, format: str, *arguments: object) -> None:
        """Silence."""


@pytest.fixture
def mirror() -> Iterator[Mirror]:
    with Mirror() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.stall.set()
        server.shutdown()


def get(mirror: Mirror, path: Path, timeout: float = 5, pauses: tuple[float, ...] = (0, 0, 0)) -> None:
    fetch(mirror.url, path, timeout, pauses)


def refusal(action: Callable[[], None]) -> str:
    """The one line with which an action is refused."""
    with pytest.raises(InputError) as caught:
        action()
    line = str(caught.value)
    assert len(line.splitlines()) == 1
    print(line)
    return line


def test_what_arrives_is_what_was_sent_and_nothing_else_stays(mirror: Mirror, tmp_path: Path) -> None:
    get(mirror, tmp_path / "x.zip")
    assert (tmp_path / "x.zip").read_bytes() == CONTENT
    assert mirror.sent == [(0, len(CONTENT))]
    assert [path.name for path in tmp_path.iterdir()] == ["x.zip"]


def test_a_broken_download_goes_on_and_no_byte_is_sent_twice(mirror: Mirror, tmp_path: Path) -> None:
    mirror.cuts = [1, 100_001, 1, 65_536, 2_000_000, 1, 300_000]
    ends = [sum(mirror.cuts[: count + 1]) for count in range(7)]
    get(mirror, tmp_path / "x.zip")
    assert (tmp_path / "x.zip").read_bytes() == CONTENT
    assert mirror.sent == list(zip([0, *ends], [*ends, len(CONTENT)], strict=True))


def test_a_later_call_goes_on_where_an_earlier_one_gave_up(mirror: Mirror, tmp_path: Path) -> None:
    mirror.cuts = [1_000_000, 0, 0, 0]
    line = refusal(lambda: get(mirror, tmp_path / "x.zip"))
    assert "1.0 MiB are kept" in line and "the same command goes on" in line
    assert not (tmp_path / "x.zip").exists()
    get(mirror, tmp_path / "x.zip")
    assert (tmp_path / "x.zip").read_bytes() == CONTENT
    assert mirror.sent[-1] == (1_000_000, len(CONTENT))


def test_a_whole_part_is_not_asked_for_again(mirror: Mirror, tmp_path: Path) -> None:
    remote = {"url": mirror.url, "validator": mirror.etag, "size": len(CONTENT)}
    (tmp_path / "x.zip.part").write_bytes(CONTENT)
    (tmp_path / "x.zip.part.json").write_text(json.dumps(remote))
    get(mirror, tmp_path / "x.zip")
    assert (tmp_path / "x.zip").read_bytes() == CONTENT
    assert mirror.sent == []


def test_a_server_without_ranges_starts_anew(mirror: Mirror, tmp_path: Path) -> None:
    mirror.ranges, mirror.cuts = False, [1_000_000, 1_500_000]
    get(mirror, tmp_path / "x.zip")
    assert (tmp_path / "x.zip").read_bytes() == CONTENT
    assert mirror.sent == [(0, 1_000_000), (0, 1_500_000), (0, len(CONTENT))]


def test_a_server_without_ranges_that_always_breaks_at_one_place_is_given_up(mirror: Mirror, tmp_path: Path) -> None:
    mirror.ranges, mirror.cuts = False, [1_000_000] * 9
    assert "connection broke off" in refusal(lambda: get(mirror, tmp_path / "x.zip"))
    assert len(mirror.sent) == 4


@pytest.mark.parametrize("validator", ['"two"', None, 'W/"weak"'])
def test_bytes_of_two_files_are_never_put_together(mirror: Mirror, tmp_path: Path, validator: str | None) -> None:
    def change() -> None:
        mirror.content, mirror.etag = OTHER, validator

    mirror.cuts, mirror.after_answer = [1_000_000, 500_000], change
    get(mirror, tmp_path / "x.zip")
    assert (tmp_path / "x.zip").read_bytes() == OTHER
    assert mirror.sent[1][0] == 0


@pytest.mark.parametrize(
    "record", ["", "[]", '{"url": 1}', '{"url": "http://elsewhere/", "validator": "x", "size": 9}']
)
def test_bytes_of_unknown_origin_are_not_kept(mirror: Mirror, tmp_path: Path, record: str) -> None:
    (tmp_path / "x.zip.part").write_bytes(OTHER[:1000])
    (tmp_path / "x.zip.part.json").write_text(record)
    get(mirror, tmp_path / "x.zip")
    assert (tmp_path / "x.zip").read_bytes() == CONTENT


def test_last_modified_serves_where_there_is_no_strong_etag(mirror: Mirror, tmp_path: Path) -> None:
    moment = "Tue, 24 Nov 2026 00:00:00 GMT"
    mirror.etag, mirror.headers, mirror.cuts = moment, {"ETag": 'W/"x"', "Last-Modified": moment}, [1_000_000]
    get(mirror, tmp_path / "x.zip")
    assert (tmp_path / "x.zip").read_bytes() == CONTENT
    assert mirror.sent == [(0, 1_000_000), (1_000_000, len(CONTENT))]


def test_a_silent_server_is_left_and_asked_again(mirror: Mirror, tmp_path: Path) -> None:
    mirror.cuts = [1_000_000, 0]
    mirror.stall.clear()
    mirror.after_answer = lambda: mirror.stall.set() if len(mirror.sent) == 3 else None
    get(mirror, tmp_path / "x.zip", timeout=0.3)
    assert (tmp_path / "x.zip").read_bytes() == CONTENT
    assert [start for start, _ in mirror.sent] == [0, 1_000_000, 1_000_000]


def test_a_server_that_is_silent_from_the_start_is_given_up_at_once(mirror: Mirror, tmp_path: Path) -> None:
    mirror.cuts = [0]
    mirror.stall.clear()
    assert "nothing came for 0.3 s" in refusal(lambda: get(mirror, tmp_path / "x.zip", timeout=0.3))


def test_a_server_that_fails_in_between_is_asked_again(mirror: Mirror, tmp_path: Path) -> None:
    mirror.cuts = [1_000_000]
    mirror.after_answer = lambda: mirror.statuses.extend([503, 500] if len(mirror.sent) == 1 else [])
    get(mirror, tmp_path / "x.zip")
    assert (tmp_path / "x.zip").read_bytes() == CONTENT
    assert mirror.sent[-1] == (1_000_000, len(CONTENT))


def test_a_redirection_is_followed_with_the_range(mirror: Mirror, tmp_path: Path) -> None:
    mirror.statuses, mirror.cuts = [302], [1_000_000]
    mirror.after_answer = lambda: mirror.statuses.extend([302] if len(mirror.sent) == 1 else [])
    get(mirror, tmp_path / "x.zip")
    assert (tmp_path / "x.zip").read_bytes() == CONTENT
    assert mirror.sent == [(0, 1_000_000), (1_000_000, len(CONTENT))]


@pytest.mark.parametrize(
    ("statuses", "headers", "content", "part"),
    [
        ([404], {}, CONTENT, "answers 404"),
        ([403], {}, CONTENT, "answers 403"),
        ([500], {}, CONTENT, "answers 500"),
        ([302] * 99, {}, CONTENT, "Exceeded 30 redirects"),
        ([], {"Content-Type": "text/html; charset=utf-8"}, b"<!doctype html>", "a web page comes"),
        ([], {}, b"<!doctype html><p>Log in</p>", "begins with b'<!doctype html><p>Lo'"),
        ([], {}, b"", "begins with b''"),
        ([], {"Content-Encoding": "gzip"}, CONTENT, "encoded as gzip"),
        ([], {"Content-Length": str(10**15)}, CONTENT, "are needed to fetch and unpack it"),
        ([], {"Content-Length": str(len(CONTENT) + 7)}, CONTENT, f"sends 'bytes {len(CONTENT)}-"),
    ],
)
def test_what_is_no_archive_is_refused_in_one_line(
    mirror: Mirror, tmp_path: Path, statuses: list[int], headers: dict[str, str], content: bytes, part: str
) -> None:
    mirror.statuses, mirror.headers, mirror.content = statuses, headers, content
    assert part in refusal(lambda: get(mirror, tmp_path / "x.zip"))
    assert not (tmp_path / "x.zip").exists()


@pytest.mark.parametrize(
    "headers",
    [
        {"Content-Range": f"bytes 0-{len(CONTENT) - 1}/{len(CONTENT)}"},
        {"Content-Range": f"bytes 1000000-{len(CONTENT)}/{len(CONTENT) + 1}"},
        {"Content-Range": "bytes */7"},
        {"Content-Length": "7"},
    ],
)
def test_a_range_other_than_asked_for_is_refused(mirror: Mirror, tmp_path: Path, headers: dict[str, str]) -> None:
    mirror.cuts = [1_000_000]
    mirror.after_answer = lambda: mirror.headers.update(headers)
    assert "take another --source" in refusal(lambda: get(mirror, tmp_path / "x.zip"))
    assert (tmp_path / "x.zip.part").read_bytes() == CONTENT[:1_000_000]


def test_a_web_page_in_between_costs_nothing_of_what_is_there(mirror: Mirror, tmp_path: Path) -> None:
    mirror.cuts = [1_000_000, 0, 0, 0]
    refusal(lambda: get(mirror, tmp_path / "x.zip"))
    etag, mirror.etag, mirror.content = mirror.etag, None, b"<html>pay for the hotel's network</html>"
    refusal(lambda: get(mirror, tmp_path / "x.zip"))
    mirror.etag, mirror.content = etag, CONTENT
    get(mirror, tmp_path / "x.zip")
    assert (tmp_path / "x.zip").read_bytes() == CONTENT
    assert mirror.sent[-1] == (1_000_000, len(CONTENT))


@pytest.mark.parametrize(
    ("url", "part"),
    [
        ("http://127.0.0.1:9/x.zip", "Connection refused"),
        ("http://nowhere.invalid/x.zip", "http://nowhere.invalid/x.zip: "),
        ("http:///x.zip", "check the address"),
    ],
)
def test_an_address_where_nobody_answers_is_told_at_once(tmp_path: Path, url: str, part: str) -> None:
    start = time.monotonic()
    assert part in refusal(lambda: fetch(url, tmp_path / "x.zip", pauses=(600,)))
    assert time.monotonic() - start < 120


def test_a_full_disk_keeps_what_is_there(mirror: Mirror, tmp_path: Path) -> None:
    code = f"""
import resource, sys
from pathlib import Path
from capexp.data.archives import fetch
resource.setrlimit(resource.RLIMIT_FSIZE, (1_500_000, resource.RLIM_INFINITY))
try:
    fetch({mirror.url!r}, Path("x.zip"))
except ValueError as error:
    print(error)
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout.startswith("x.zip.part: File too large; free space"), done.stderr
    get(mirror, tmp_path / "x.zip")
    assert (tmp_path / "x.zip").read_bytes() == CONTENT
    assert mirror.sent[-1] == (1_500_000, len(CONTENT))


def test_a_killed_download_goes_on(mirror: Mirror, tmp_path: Path) -> None:
    mirror.cuts = [1_234_567]
    mirror.stall.clear()
    code = f"from pathlib import Path; from capexp.data.archives import fetch; fetch({mirror.url!r}, Path('x.zip'))"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)})
    part = tmp_path / "x.zip.part"
    deadline = time.monotonic() + 120
    while not (part.exists() and part.stat().st_size == 1_234_567):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    mirror.stall.set()
    get(mirror, tmp_path / "x.zip")
    assert (tmp_path / "x.zip").read_bytes() == CONTENT
    assert mirror.sent == [(0, 1_234_567), (1_234_567, len(CONTENT))]


GOOD = {"photos/a.jpg": b"a" * 5000, "photos/b.jpg": b"bc" * 10, "readme.txt": b"read\n"}


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_all_is_unpacked_but_hidden_files_and_those_of_a_mac(tmp_path: Path, method: int) -> None:
    path, folder = tmp_path / "x.zip", tmp_path / "out"
    hidden = {"__MACOSX/photos/._a.jpg": b"x", "photos/.DS_Store": b"x", ".x/y": b"x", "photos/": b""}
    path.write_bytes(zipped(GOOD | hidden, method))
    unpack(path, folder, ("photos",))
    assert tree(folder) == GOOD
    assert path.exists()


def altered(**attributes: int) -> bytes:
    """An archive one of whose entries has other attributes than it should."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in GOOD.items():
            archive.writestr(zipfile.ZipInfo(name), content)
        for name, value in attributes.items():
            setattr(archive.infolist()[1], name, value)
    return file.getvalue()


def changed(content: bytes, place: bytes, offset: int, value: bytes) -> bytes:
    at = content.rindex(place) + offset
    return content[:at] + value + content[at + len(value) :]


def encrypted() -> bytes:
    content = zipped(GOOD)
    return changed(content, b"PK\x01\x02", 8, b"\x01\x00")  # the flags of the last entry in the directory


def bad_names() -> list[str]:
    names = ["../x", "a/../../x", "/x", "//x", "C:/x", "c:x", "a\\x", "..\\x", "\\x", "a/..", "..", "__MACOSX/../../x"]
    return [*names, ".x/../../y"]


BAD = {
    **{f"name {name}": (zipped(GOOD | {name: b"x"}), "leaves the folder") for name in bad_names()},
    "symlink": (altered(external_attr=(stat.S_IFLNK | 0o777) << 16), "'photos/b.jpg' is a link or a device"),
    "device": (altered(external_attr=stat.S_IFCHR << 16), "is a link or a device"),
    "pipe": (altered(external_attr=stat.S_IFIFO << 16), "is a link or a device"),
    "encrypted": (encrypted(), "'readme.txt' is encrypted"),
    "damaged": (zipped(GOOD).replace(b"bcbc", b"bcbd", 1), "Bad CRC-32 for file 'photos/b.jpg'"),
    "declares more": (altered(file_size=21), "'photos/b.jpg' has not the size"),
    "declares less": (altered(file_size=19), "damaged"),
    "many entries": (zipped(GOOD | {f"{number}": b"" for number in range(100)}), "103 entries; 100 at most"),
    "many bytes": (zipped(GOOD | {"big": bytes(2_000_000)}, zipfile.ZIP_DEFLATED), "1,000,000 at most"),
    "lacks photos": (zipped({"readme.txt": b"x"}), "there is no photos in it"),
    "file and folder": (zipped(GOOD | {"photos": b"x"}), "two entries have one name"),
    "cut short": (zipped(GOOD)[:-30], "not a zip file"),
    "no archive": (b"<html>", "not a zip file"),
    "empty": (b"", "not a zip file"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_archive_is_refused_and_leaves_nothing(tmp_path: Path, kind: str) -> None:
    content, part = BAD[kind]
    path, folder = tmp_path / "deep/x.zip", tmp_path / "deep/out"
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(ArchiveError) as caught:
        unpack(path, folder, ("photos",), most_bytes=1_000_000, most_entries=100)
    line = str(caught.value)
    print(line)
    assert part in line and line.startswith(f"{path}: ") and len(line.splitlines()) == 1
    assert tree(tmp_path) == {"deep/x.zip": content}
    assert list(folder.iterdir()) == []


def test_an_entry_that_inflates_beyond_its_declared_size_is_cut_there(tmp_path: Path) -> None:
    bomb = zipped({"photos/a.jpg": bytes(50_000_000)}, zipfile.ZIP_DEFLATED)
    for record, offset in ((b"PK\x01\x02", 24), (b"PK\x03\x04", 22)):
        bomb = changed(bomb, record, offset, (1000).to_bytes(4, "little"))
    (tmp_path / "x.zip").write_bytes(bomb)
    with pytest.raises(ArchiveError, match="Bad CRC-32"):
        unpack(tmp_path / "x.zip", tmp_path / "out", ("photos",), most_bytes=2000)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_name_that_stands_twice_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("photos/a.jpg", "one")
        archive.writestr("photos/a.jpg", "two")
    with pytest.raises(ArchiveError, match="two entries have one name"):
        unpack(tmp_path / "x.zip", tmp_path / "out", ("photos",))


METHODS = [
    *(zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED),
    *(pytest.param(method, marks=pytest.mark.slow) for method in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)),
]


@pytest.mark.parametrize("method", METHODS)
def test_a_changed_byte_is_noticed_or_changes_no_content(tmp_path: Path, method: int) -> None:
    whole = zipped({"photos/a.jpg": b"abcdefgh" * 4, "b.txt": b"x"}, method)
    path, folder = tmp_path / "x.zip", tmp_path / "out"
    for place in range(len(whole)):
        for flip in (0x01, 0x80, 0xFF):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ flip]) + whole[place + 1 :])
            try:
                unpack(path, folder, ("photos",))
            except ArchiveError:
                assert tree(folder) == {}
            else:
                assert sorted(tree(folder).values()) == [b"abcdefgh" * 4, b"x"]
            shutil.rmtree(folder)


@pytest.mark.slow
def test_a_killed_unpacking_leaves_nothing_that_looks_done(tmp_path: Path) -> None:
    many = {f"photos/{number}.jpg": bytes(1000) for number in range(20_000)}
    (tmp_path / "x.zip").write_bytes(zipped(many | {"readme.txt": b"x"}))
    code = "from pathlib import Path; from capexp.data.archives import unpack; "
    code += "unpack(Path('x.zip'), Path('out'), ('photos',))"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)})
    deadline = time.monotonic() + 120
    while not (tmp_path / "out/x.unpacking/photos/500.jpg").exists():
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["x.unpacking"]
    unpack(tmp_path / "x.zip", tmp_path / "out", ("photos",))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"photos", "readme.txt"}
    assert len(list((tmp_path / "out/photos").iterdir())) == 20_000


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "x.zip").write_bytes(zipped(GOOD))
    (tmp_path / "file").touch()
    assert "file" in refusal(lambda: unpack(tmp_path / "x.zip", tmp_path / "file/out", ("photos",)))
