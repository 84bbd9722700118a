"""Flickr8k from a mirror, by the command as a user runs it: all that is to be there, or one line that says why not."""

import io
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from PIL import Image

from capexp.data.captions import read_splits
from capexp.data.flickr8k import CAPTIONS, NOTICE, PHOTOS, Contents, bring, check
from capexp.download import OUTPUT
from capexp.errors import InputError
from capexp.experiment import FOLDER, find_experiment, load_experiment
from capexp.settings import CaptionsConfig

ROOT = Path(__file__).parents[1]
ODD = "2258277193_586949ec62.jpg"
TRAIN, DEV, TEST = (f"Flickr_8k.{split}Images.txt" for split in ("train", "dev", "test"))
OTHERS = ("Flickr8k.lemma.token.txt", "ExpertAnnotations.txt", "CrowdFlowerAnnotations.txt", "readme.txt")
PHOTO_ZIP, TEXT_ZIP = "Flickr8k_Dataset.zip", "Flickr8k_text.zip"
SMALL = Contents(photos=12, captions=65, train=6, dev=2, test=2)


def pack(folder: Path, photos: dict[str, bytes], texts: dict[str, str]) -> None:
    """The two archives in the layout of the real ones, what a Mac adds included."""
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / PHOTO_ZIP, "w") as archive:
        archive.writestr(f"{PHOTOS}/", "")
        for name, content in photos.items():
            archive.writestr(f"{PHOTOS}/{name}", content)
        archive.writestr(f"__MACOSX/{PHOTOS}/._x.jpg", "x")
    with zipfile.ZipFile(folder / TEXT_ZIP, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in OTHERS:
            archive.writestr(name, "text\n")
        for name, text in texts.items():
            archive.writestr(name, text)
        archive.writestr("__MACOSX/._readme.txt", "x")


def texts_of(names: list[str], contents: Contents) -> dict[str, str]:
    """Five captions a photo and five of one that is not there, as Flickr8k has them, and the lists."""
    lines = [f"{name}#{index}\tA dog runs .\n" for name in names for index in range(5)]
    lines += [f"{ODD}#{index}\tpeople wait\n" for index in range(1, 5)] + [f"{ODD}.1#0\tpeople waiting\n"]
    texts, begin = {CAPTIONS: "".join(lines)}, 0
    for name, count in contents.lists().items():
        texts[name] = "".join(f"{photo}\n" for photo in names[begin : begin + count])
        begin += count
    return texts


@pytest.fixture
def small(scenes: Path, tmp_path: Path) -> Path:
    """A folder with a mirror of twelve drawn photos."""
    drawn = sorted((scenes / "Scenes_Dataset").iterdir())[: SMALL.photos]
    photos = {f"{number}_photo.jpg": path.read_bytes() for number, path in enumerate(drawn)}
    pack(tmp_path / "mirror", photos, texts_of(list(photos), SMALL))
    return tmp_path / "mirror"


class Mirror(ThreadingHTTPServer):
    """Serves a folder with ranges; breaks each answer of the photos off after ``most`` bytes, ``breaks`` times."""

    daemon_threads = True

    def __init__(self, folder: Path, breaks: int = 0, most: int = 0) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.folder, self.breaks, self.most = folder, breaks, most
        self.hold = threading.Event()
        self.hold.set()
        self.sent: list[tuple[str, int, int]] = []
        """Name, and from where to where, an answer each."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/"

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that was killed is no fault."""


class Answer(BaseHTTPRequestHandler):
    server: Mirror

    def do_GET(self) -> None:
        path = self.server.folder / Path(self.path).name
        if not path.is_file():
            return self.send_error(404)
        content, start, status = path.read_bytes(), 0, 200
        if asked := self.headers.get("Range"):
            assert self.headers["If-Range"] == '"one"'
            start, status = int(asked.removeprefix("bytes=").removesuffix("-")), 206
        end = len(content)
        if path.name == PHOTO_ZIP and self.server.breaks:
            self.server.breaks -= 1
            end = min(start + self.server.most, end)
        self.send_response(status)
        self.send_header("ETag", '"one"')
        self.send_header("Content-Length", str(len(content) - start))
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        self.server.sent.append((path.name, start, end))
        self.wfile.write(content[start:end])
        self.server.hold.wait()

    def log_message(self, format: str, *arguments: object) -> None:
        """Silence."""


@pytest.fixture
def serving() -> Iterator[list[Mirror]]:
    """The servers that a test starts."""
    servers: list[Mirror] = []
    yield servers
    for server in servers:
        server.hold.set()
        server.shutdown()
        server.server_close()


def serve(serving: list[Mirror], folder: Path, breaks: int = 0, most: int = 0) -> Mirror:
    serving.append(Mirror(folder, breaks, most))
    threading.Thread(target=serving[-1].serve_forever, args=(0.01,), daemon=True).start()
    return serving[-1]


def start(*arguments: str | Path) -> subprocess.Popen[str]:
    environment = {key: value for key, value in os.environ.items() if key != "CAPEXP_OFFLINE"}
    words = [sys.executable, "-m", "capexp.download", *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(words, cwd=ROOT, env=environment, text=True, stdout=pipe, stderr=pipe)


def run(*arguments: str | Path, status: int = 0) -> tuple[str, str]:
    process = start(*arguments)
    out, err = process.communicate(timeout=300)
    print(out, err)
    assert process.returncode == status, f"{out}\n{err}"
    return out, err


def unpacked(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.suffix != ".lock"}


def test_the_default_folder_is_the_one_the_experiments_name() -> None:
    assert FOLDER.parent / "cache" / "flickr8k" == OUTPUT
    for name in ("flickr8k-merge", "flickr8k-merge-conv"):
        assert load_experiment(find_experiment(name), {}).captions.root.resolve() == OUTPUT.resolve()


def test_a_mirror_becomes_a_data_set(small: Path, serving: list[Mirror], tmp_path: Path) -> None:
    mirror, output = serve(serving, small, breaks=1, most=20_000), tmp_path / "out"
    bring(output, mirror.url.rstrip("/"), SMALL)
    assert unpacked(output) == {PHOTOS, CAPTIONS, TRAIN, DEV, TEST, *OTHERS}
    with zipfile.ZipFile(small / PHOTO_ZIP) as archive:
        for path in (output / PHOTOS).iterdir():
            assert path.read_bytes() == archive.read(f"{PHOTOS}/{path.name}")
    assert len(list((output / PHOTOS).iterdir())) == 12
    splits = read_splits(CaptionsConfig(root=output), ("train", "dev", "test"))
    assert [len(split.photos) for split in splits.values()] == [6, 2, 2]
    spans = [(begin, end) for name, begin, end in mirror.sent if name == PHOTO_ZIP]
    size = (small / PHOTO_ZIP).stat().st_size
    assert spans == [(0, 20_000), (20_000, size)]


def test_what_is_complete_is_not_brought_again(small: Path, serving: list[Mirror], tmp_path: Path) -> None:
    mirror, said = serve(serving, small), list[str]()
    bring(tmp_path / "out", mirror.url, SMALL, say=said.append)
    assert NOTICE in said
    before = len(mirror.sent)
    for source in (mirror.url, "http://127.0.0.1:9/", str(tmp_path / "nowhere")):
        said.clear()
        bring(tmp_path / "out", source, SMALL, say=said.append)
        printed = "\n".join(said)
        assert "complete already, nothing is fetched" in printed and "12 photos, 65 captions" in printed
    assert len(mirror.sent) == before


def test_only_what_is_lacking_is_brought(small: Path, serving: list[Mirror], tmp_path: Path) -> None:
    mirror, output = serve(serving, small), tmp_path / "out"
    bring(output, mirror.url, SMALL)
    mirror.sent.clear()
    (output / DEV).unlink()
    bring(output, mirror.url, SMALL)
    assert [name for name, _, _ in mirror.sent] == [TEXT_ZIP]


def test_fetched_archives_stay_where_asked_for(small: Path, serving: list[Mirror], tmp_path: Path) -> None:
    mirror, output = serve(serving, small), tmp_path / "out"
    bring(output, mirror.url, SMALL, keep=True)
    bring(output, mirror.url, SMALL)
    for name in (PHOTO_ZIP, TEXT_ZIP):
        assert (output / name).read_bytes() == (small / name).read_bytes()


def test_a_folder_serves_as_source_and_keeps_its_archives(small: Path, tmp_path: Path) -> None:
    bring(tmp_path / "out", str(small), SMALL)
    bring(small, str(small), SMALL)  # in place
    assert unpacked(tmp_path / "out") == {PHOTOS, CAPTIONS, TRAIN, DEV, TEST, *OTHERS}
    assert unpacked(small) == unpacked(tmp_path / "out") | {PHOTO_ZIP, TEXT_ZIP}


def test_one_archive_alone_is_fetched_and_checked(small: Path, serving: list[Mirror], tmp_path: Path) -> None:
    mirror, said = serve(serving, small), list[str]()
    bring(tmp_path / "text", mirror.url, SMALL, only="text", say=said.append)
    assert {name for name, _, _ in mirror.sent} == {TEXT_ZIP}
    lists = " + ".join(
        f"{getattr(SMALL, split)} {split}" for split in ("train", "dev", "test") if getattr(SMALL, split)
    )
    assert said[-1] == f"{tmp_path / 'text'}: {SMALL.captions:,} captions, lists of {lists} photos"
    assert not (tmp_path / "text" / PHOTOS).exists()
    bring(tmp_path / "photos", str(small), SMALL, only="photos", say=said.append)
    assert said[-1] == f"{tmp_path / 'photos'}: {SMALL.photos} photos"
    assert {path.name for path in (tmp_path / "photos").iterdir()} == {PHOTOS, "download.lock"}
    (tmp_path / "text" / CAPTIONS).write_text("a.jpg#0\tA dog .\n")
    with pytest.raises(InputError, match=rf"{CAPTIONS}: 1 captions, not {SMALL.captions}"):
        bring(tmp_path / "text", mirror.url, SMALL, only="text")


def test_a_damaged_archive_is_downloaded_again(small: Path, serving: list[Mirror], tmp_path: Path) -> None:
    mirror, output = serve(serving, small), tmp_path / "out"
    good = (small / PHOTO_ZIP).read_bytes()
    (small / PHOTO_ZIP).write_bytes(good.replace(b"\xff\xd9", b"\xff\xd8", 1))
    with pytest.raises(InputError, match=r"damaged.*CRC.*; it is deleted, and the same command downloads it again"):
        bring(output, mirror.url, SMALL)
    assert not (output / PHOTO_ZIP).exists() and not (output / PHOTOS).exists()
    with pytest.raises(InputError, match=r"damaged.*put another copy in its place"):
        bring(output, str(small), SMALL)
    assert (small / PHOTO_ZIP).exists()
    (small / PHOTO_ZIP).write_bytes(good)
    bring(output, mirror.url, SMALL)


def test_captions_without_a_photo_are_told_where_no_list_names_it(small: Path, tmp_path: Path) -> None:
    bring(tmp_path / "out", str(small), SMALL)
    told = check(tmp_path / "out", SMALL)
    assert told.endswith(f"captions of 2 photos that are not there and in no list are left out: {ODD}, {ODD}.1")


@pytest.mark.parametrize(
    ("contents", "file", "text", "part"),
    [
        (replace(SMALL, photos=13), None, "", f"{PHOTOS}: 12 photos, not 13; delete what is in"),
        (replace(SMALL, captions=40_460), None, "", f"{CAPTIONS}: 65 captions, not 40,460; delete what is in"),
        (replace(SMALL, train=7), None, "", f"{TRAIN}: 6 photos, not 7; delete what is in"),
        (SMALL, TEST, "8_photo.jpg\n", f"{TEST}: 1 photos, not 2; delete what is in"),
        (SMALL, TEST, "8_photo.jpg\n5_photo.jpg\n", f"{TEST} share 1 photos: 5_photo.jpg"),
        (SMALL, TEST, f"8_photo.jpg\n{ODD}\n", f"photos are not in {{output}}/{PHOTOS}: {ODD}; "),
        (SMALL, TEST, "8_photo.jpg\nx.jpg\n", f"have no captions in {{output}}/{CAPTIONS}: x.jpg; "),
    ],
)
def test_other_contents_than_expected_are_told(
    small: Path, tmp_path: Path, contents: Contents, file: str | None, text: str, part: str
) -> None:
    output = tmp_path / "out"
    bring(output, str(small), SMALL)
    if file is not None:
        (output / file).write_text(text)
    with pytest.raises(InputError) as caught:
        check(output, contents)
    line = str(caught.value)
    print(line)
    assert part.format(output=output) in line and "--source" in line and len(line.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--source", "http://127.0.0.1:9/", "--output", "{tmp}/out"], "Connection refused; when it can be reached"),
        (
            ["--source", "ftp://host/x", "--output", "{tmp}/out"],
            "--source ftp://host/x: neither a folder nor an http or https URL",
        ),
        (["--source", "{tmp}", "--output", "{tmp}/out"], "{tmp}/Flickr8k_text.zip: no such archive;"),
        (["--source", "{mirror}", "--output", "{tmp}/mirror/Flickr8k_text.zip/x"], "Not a directory; choose another"),
        (["--source", "{mirror}", "--output", "/proc/x"], "; choose another --output"),
        (["--training.epochs", "3"], "--training.epochs has no effect on this command"),
        (["--outptu", "x"], "--outptu has no effect on this command"),
        (["extra"], "unexpected 'extra'"),
    ],
)
def test_a_fault_ends_the_command_with_one_line(small: Path, tmp_path: Path, arguments: list[str], part: str) -> None:
    given = [word.format(tmp=tmp_path, mirror=small) for word in arguments]
    _, err = run("flickr8k", *given, status=2)
    assert err.count("\n") == 1 and err.startswith("capexp.download: ")
    assert part.format(tmp=tmp_path) in err


def test_licence_and_citation_come_before_what_a_mirror_lacks(serving: list[Mirror], tmp_path: Path) -> None:
    out, err = run("flickr8k", "--source", serve(serving, tmp_path).url, "--output", tmp_path / "out", status=2)
    assert "Hodosh" in out
    assert err.count("\n") == 1 and "Flickr8k_text.zip: the server answers 404" in err


def test_a_second_download_into_one_folder_is_refused(small: Path, serving: list[Mirror], tmp_path: Path) -> None:
    mirror, output = serve(serving, small), tmp_path / "out"
    mirror.hold.clear()
    mirror.breaks, mirror.most = 1, 20_000
    first = start("flickr8k", "--source", mirror.url, "--output", output)
    wait_for(output / f"{PHOTO_ZIP}.part", 20_000)
    _, err = run("flickr8k", "--source", mirror.url, "--output", output, status=2)
    assert "another download into this folder is under way" in err
    first.kill()
    first.communicate()


def wait_for(path: Path, size: int) -> None:
    deadline = time.monotonic() + 300
    while not (path.exists() and path.stat().st_size >= size):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_offline_forbids_fetching_but_not_a_folder(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CAPEXP_OFFLINE", "1")
    with pytest.raises(InputError, match="CAPEXP_OFFLINE forbids fetching"):
        bring(tmp_path / "out", "http://127.0.0.1:9/", SMALL)
    bring(tmp_path / "out", str(small), SMALL)
    bring(tmp_path / "out", "http://127.0.0.1:9/", SMALL)  # complete


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mirror with as many photos, captions and listed photos as Flickr8k has."""
    contents, photos = Contents(), {}
    for number in range(contents.photos):
        file = io.BytesIO()
        Image.new("RGB", (8, 8), (number % 256, number // 256 * 8, 99)).save(file, "JPEG")
        photos[f"{1_000_000_000 + 7919 * number}_{number:010x}.jpg"] = file.getvalue()
    folder = tmp_path_factory.mktemp("mirror")
    pack(folder, photos, texts_of(list(photos), contents))
    return folder


def assert_holds(output: Path, mirror: Path) -> None:
    for name in (PHOTO_ZIP, TEXT_ZIP):
        with zipfile.ZipFile(mirror / name) as archive:
            for entry in archive.infolist():
                if not entry.is_dir() and not entry.filename.startswith("__MACOSX"):
                    assert (output / entry.filename).read_bytes() == archive.read(entry)
    assert unpacked(output) == {PHOTOS, CAPTIONS, TRAIN, DEV, TEST, *OTHERS}


@pytest.mark.slow
def test_the_command_brings_all_of_it_over_a_connection_that_breaks(
    whole: Path, serving: list[Mirror], tmp_path: Path
) -> None:
    size = (whole / PHOTO_ZIP).stat().st_size
    mirror, output = serve(serving, whole, breaks=4, most=size // 6), tmp_path / "out"
    out, err = run("flickr8k", "--source", mirror.url, "--output", output)
    assert out.startswith(NOTICE)
    assert "8,091 photos, 40,460 captions, lists of 6,000 train + 1,000 dev + 1,000 test photos" in out
    assert f"captions of 2 photos that are not there and in no list are left out: {ODD}, {ODD}.1" in out
    assert out.endswith(f"python -m capexp.train --experiment flickr8k-merge-conv --captions.root {output}\n")
    assert err.count("; going on in ") == 4
    assert_holds(output, whole)
    spans = [(begin, end) for name, begin, end in mirror.sent if name == PHOTO_ZIP]
    assert spans == [*((part * (size // 6), (part + 1) * (size // 6)) for part in range(4)), (size // 6 * 4, size)]
    again, _ = run("flickr8k", "--source", mirror.url, "--output", output)
    assert "complete already, nothing is fetched" in again and NOTICE not in again
    assert len(mirror.sent) == 6


@pytest.mark.slow
def test_a_killed_command_goes_on_from_the_byte_where_it_was(
    whole: Path, serving: list[Mirror], tmp_path: Path
) -> None:
    size = (whole / PHOTO_ZIP).stat().st_size
    mirror, output = serve(serving, whole, breaks=1, most=size // 2), tmp_path / "out"
    mirror.hold.clear()
    process = start("flickr8k", "--source", mirror.url, "--output", output)
    wait_for(output / f"{PHOTO_ZIP}.part", size // 2)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    mirror.hold.set()
    run("flickr8k", "--source", mirror.url, "--output", output)
    assert [span for span in mirror.sent if span[0] == PHOTO_ZIP] == [
        (PHOTO_ZIP, 0, size // 2),
        (PHOTO_ZIP, size // 2, size),
    ]
    assert_holds(output, whole)


@pytest.mark.slow
def test_real_photos_and_captions_pass(flickr8k: Path, tmp_path: Path) -> None:
    given = ("train", "dev", "test")
    texts = {
        path.name: path.read_text(encoding="utf-8")
        for path in (flickr8k / CAPTIONS, *(flickr8k / f"Flickr_8k.{split}Images.txt" for split in given))
        if path.is_file()
    }
    photos = {path.name: path.read_bytes() for path in (flickr8k / PHOTOS).glob("*.jpg")}
    counts = {split: len(texts.get(f"Flickr_8k.{split}Images.txt", "").split()) for split in given}
    assert (counts["train"], counts["dev"]) == (6000, 1000)
    pack(tmp_path / "mirror", photos, texts)
    contents = Contents(len(photos), len(texts[CAPTIONS].splitlines()), **counts)
    said: list[str] = []
    bring(tmp_path / "out", str(tmp_path / "mirror"), contents, say=said.append)
    told = said[-1]
    print(told)
    absent = re.search(r"captions of (\d+) photos that are not there and in no list are left out", told)
    names = {line.rpartition("#")[0] for line in re.findall(r"^[^\t\n]+", texts[CAPTIONS], re.MULTILINE)}
    assert absent and int(absent[1]) == len(names - photos.keys())
    assert {ODD, f"{ODD}.1"} <= names - photos.keys()
    for path in (tmp_path / "out" / PHOTOS).iterdir():
        assert path.read_bytes() == photos[path.name]
    assert (tmp_path / "out" / CAPTIONS).read_text(encoding="utf-8") == texts[CAPTIONS]
    shutil.rmtree(tmp_path)
