"""The page to try a captioner, in a real browser, and what ends the command before there is a page."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import pytest
from selenium.common.exceptions import WebDriverException
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from tracking_server import free_port
from user_folder import Folder

from capexp.app import app
from capexp.captioning.captioner import Captioner
from capexp.data.captions import read_splits
from capexp.data.photos import MAXIMUM_UPLOAD
from capexp.data.vgg16 import load_encoder
from capexp.data.vocabulary import build_vocabulary
from capexp.errors import InputError
from capexp.experiment import find_experiment, load_experiment
from capexp.settings import FeaturesConfig

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests/captioning/golden-1/bundle"
T = TypeVar("T")


def wait_for(found: Callable[[], T], seconds: float = 300) -> T:
    """What is there once it is there, and true."""
    end = time.monotonic() + seconds
    while True:
        try:
            if value := found():
                return value
        except (WebDriverException, OSError, IndexError):
            pass
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.2)


@pytest.fixture(scope="module")
def bundle(vgg16: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A captioner of scenes with its encoder inside, trained for an epoch."""
    folder = tmp_path_factory.mktemp("trained")
    words = ("--training.epochs", "1", "--training.learning_rate", "0.01", "--model.output_dropout", "0")
    Folder(folder, has_store=True).run("train", *words)
    (trained,) = folder.glob("checkpoints/*/ep*")
    encoder = load_encoder(FeaturesConfig(layer="conv5_3", pool="mean", weights=str(vgg16)))
    return Captioner.load(trained).save(folder / "bundle", encoder.weights())


@pytest.fixture(scope="module")
def page(bundle: Path) -> Iterator[str]:
    """The address of the page."""
    with serving(bundle) as address:
        yield address


@contextmanager
def serving(bundle: Path) -> Iterator[str]:
    """A page, served as a user serves it, without a network."""
    pytest.importorskip("streamlit", reason="Streamlit is not here; pip install -e '.[app]'")
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "capexp.app", "--model", "bundle", "--port", str(port)],
        cwd=bundle.parent, env=os.environ | {"PYTHONPATH": str(ROOT), "CAPEXP_OFFLINE": "1"},
        text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for(lambda: urllib.request.urlopen(f"{address}/_stcore/health", timeout=5).status == 200)
        yield address
    finally:
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=300)
    assert process.returncode == 130, err
    assert out.splitlines() == [f"a page to try bundle: {address} (Ctrl-C ends it)"]
    assert err.splitlines()[-1] == "capexp.app: interrupted"


def told(bundle: Path, photo: Path, *words: str) -> dict[str, Any]:
    """What `capexp.caption` says of a photo."""
    printed = Folder(bundle.parent).run("caption", "--model", str(bundle), str(photo), "--json", *words)
    record: dict[str, Any] = json.loads(printed.stdout)
    return record


def texts(chromium: Chrome, selector: str) -> list[str]:
    return [element.text for element in chromium.find_elements(By.CSS_SELECTOR, selector)]


def upload(chromium: Chrome, file: Path) -> None:
    wait_for(lambda: chromium.find_elements(By.CSS_SELECTOR, "input[type=file]"))[0].send_keys(str(file))


def choose(chromium: Chrome, method: str) -> None:
    def option() -> WebElement:
        return next(
            label
            for label in chromium.find_elements(By.CSS_SELECTOR, "[role=radiogroup] label")
            if label.text == method
        )

    wait_for(option).click()


def requested(chromium: Chrome) -> set[str]:
    """The hosts that pages of the web have been asked of, since the last call."""
    messages = [json.loads(entry["message"])["message"] for entry in chromium.get_log("performance")]  # type: ignore[no-untyped-call]
    urls = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    urls += [m["params"]["url"] for m in messages if m["method"] == "Network.webSocketCreated"]
    parts = [urlsplit(url) for url in urls]
    return {part.netloc for part in parts if part.scheme in ("http", "https", "ws", "wss")}


