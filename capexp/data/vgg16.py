"""VGG16 without its output layer: the encoder that turns photos into features.

The network is torchvision's, layer for layer, with ImageNet weights (Simonyan and Zisserman, 2014). Features come from
one of two layers: ``fc2``, the 4096 values of the last hidden layer (the tutorial's choice), or ``conv5_3``, 512 values
at each position of a grid, before the last pooling. The grid is 14x14 for photos squashed to 224 pixels, larger for
larger ones, and may be pooled.

Shapes: B batch, P grid positions, F feature.
"""

import copy
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from capexp.data.photo_transform import PhotoTransform
from capexp.data.vgg16_weights import (
    NETS,
    PREPROCESSING,
    digest_weights,
    named_net,
    network,
    published_file,
    read_weights,
)
from capexp.data.weights_files import State
from capexp.distributed import use_bfloat16
from capexp.errors import InputError
from capexp.settings import (
    PHOTO_SIZE,
    FeaturesConfig,
    Layer,
    NetName,
    PhotoResize,
    PhotoSize,
    Pool,
    Precision,
    check_grid,
    grid_shape,
    pooled,
)

_RESIZES: Final[dict[PhotoResize, str]] = {"bilinear": "squash-bilinear-antialias", "nearest": "squash-nearest"}
"""How an identity's transform begins, by ``features.resize``."""
_TRANSFORM = re.compile(f"({'|'.join(_RESIZES.values())})(-(mirror|crop[1-9][0-9]?))?")  # the views' names at its end


@dataclass(frozen=True)
class EncoderIdentity:
    """Everything that a photo's features depend on; features of different identities are never mixed."""

    layer: Layer
    pool: Pool
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    weights_digest: str
    weights: str
    """Where to get the weights; has no effect on :meth:`key`."""
    size: PhotoSize = PHOTO_SIZE
    transform: str = _RESIZES["bilinear"]
    """How photos are resized to a square; for a view other than the photo itself, followed by its name."""

    def __post_init__(self) -> None:
        """Raise ValueError if there is no such transform, or if photos of this size lack this layer and pool."""
        check_grid(self.layer, self.pool, self.size)
        if _TRANSFORM.fullmatch(self.transform) is None:
            raise ValueError(f"transform '{self.transform}' is unknown")

    @property
    def shape(self) -> tuple[int, int]:
        """(P, F): the number of grid positions, and of features at each."""
        return grid_shape(self.layer, self.pool, self.size)

    @property
    def photo_transform(self) -> PhotoTransform:
        """How photos become pixels."""
        for resize, beginning in _RESIZES.items():
            if self.transform.startswith(beginning):
                return PhotoTransform(self.size, resize, self.transform.removeprefix(beginning).removeprefix("-"))
        raise AssertionError(self.transform)  # checked when it was made

    @property
    def resize(self) -> PhotoResize:
        """How photos are resized."""
        return self.photo_transform.resize

    @property
    def view(self) -> str:
        """The view of photos that is encoded."""
        return self.photo_transform.view

    def of_view(self, view: str) -> "EncoderIdentity":
        """Return the identity of the same encoder for a view of photos."""
        resize = _RESIZES[self.resize]
        return replace(self, transform=f"{resize}-{view}" if view else resize)

    @property
    def label(self) -> str:
        """The beginning of the name of the cache's file."""
        return f"{self.layer}-{self.pool}"

    def record(self) -> dict[str, object]:
        """Return what identifies the features, for digests and the cache's header: all but where weights are from."""
        record = asdict(self)
        del record["weights"]
        return record

    def key(self) -> str:
        """Return a short digest of the identity, without the name of the weights."""
        return hashlib.sha256(json.dumps(self.record(), sort_keys=True).encode()).hexdigest()[:16]

    def __str__(self) -> str:
        view = f", view {self.view}" if self.view else ""
        size = "" if self.size == PHOTO_SIZE else f" at {self.size} pixels"
        size += " by nearest neighbour" if self.resize == "nearest" else ""
        return f"VGG16 {self.layer}{size}, pool {self.pool}, weights {self.weights_digest[:12]}{view}"


# Photos that go through the convolutions together on a CPU: for more, the allocator maps new memory at each layer.
_CPU_BATCH: Final = 2


