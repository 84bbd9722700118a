"""Real data, a real browser and a real database for the tests that want them; where absent they skip, saying why."""

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

_ROOT = Path(__file__).parents[1]
_KERAS = "tensorflow-cpu==2.21.* pillow h5py"
_CHROMIUM_FLAGS = (
    *("--headless=new", "--window-size=1280,900", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the tests that take longest, so that no process of pytest's works on one of them alone at the end."""
    items.sort(key=lambda item: item.path.name != "test_keras.py")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip the tests marked ``gpu`` on a machine without a GPU."""
    if item.get_closest_marker("gpu") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("no GPU here")


def _real(variable: str, default: str, what: str) -> Path:
    """What a variable of the environment names, or what lies beside the project."""
    path = Path(os.environ.get(variable, _ROOT.parent / "shared" / default))
    if not path.exists():
        pytest.skip(f"{what} not here; set {variable} to where it is")
    return path


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], None]], Path]:
    """Returns a function that makes a folder of this name once for all of pytest's processes, and returns it."""
    from filelock import FileLock

    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent  # of all processes

    def once(name: str, make: Callable[[Path], None]) -> Path:
        folder, made = base / f"once {name}" / "folder", base / f"once {name}" / "made"
        folder.parent.mkdir(exist_ok=True)
        with FileLock(folder.parent / "lock"):
            if not made.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                make(folder)
                made.touch()
        return folder

    return once


@pytest.fixture(scope="session")
def random_vgg16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """VGG16's convolutions with random weights, for tests that do not care what a photo's features mean."""
    import torch
    import torchvision
    from torch import nn

    path = tmp_path_factory.mktemp("weights") / "random.pth"
    vgg = torchvision.models.vgg
    net: nn.Sequential = vgg.make_layers(vgg.cfgs["D"])
    generator = torch.Generator().manual_seed(3)
    for parameter in net.parameters():
        if parameter.dim() > 1:
            nn.init.kaiming_normal_(parameter, nonlinearity="relu", generator=generator)
    torch.save({f"features.{name}": value.half() for name, value in net.state_dict().items()}, path)
    return path


@pytest.fixture(scope="session")
def scenes() -> Path:
    """The folder of the embedded data."""
    return _ROOT / "experiments" / "scenes"


@pytest.fixture(scope="session")
def flickr8k() -> Path:
    """The folder of the real Flickr8k."""
    return _real("CAPEXP_FLICKR8K", "flickr8k", "real Flickr8k is")


@pytest.fixture(scope="session")
def vgg16() -> Path:
    """The file of VGG16's real convolutional weights."""
    return _real("CAPEXP_VGG16", "vgg16/vgg16_features_fp16.pth", "a file of VGG16's weights is")


@pytest.fixture(scope="session")
def keras() -> Callable[[str, Path], None]:
    """Runs a step of ``tutorial_in_keras.py`` in a folder, with TensorFlow from an environment of its own.

    The environment is made at the first use, in a minute, in ``.venv-keras`` beside the project's.
    """
    from filelock import FileLock

    environment = _ROOT / ".venv-keras"
    python, installed = environment / "bin" / "python", environment / "installed"
    with FileLock(_ROOT / ".venv-keras.lock"):
        if not installed.is_file() or installed.read_text() != _KERAS:
            installed.unlink(missing_ok=True)
            commands: tuple[tuple[str | Path, ...], ...] = (
                (sys.executable, "-m", "venv", environment),
                (python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *_KERAS.split()),
            )
            for command in commands:
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    reason = (done.stderr.strip().splitlines() or [str(done.returncode)])[-1]
                    pytest.skip(f"no environment with Keras ({_KERAS}) can be made: {reason}")
            installed.write_text(_KERAS)

    def run(step: str, folder: Path) -> None:
        done = subprocess.run(
            [python, _ROOT / "tests" / "tutorial_in_keras.py", step, folder],
            capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-4000:]

    return run


@pytest.fixture
def chromium(tmp_path: Path) -> Iterator["Chrome"]:
    """A headless Chromium with a new profile and a window as of a desktop."""
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if browser is None or driver is None:
        pytest.skip("no Chromium here; install chromium and chromedriver (Debian: chromium, chromium-driver)")
    from selenium.webdriver import Chrome, ChromeOptions
    from selenium.webdriver.chrome.service import Service

    options = ChromeOptions()
    options.binary_location = browser
    for flag in _CHROMIUM_FLAGS:
        options.add_argument(flag)
    options.add_argument(f"--user-data-dir={tmp_path / 'chromium'}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    page = Chrome(options, Service(driver))
    try:
        yield page
    finally:
        page.quit()


@pytest.fixture(scope="session")
def postgresql() -> Iterator[Callable[[str], str]]:
    """A PostgreSQL server on the loopback; makes databases, and returns their URLs, a password in them."""
    psycopg = pytest.importorskip("psycopg", reason="psycopg is not here; pip install 'psycopg[binary]'")
    folders = [*Path("/usr/lib/postgresql").glob("*/bin"), *map(Path, os.get_exec_path())]
    programs = next((f for f in folders if (f / "initdb").is_file() and (f / "postgres").is_file()), None)
    if programs is None:
        pytest.skip("PostgreSQL is not here; apt-get install postgresql")
    # The server refuses to run as root: as the user that the distribution's package has made, then.
    user: dict[str, Any] = {"user": "postgres", "group": "postgres"} if os.geteuid() == 0 else {}
    folder = Path(tempfile.mkdtemp(prefix="capexp-postgresql-"))
    password = f"p/w@{secrets.token_hex(8)}"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (folder / "password").write_text(password)
    if user:
        for path in (folder, folder / "password"):
            shutil.chown(path, **user)
    subprocess.run(
        [programs / "initdb", "-D", folder / "data", "-U", "capexp", "--auth=scram-sha-256",
         f"--pwfile={folder / 'password'}", "--no-sync"],
        check=True, capture_output=True, cwd=folder, **user,
    )  # fmt: skip
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(
            [programs / "postgres", "-D", folder / "data", "-p", str(port), "-c", "listen_addresses=127.0.0.1",
             "-c", f"unix_socket_directories={folder}", "-c", "fsync=off"],
            stdout=log, stderr=log, cwd=folder, **user,
        )  # fmt: skip
    quoted = password.replace("/", "%2F").replace("@", "%40")

    def url(database: str) -> str:
        return f"postgresql://capexp:{quoted}@127.0.0.1:{port}/{database}"

    def make(database: str) -> str:
        with psycopg.connect(url("postgres"), autocommit=True) as connection:
            connection.execute(f'CREATE DATABASE "{database}"'.encode())
        return url(database)

    try:
        end = time.monotonic() + 300
        while True:
            try:
                make("ready")
                break
            except psycopg.OperationalError:
                if server.poll() is not None or time.monotonic() > end:
                    pytest.fail((folder / "log").read_text())
                time.sleep(0.1)
        yield make
    finally:
        server.send_signal(2)  # SIGINT: fast shutdown
        server.wait(300)
        shutil.rmtree(folder)