@pytest.mark.slow
def test_a_photo_gets_the_caption_that_the_command_prints_and_alternatives(
    page: str, chromium: Chrome, bundle: Path, scenes: Path
) -> None:
    photo = scenes / "Scenes_Dataset/scene_0003.jpg"
    chromium.get(page)
    requested(chromium)
    chromium.get(page)
    upload(chromium, photo)
    assert wait_for(lambda: texts(chromium, "h3")) == [told(bundle, photo)["caption"]]
    assert not texts(chromium, "table")
    (shown,) = wait_for(lambda: chromium.find_elements(By.CSS_SELECTOR, "img"))
    assert wait_for(lambda: shown.get_attribute("naturalWidth")) == "160", "the photo itself, not scaled up"

    choose(chromium, "beam")
    wide = told(bundle, photo, "--decoding.method", "beam", "--decoding.beam_width", "4")
    wait_for(lambda: len(texts(chromium, "tbody tr")) == 2)  # of beam width 3
    width = chromium.find_element(By.CSS_SELECTOR, "input[type=number]")
    assert width.get_attribute("value") == "3"
    chromium.find_element(By.CSS_SELECTOR, "[data-testid=stNumberInputStepUp]").click()
    wait_for(lambda: len(texts(chromium, "tbody tr")) == 3)
    wait_for(lambda: texts(chromium, "h3") == [wide["caption"]])
    cells = texts(chromium, "tbody td")
    assert cells[0::2] == [other["caption"] for other in wide["alternatives"]]
    shares = [float(cell.removesuffix("%")) for cell in cells[1::2]]
    assert all(0 < share < 100 for share in shares)
    assert shares == sorted(shares, reverse=True)
    assert requested(chromium) == {urlsplit(page).netloc}, "nothing comes from another machine"


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [(1,), (1, 2)], ids=["alone", "ensemble"])
def test_of_an_attention_captioner_the_page_shows_where_it_looked_at_each_word(
    vgg16: Path, chromium: Chrome, scenes: Path, tmp_path: Path, seeds: tuple[int, ...]
) -> None:
    """Its weights are the first ones: where it looks means nothing, what the page shows of it is the same."""
    overrides = {
        **{"features.pool": "max2", "features.weights": str(vgg16), "decoding.maximum_length": 6},
        **{"model.decoder": "attention", "model.embedding_size": 32, "model.lstm_units": 32},
    }
    experiment = load_experiment(find_experiment("scenes"), overrides)
    train = read_splits(experiment.captions, ("train",))["train"]
    words = build_vocabulary((text for photo in train.references for text in photo), experiment.vocabulary)
    encoder = load_encoder(experiment.features)
    captioners = [
        Captioner.fresh(experiment.model, words, encoder.identity, experiment.decoding, seed) for seed in seeds
    ]
    captioner = captioners[0] if len(seeds) == 1 else Captioner.ensemble(captioners, experiment.decoding)
    bundle = captioner.save(tmp_path / "bundle", encoder.weights())
    with serving(bundle) as address:
        chromium.get(address)
        photo = scenes / "Scenes_Dataset/scene_0003.jpg"
        upload(chromium, photo)
        (caption,) = wait_for(lambda: texts(chromium, "h3"))
        assert len(caption.split()) > 1

        def drawn() -> list[bool]:
            images = chromium.find_elements(By.CSS_SELECTOR, "img")
            return [image.get_attribute("naturalWidth") not in (None, "0") for image in images]

        wait_for(lambda: drawn() == [True] * (1 + len(caption.split())))
        assert "Attention map of each word" in chromium.find_element(By.TAG_NAME, "body").text
        shown = wait_for(lambda: texts(chromium, "[data-testid=stImageCaption]"))
        assert shown == caption.split()


@pytest.mark.slow
def test_a_file_that_is_no_picture_is_told_of_on_the_page(page: str, chromium: Chrome, tmp_path: Path) -> None:
    chromium.get(page)
    (tmp_path / "notes.jpg").write_text("no picture")
    upload(chromium, tmp_path / "notes.jpg")
    (alert,) = wait_for(lambda: texts(chromium, "[data-testid=stAlert]"))
    assert "cannot be read as a picture" in alert
    assert not texts(chromium, "h3")
    (tmp_path / "large.jpg").write_bytes(bytes(MAXIMUM_UPLOAD + 1))
    upload(chromium, tmp_path / "large.jpg")
    wait_for(lambda: "must be 20.0MB or smaller" in chromium.find_element(By.TAG_NAME, "body").text)


@pytest.mark.slow
def test_it_fits_a_phone(page: str, chromium: Chrome, scenes: Path) -> None:
    phone = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    chromium.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    try:
        chromium.get(page)
        upload(chromium, scenes / "Scenes_Dataset/scene_0003.jpg")
        (caption,) = wait_for(lambda: chromium.find_elements(By.CSS_SELECTOR, "h3"))
        (photo,) = wait_for(lambda: chromium.find_elements(By.CSS_SELECTOR, "img"))
        assert chromium.execute_script("return document.documentElement.scrollWidth") == 390
        for element in (caption, photo):
            assert element.rect["x"] >= 0 and element.rect["x"] + element.rect["width"] <= 390
        assert caption.rect["y"] < photo.rect["y"], "the caption comes before the photo that one knows"
    finally:
        chromium.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.mark.slow
def test_other_machines_and_other_names_are_refused(page: str, bundle: Path) -> None:
    host, port = page.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(
            b"GET /_stcore/stream HTTP/1.1\r\nHost: evil.example\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
            b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
        )
        assert b" 403 " in connection.recv(100)
    with socket.socket() as other:
        assert other.connect_ex(("127.0.0.2", int(port))) != 0, "only 127.0.0.1 listens"


def test_what_is_wrong_is_told_in_one_line_before_there_is_a_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CAPEXP_OFFLINE", "1")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        faults = {
            ("--model", str(GOLDEN), "--port", port): f"--port {port}: Address already in use",
            ("--model", str(GOLDEN), "--port", "0"): "0 is not between 1 and 65535",
            ("--model", str(GOLDEN), "--host", "192.0.2.1"): "--host 192.0.2.1",
            ("--model", "nothing"): "--model nothing: neither a bundle",
            ("--model", str(GOLDEN), "--model.dropout", "0.1"): "has no effect on this command",
            ("--model", str(GOLDEN), "--decoding.beam_width", "0"): "beam_width",
            ("--model", str(GOLDEN)): "CAPEXP_OFFLINE forbids fetching",
        }
        for words, says in faults.items():
            free = () if "--port" in words else ("--port", str(free_port()))
            with pytest.raises((InputError, SystemExit)) as caught:
                app([*words, *free])
            line = capsys.readouterr().err if isinstance(caught.value, SystemExit) else f"{caught.value}\n"
            assert says in line and line.count("\n") == 1, line


def test_without_streamlit_the_line_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "capexp.report.page", raising=False)
    monkeypatch.delattr("capexp.report.page", raising=False)
    monkeypatch.setitem(sys.modules, "streamlit", None)
    with pytest.raises(InputError, match=r"pip install -e '\.\[app\]'"):
        app(["--model", str(GOLDEN)])
