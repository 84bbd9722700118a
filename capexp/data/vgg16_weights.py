"""VGG16's layers and published weights: where their files are searched, and how a file is checked."""

import hashlib
import io
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from capexp.errors import InputError
from capexp.settings import Layer

State = dict[str, Tensor]

_CHANNELS = (64, 128, 256, 512, 512)  # of the convolutions, by block
_DENSE = 4096 * 25088  # weights of the first fully connected layer


@dataclass(frozen=True)
class Net:
    """A published set of weights: file, preprocessing in units of 0..255, and digests as far as they are known."""

    file: str
    """The name of the file that torchvision downloads. Importing torchvision only to ask takes a second and a half."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    digests: dict[Layer, str]


NETS: dict[str, Net] = {
    # Trained by torchvision, fully connected layers included.
    "IMAGENET1K_V1": Net("vgg16-397923af.pth", (123.675, 116.28, 103.53), (58.395, 57.12, 57.375), {}),
    # The authors' own Caffe net, which Keras ships too; torchvision has its convolutions only.
    "IMAGENET1K_FEATURES": Net(
        "vgg16_features-amdegroot-88682ab5.pth",
        (123.68, 116.779, 103.939),
        (1.0, 1.0, 1.0),
        {"conv5_3": "34bcef3d5876c0930c1bd23665d7ba092cd50e92cf9a11d75605bbfeb618ff8f"},
    ),
}


def network(layer: Layer) -> tuple[nn.Sequential, nn.Sequential]:
    """Return VGG16's convolutions and dense layers up to a layer, on the meta device, numbered as torchvision's.

    They are written out here because importing torchvision takes a second and a half.
    """
    with torch.device("meta"):
        layers: list[nn.Module] = []
        before = 3
        for block, channels in enumerate(_CHANNELS):
            for _ in range(2 if block < 2 else 3):
                layers += [nn.Conv2d(before, channels, 3, padding=1), nn.ReLU(inplace=True)]
                before = channels
            layers.append(nn.MaxPool2d(2))
        if layer == "conv5_3":
            return nn.Sequential(*layers[:-1]), nn.Sequential()
        dense = (nn.Linear(512 * 7 * 7, 4096), nn.ReLU(inplace=True), nn.Dropout(), nn.Linear(4096, 4096), nn.ReLU())
        return nn.Sequential(*layers), nn.Sequential(*dense)


def read_weights(weights: str, layer: Layer) -> State:
    """Return the weights of all layers up to ``layer``, rounded to float16, by the encoder's parameter names.

    ``weights`` is a name in ``NETS``, whose file torchvision fetches at its first use, or the path of a file.
    """
    path = Path(weights)
    if weights in NETS:
        path = _fetch(weights)
    elif not path.is_file():
        raise InputError(
            f"features.weights = '{weights}': no such file, and not one of {', '.join(NETS)}; "
            "give one of these names or the path of a weights file"
        )
    state = _load_state(path)
    expected = {
        f"{part}.{name}": value.shape
        for part, net in zip(("convolutions", "dense"), network(layer), strict=True)
        for name, value in net.state_dict().items()
    }
    named: State = {}
    for name, value in state.items():
        ours = name.replace("features.", "convolutions.", 1).replace("classifier.", "dense.", 1)
        if ours in expected:
            named[ours] = value
    wrong = [name for name, shape in expected.items() if name not in named or named[name].shape != shape]
    if wrong:
        raise InputError(f"{path}: not VGG16's weights ({wrong[0]} is missing or has another shape)")
    named = {name: value.half() for name, value in named.items()}  # only now: a hostile file may claim any shape
    dense = state.get("classifier.0.weight")
    is_whole = dense is not None and dense.numel() <= _DENSE and bool(dense.isfinite().all())
    if weights not in NETS and is_whole:
        raise InputError(
            f"{path}: holds fully connected layers, so it is torchvision's own net, whose preprocessing differs; "
            f"put it at {hub_file('IMAGENET1K_V1')} and set features.weights = IMAGENET1K_V1"
        )
    unfit = [name for name, value in named.items() if not bool(value.isfinite().all())]
    if unfit:
        raise InputError(f"{path}: {unfit[0]} holds values that are not finite; get the file again")
    return named


def digest_weights(state: State) -> str:
    """Return the SHA-256 over the layers used, in float16: the same net from two files is the same encoder."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(f"{name} {tuple(value.shape)}\n".encode())
        digest.update(np.ascontiguousarray(value.half().numpy()).data)
    return digest.hexdigest()


def hub_file(name: str) -> Path:
    """Return the path to which torchvision downloads the weights of this name."""
    return Path(torch.hub.get_dir()) / "checkpoints" / NETS[name].file


def _fetch(name: str) -> Path:
    path = hub_file(name)
    if path.is_file():
        return path
    if os.environ.get("CAPEXP_OFFLINE"):
        raise InputError(f"features.weights = '{name}': not in {path.parent}, and CAPEXP_OFFLINE forbids fetching")
    from torchvision.models import VGG16_Weights

    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(
            VGG16_Weights[name].url, str(path), hash_prefix=path.stem.rpartition("-")[2], progress=True
        )
    except (OSError, RuntimeError) as error:  # URLError is an OSError; a wrong hash is a RuntimeError
        raise InputError(
            f"features.weights = '{name}': cannot be fetched ({error}); with a copy of the file, "
            f"put it at {path} or give its path with --features.weights"
        ) from None
    return path


def _load_state(path: Path) -> State:
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                claimed = sum(entry.file_size for entry in archive.infolist())
            if claimed > path.stat().st_size:  # torch compresses nothing
                raise InputError(f"{path}: an archive that would swell to {claimed:,} bytes; get the weights again")
        with path.open("rb", buffering=0) as file, _SizeLimited(file) as limited:
            state = torch.load(limited, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except MemoryError:
        raise
    except Exception as error:  # torch raises RuntimeError, UnpicklingError, EOFError, ... depending on the damage
        kind = type(error).__name__
        raise InputError(
            f"{path}: damaged, or holds more than tensors, which is not loaded ({kind}); get the weights again"
        ) from None
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise InputError(f"{path}: holds no table of tensors; give a state_dict of VGG16")
    return state


class _SizeLimited(io.BufferedReader):
    """A file of which at most the remaining bytes are read: damaged content may ask for more than memory holds."""

    def read(self, size: int | None = -1, /) -> bytes:
        """Return at most ``size`` bytes."""
        left = os.fstat(self.fileno()).st_size - self.tell()
        return super().read(left if size is None or size < 0 else min(size, left))
