"""VGG16's layers and published weights: where their files are searched, and which net a file's weights are."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import nn

from capexp.data.hdf5 import is_hdf5
from capexp.data.weights_files import FIRST_KERNEL, State, WeightsFile, read_weights_file
from capexp.errors import InputError
from capexp.settings import Layer, NetName, NetSetting

_CHANNELS = (64, 128, 256, 512, 512)  # of the convolutions, by block

Colour = tuple[float, float, float]
"""A number for each of red, green and blue."""

PREPROCESSING: Final[dict[NetName, tuple[Colour, Colour]]] = {
    "caffe": ((123.68, 116.779, 103.939), (1.0, 1.0, 1.0)),
    "torchvision": ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
}
"""The mean that is subtracted from photos, and the standard deviation that they are divided by, in units of 0..255."""


@dataclass(frozen=True)
class Net:
    """A published set of weights: its file, which net it is, and digests as far as they are known."""

    file: str
    """The name of the file that is downloaded. Importing torchvision only to ask takes a second and a half."""
    net: NetName
    digests: dict[Layer, str]
    url: str = ""
    """Where the file is; empty if torchvision knows it."""
    md5: str = ""
    """The file's MD5, if that is how it is published."""

    @property
    def mean(self) -> Colour:
        """The mean that is subtracted from photos, in units of 0..255."""
        return PREPROCESSING[self.net][0]

    @property
    def std(self) -> Colour:
        """The standard deviation that photos are divided by, in units of 0..255."""
        return PREPROCESSING[self.net][1]


NETS: dict[str, Net] = {
    # Trained by torchvision, fully connected layers included.
    "IMAGENET1K_V1": Net("vgg16-397923af.pth", "torchvision", {}),
    # The authors' own Caffe net; torchvision has its convolutions only.
    "IMAGENET1K_FEATURES": Net(
        "vgg16_features-amdegroot-88682ab5.pth",
        "caffe",
        {"conv5_3": "34bcef3d5876c0930c1bd23665d7ba092cd50e92cf9a11d75605bbfeb618ff8f"},
    ),
    # The same net as Keras ships it, fully connected layers included.
    "KERAS": Net(
        "vgg16_weights_tf_dim_ordering_tf_kernels.h5",
        "caffe",
        {},
        "https://storage.googleapis.com/tensorflow/keras-applications/vgg16/vgg16_weights_tf_dim_ordering_tf_kernels.h5",
        "64373286793e3c8b2b4e3219cbf3544b",
    ),
}

# Which net a published file holds: by the beginning of its SHA-256 for PyTorch's, by its MD5 for Keras's.
_PUBLISHED: Final[dict[str, NetName]] = {
    "397923af": "torchvision",
    "00b39a1b": "caffe",  # with its fully connected layers
    "88682ab5": "caffe",
    NETS["KERAS"].md5: "caffe",
    "6d6bbae143d832006294945121d1f1fc": "caffe",  # Keras's convolutions alone
}


@dataclass(frozen=True)
class Weights:
    """The weights of all layers up to one, rounded to float16, by the encoder's parameter names, and their net."""

    state: State
    net: NetName


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


def read_weights(weights: str, layer: Layer, net: NetSetting = "auto") -> Weights:
    """Return the weights of all layers up to ``layer``.

    ``weights`` is a name in ``NETS``, whose file is fetched at its first use, or the path of a file. ``net`` is the net
    in that file, if its content does not say.
    """
    given = named_net(weights, net)
    path = Path(weights)
    if weights in NETS:
        path = _fetch(weights)
    elif not path.is_file():
        raise InputError(
            f"features.weights = '{weights}': no such file, and not one of {', '.join(NETS)}; "
            "give one of these names or the path of a weights file"
        )
    shapes = {
        f"{part}.{name}": tuple(value.shape)
        for part, layers in zip(("convolutions", "dense"), network(layer), strict=True)
        for name, value in layers.state_dict().items()
    }
    return _recognise(path, read_weights_file(path, shapes), given)


def named_net(weights: str, net: NetSetting) -> NetName | None:
    """Return the net that ``features.weights`` or ``features.net`` names; None if neither does."""
    published = NETS.get(weights)
    if published is None:
        return None if net == "auto" else net
    if net not in ("auto", published.net):
        raise InputError(f"features.net = '{net}': {weights} is the {published.net} net; leave features.net out")
    return published.net


