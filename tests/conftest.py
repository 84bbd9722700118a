"""Real data for the tests that want it; where it is absent they skip, saying what would make them run."""

import os
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[1]


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
