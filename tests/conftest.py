"""Real data for the tests that want it; where it is absent they skip, saying what would make them run."""

import os
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[1]


def _beside(variable: str, default: str) -> Path | None:
    path = Path(os.environ.get(variable, _ROOT.parent / "shared" / default))
    return path if path.exists() else None


@pytest.fixture(scope="session")
def scenes() -> Path:
    """The folder of the embedded data."""
    return _ROOT / "experiments" / "scenes"


@pytest.fixture(scope="session")
def flickr8k() -> Path:
    """The folder of the real Flickr8k."""
    path = _beside("CAPEXP_FLICKR8K", "flickr8k")
    if path is None:
        pytest.skip("real Flickr8k is not here; set CAPEXP_FLICKR8K to its folder")
    return path


@pytest.fixture(scope="session")
def vgg16() -> Path:
    """The file of VGG16's real convolutional weights."""
    path = _beside("CAPEXP_VGG16", "vgg16/vgg16_features_fp16.pth")
    if path is None:
        pytest.skip("VGG16's weights are not here; set CAPEXP_VGG16 to a file of its convolutional layers")
    return path