def net_of(mean: Colour, std: Colour) -> NetSetting:
    """Return the net that has this preprocessing, or "auto" if none has."""
    return next((net for net, numbers in PREPROCESSING.items() if numbers == (mean, std)), "auto")


def _recognise(path: Path, file: WeightsFile, given: NetName | None) -> Weights:
    """Return a file's weights with their first kernel in RGB order, and the net that they are.

    The net is recognised by its convolutions, in either order of the colours, or by the whole file.
    """
    as_is, turned = file.state, {**file.state, FIRST_KERNEL: file.state[FIRST_KERNEL].flip(1)}
    for state in (turned, as_is) if file.is_bgr else (as_is, turned):
        convolutions = {name: value for name, value in state.items() if name.startswith("convolutions.")}
        if digest_weights(convolutions) == NETS["IMAGENET1K_FEATURES"].digests["conv5_3"]:
            if given == "torchvision":
                raise InputError(
                    f"{path}: the Caffe net, where features.net is 'torchvision'; leave features.net out, or give a "
                    "file of torchvision's net"
                )
            return Weights(state, "caffe")
    net = given
    if net is None and file.has_usual_names and not file.has_dense:
        net = "caffe"  # whose convolutions alone are what such files hold
    net = net or _PUBLISHED.get(_digest_file(path))
    if net is None:
        raise InputError(
            f"{path}: VGG16's weights of an unknown net, whose preprocessing must be named; set features.net = 'caffe' "
            "(only the mean is subtracted, as for Keras's weights) or 'torchvision'"
        )
    return Weights(turned if file.is_bgr and net == "caffe" else as_is, net)


def _digest_file(path: Path) -> str:
    """Return the digest under which a file of weights is published."""
    with path.open("rb") as file:
        if is_hdf5(path):
            return hashlib.file_digest(file, _md5).hexdigest()
        return hashlib.file_digest(file, "sha256").hexdigest()[:8]


def _md5() -> "hashlib._Hash":
    return hashlib.md5(usedforsecurity=False)


def digest_weights(state: State) -> str:
    """Return the SHA-256 over the layers used, in float16: the same net from two files is the same encoder."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(f"{name} {tuple(value.shape)}\n".encode())
        digest.update(np.ascontiguousarray(value.half().numpy()).data)
    return digest.hexdigest()


def published_file(name: str) -> Path:
    """Return the path at which torchvision or Keras keeps its copy of the weights of this name."""
    folder = _keras_home() / "models" if NETS[name].url else Path(torch.hub.get_dir()) / "checkpoints"
    return folder / NETS[name].file


def _keras_home() -> Path:
    given = os.environ.get("KERAS_HOME")
    try:
        return Path(given) if given else Path.home() / ".keras"
    except RuntimeError:  # HOME is unset, and the user is not known to the system
        return Path("~/.keras")


def _fetch(name: str) -> Path:
    path = published_file(name)
    if path.is_file():
        return path
    if os.environ.get("CAPEXP_OFFLINE"):
        raise InputError(f"features.weights = '{name}': not in {path.parent}, and CAPEXP_OFFLINE forbids fetching")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if NETS[name].url:
            _download(NETS[name], path)
        else:
            from torchvision.models import VGG16_Weights

            prefix = path.stem.rpartition("-")[2]
            torch.hub.download_url_to_file(VGG16_Weights[name].url, str(path), hash_prefix=prefix)
    except (OSError, RuntimeError) as error:  # URLError is an OSError; a wrong hash is a RuntimeError
        raise InputError(
            f"features.weights = '{name}': cannot be fetched ({error}); with a copy of the file, "
            f"put it at {path} or give its path with --features.weights"
        ) from None
    return path


def _download(net: Net, path: Path) -> None:
    """Download a file and put it at its path once its MD5 is found to be right."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        torch.hub.download_url_to_file(net.url, str(part))
        with part.open("rb") as file:
            digest = hashlib.file_digest(file, _md5).hexdigest()
        if digest != net.md5:
            raise RuntimeError(f"MD5 {digest}, expected {net.md5}")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
