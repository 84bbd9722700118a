"""Flickr8k from a mirror that breaks off, by the command that a user types; the mirror is as large in number."""

import io
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from PIL import Image

from capexp.data.captions import CaptionsConfig, read_splits
from capexp.data.errors import InputError
from capexp.download import CAPTIONS, PHOTOS, Contents, bring, check

ROOT = Path(__file__).parents[1]
ODD = "2258277193_586949ec62.jpg.1#0\tpeople waiting for the subway\n"


def jpeg(number: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (number % 256, number // 256, 99)).save(file, "JPEG")
    return file.getvalue()


def mirror(folder: Path, contents: Contents, jpegs: Callable[[int], bytes] = jpeg) -> Path:
    """The two archives, with pictures of one colour in place of Flickr8k's photos."""
    names = [f"{number:05}.jpg" for number in range(contents.photos)]
    lines = [f"{name}#{index}\tA dog runs .\n" for name in [*names, "absent.jpg"] for index in range(5)]
    lines = [*lines[: contents.captions - 1], ODD]
    folder.mkdir()
    with zipfile.ZipFile(folder / "Flickr8k_Dataset.zip", "w") as archive:
        for number, name in enumerate(names):
            archive.writestr(f"{PHOTOS}/{name}", jpegs(number))
            if number < 20:
                archive.writestr(f"__MACOSX/{PHOTOS}/._{name}", b"?")
    with zipfile.ZipFile(folder / "Flickr8k_text.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(CAPTIONS, "".join(lines))
        archive.writestr("readme.txt", "read")
        start = 0
        for name, count in contents.lists().items():
            archive.writestr(name, "\n".join(names[start : start + count]))
            start += count
    return folder


class Breaking(SimpleHTTPRequestHandler):
    """Serves a folder, ranges too, and breaks off after a quarter of a large file, again and again."""

    requests: list[str]

    def __init__(self, *arguments: object, requests: list[str], directory: str) -> None:
        self.requests = requests
        super().__init__(*arguments, directory=directory)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404)
            return
        content = path.read_bytes()
        asked = self.headers.get("Range")
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
        self.send_response(206 if asked else 200)
        self.send_header("ETag", f'"{len(content)}"')
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        end = start + max(1_000_000, len(content) // 4)
        self.requests.append(f"{path.name} {start}-{min(end, len(content))}")
        self.wfile.write(content[start:end])

    def log_message(self, format: str, *arguments: object) -> None:
        """Silence."""


@contextmanager
def served(folder: Path) -> Iterator[tuple[str, list[str]]]:
    requests: list[str] = []
    handler = partial(Breaking, requests=requests, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}", requests
        server.shutdown()


SMALL = Contents(photos=10, captions=46, train=5, dev=2, test=2)


def test_a_folder_serves_as_a_mirror_and_keeps_its_archives(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = mirror(tmp_path / "mirror", SMALL)
    bring(tmp_path / "data", str(source), SMALL)
    printed = capsys.readouterr().out
    assert printed.index("Journal of Artificial Intelligence Research") < printed.index("10 photos, 46 captions")
    assert "2258277193_586949ec62.jpg.1" in printed
    assert set(read_splits(CaptionsConfig(root=tmp_path / "data"))) == {"train", "dev", "test"}
    assert {path.name for path in source.iterdir()} == {"Flickr8k_Dataset.zip", "Flickr8k_text.zip"}
    bring(tmp_path / "data", str(tmp_path / "nothing"), SMALL)
    assert "complete already" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("spoil", "part"),
    [
        (lambda folder: next((folder / PHOTOS).iterdir()).unlink(), "9 photos, not 10"),
        (lambda folder: (folder / CAPTIONS).write_text(ODD), "1 captions, not 46"),
        (lambda folder: (folder / "Flickr_8k.devImages.txt").write_text("00001.jpg"), "1 photos, not 2"),
        (lambda folder: (folder / "Flickr_8k.devImages.txt").write_text("00001.jpg\n00002.jpg"), "share 2 photos"),
        (lambda folder: (folder / "Flickr_8k.devImages.txt").write_text("x.jpg\ny.jpg"), "2 of its dev photos"),
    ],
)
def test_what_is_not_whole_is_told(tmp_path: Path, spoil: Callable[[Path], None], part: str) -> None:
    bring(tmp_path / "data", str(mirror(tmp_path / "mirror", SMALL)), SMALL)
    spoil(tmp_path / "data")
    with pytest.raises(InputError, match=part) as caught:
        check(tmp_path / "data", SMALL)
    assert "delete what is in" in str(caught.value)


def test_a_folder_without_the_archives_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"Flickr8k_text\.zip: no such archive"):
        bring(tmp_path / "data", str(tmp_path), SMALL)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "capexp.download", *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


@pytest.mark.slow
def test_the_command_brings_all_of_it_over_a_connection_that_breaks_off(tmp_path: Path) -> None:
    noise = os.urandom(2000)  # so that the archive has a size to break off in
    source = mirror(tmp_path / "mirror", Contents(), lambda number: jpeg(number) + noise)
    with served(source) as (url, requests):
        done = run("flickr8k", "--source", url, "--output", str(tmp_path / "data"))
    print(done.stdout, done.stderr.replace("\r", "\n"), json.dumps(requests, indent=1))
    assert done.returncode == 0, done.stderr
    assert len(requests) == 6, requests
    assert "8,091 photos, 40,460 captions, lists of 6,000 train + 1,000 dev + 1,000 test photos" in done.stdout
    assert f"--captions.root {tmp_path / 'data'}" in done.stdout
    assert done.stderr.count("going on in") == 4
    photo = tmp_path / "data" / PHOTOS / "00077.jpg"
    assert photo.read_bytes() == jpeg(77) + noise
    assert not list((tmp_path / "data").glob("*.zip*"))
    assert not (tmp_path / "data" / "__MACOSX").exists()


def test_the_command_refuses_in_one_line_with_status_2(tmp_path: Path) -> None:
    with served(tmp_path) as (url, _):
        done = run("flickr8k", "--source", url, "--output", str(tmp_path / "data"))
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("capexp.download: ") and "Flickr8k_text.zip: the server answers 404" in line
    assert "Hodosh" in done.stdout, "licence and citation are shown before anything is fetched"


@pytest.mark.slow
def test_real_flickr8k_passes_the_check(tmp_path: Path, flickr8k: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for path in flickr8k.iterdir():
        (data / path.name).symlink_to(path)
    photos = sum(1 for _ in (flickr8k / PHOTOS).glob("*.jpg"))
    lines = sum(1 for _ in (flickr8k / CAPTIONS).open(encoding="utf-8"))
    test = 1000 if (flickr8k / "Flickr_8k.testImages.txt").exists() else 0
    told = check(data, Contents(photos=photos, captions=lines, test=test))
    assert "lists of 6,000 train + 1,000 dev" in told
    assert "2258277193_586949ec62.jpg.1" in told or photos < 8091