class Encoder(nn.Module):
    """VGG16 up to the layer of its identity, preprocessing included."""

    def __init__(self, identity: EncoderIdentity, state: State) -> None:
        super().__init__()
        self.identity = identity
        self.convolutions, self.dense = network(identity.layer)
        self.load_state_dict({name: value.float() for name, value in state.items()}, assign=True)
        self.requires_grad_(False).eval()
        # Buffers, so that they move with the network; not in its state dict, because the identity has them.
        self.register_buffer("mean", torch.tensor(identity.mean), persistent=False)
        self.register_buffer("std", torch.tensor(identity.std), persistent=False)

    def of_view(self, view: str) -> "Encoder":
        """Return the same encoder, with the same network, for a view of photos."""
        other = copy.copy(self)
        other.identity = self.identity.of_view(view)
        return other

    @property
    def device(self) -> torch.device:
        """The device of the network."""
        return next(self.parameters()).device

    @property
    def photos_per_core(self) -> int:
        """Photos that a CPU core should encode at a time: more where dense layers' weights are read once for all."""
        return _CPU_BATCH * (8 if self.identity.layer == "fc2" else 1)

    @torch.inference_mode()
    def forward(self, photos: Tensor) -> Tensor:
        """Return the features of photos ``(B, size, size, 3)`` in 0..255, as float16 ``(B, P, F)``."""
        parts = torch.split(photos, _CPU_BATCH) if self.device.type == "cpu" else [photos]
        x = torch.cat([self._convolve(part) for part in parts])  # (B, 512, side, side); 7 for fc2
        if self.identity.layer == "fc2":
            dense: Tensor = self.dense(x.contiguous().flatten(1))  # (B, 4096)
            return dense.unsqueeze(1).half()
        if pooled(self.identity.pool) > 1:
            x = nn.functional.max_pool2d(x, pooled(self.identity.pool))
        grid = x.flatten(2).transpose(1, 2)  # (B, P, 512)
        if self.identity.pool == "mean":
            grid = grid.float().mean(1, keepdim=True)
        return grid.half()

    def _convolve(self, photos: Tensor) -> Tensor:
        assert isinstance(self.mean, Tensor) and isinstance(self.std, Tensor)
        weight = next(self.parameters())
        # Bytes are moved to the device, a quarter of the size of floats.
        moved = photos.to(weight.device, non_blocking=True)
        pixels = (moved.float() - self.mean) / self.std
        x: Tensor = self.convolutions(pixels.permute(0, 3, 1, 2).to(weight.dtype))  # channels last in memory
        return x

    def prepare(self, device: torch.device, precision: Precision) -> "Encoder":
        """Move the network to a device, in the precision of the settings; return it."""
        dtype = torch.bfloat16 if use_bfloat16(device, precision) else torch.float32
        buffers = dict(self.named_buffers())
        self.to(device, dtype).to(memory_format=torch.channels_last)
        for name, buffer in buffers.items():  # preprocessing stays in float32
            setattr(self, name, buffer.to(device))
        return self

    def encode(self, photos: list[NDArray[np.uint8]]) -> NDArray[np.float16]:
        """Return the features ``(B, P, F)`` of squashed photos, each ``(size, size, 3)``."""
        return self.launch(torch.from_numpy(np.stack(photos)))()

    def launch(self, photos: Tensor) -> Callable[[], NDArray[np.float16]]:
        """Launch squashed photos ``(B, size, size, 3)``; return a function that waits for their features ``(B, P, F)``.

        A GPU computes in the meantime. Only if the photos are in pinned memory is their copy not waited for either.
        """
        features = self(photos)
        if self.device.type != "cuda":
            return lambda: features.cpu().numpy()
        copy = torch.empty(features.shape, dtype=features.dtype, pin_memory=True)
        copy.copy_(features, non_blocking=True)
        is_copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        is_copied.record(torch.cuda.current_stream(self.device))

        def wait() -> NDArray[np.float16]:
            is_copied.synchronize()
            return copy.numpy()

        return wait

    def weights(self) -> State:
        """Return the weights of the layers used, in float16, to which they were rounded when they were read."""
        return {name: value.half() for name, value in self.state_dict().items()}


def identify(config: FeaturesConfig) -> EncoderIdentity:
    """Return the identity of a config's encoder; its weights are read only if their digest is not known."""
    named_net(config.weights, config.net)  # refuses a net that the named weights are not
    net = NETS.get(config.weights)
    if net is not None and config.layer in net.digests:
        return _identity(config, net.net, net.digests[config.layer])
    weights = read_weights(config.weights, config.layer, config.net)
    return _identity(config, weights.net, digest_weights(weights.state))


def load_encoder(config: FeaturesConfig) -> Encoder:
    """Return a config's encoder; published weights are fetched at their first use."""
    weights = read_weights(config.weights, config.layer, config.net)
    identity = _identity(config, weights.net, digest_weights(weights.state))
    net = NETS.get(config.weights)
    known = None if net is None else net.digests.get(config.layer)
    if known is not None and known != identity.weights_digest:
        raise InputError(
            f"features.weights = '{config.weights}': digest {identity.weights_digest[:12]}, expected {known[:12]}; "
            f"delete {published_file(config.weights)} to fetch it again, or give the path of a weights file"
        )
    return Encoder(identity, weights.state)


def encoder_at_hand(config: FeaturesConfig) -> bool:
    """Return whether the encoder can be loaded without fetching its weights."""
    return config.weights not in NETS or published_file(config.weights).is_file()


def _identity(config: FeaturesConfig, net: NetName, weights_digest: str) -> EncoderIdentity:
    """Return the identity of an encoder with the preprocessing of a net and weights of this digest."""
    mean, std = PREPROCESSING[net]
    name = config.weights if config.weights in NETS else Path(config.weights).name
    transform = _RESIZES[config.resize]
    return EncoderIdentity(config.layer, config.pool, mean, std, weights_digest, name, config.size, transform)
