"""Real data and a real browser for the tests that want them; where absent they skip, saying what is lacking."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

_ROOT = Path(__file__).parents[1]
_CHROMIUM_FLAGS = (
    *("--headless=new", "--window-size=1280,900", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


def _real(variable: str, default: str, what: str) -> Path:
    """What a variable of the environment names, or what lies beside the project."""
    path = Path(os.environ.get(variable, _ROOT.parent / "shared" / default))
    if not path.exists():
        pytest.skip(f"{what} not here; set {variable} to where it is")
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
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    page = Chrome(options, Service(driver))
    try:
        yield page
    finally:
        page.quit()
