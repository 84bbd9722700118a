"""VGG16 without its output layer: photos to features.

The network is torchvision's, layer for layer, with ImageNet weights (Simonyan and Zisserman, 2014). Two layers are
offered: ``fc2``, the 4096 values after the last hidden layer (the tutorial's choice), and ``conv5_3``, a grid of 512
values before the last pooling, whole or pooled: 14x14 for photos squashed to 224 pixels, larger for larger ones.

Shapes: B batch, P grid positions, F feature.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from capexp.data.vgg16_weights import NETS, State, digest_weights, hub_file, network, read_weights
from capexp.distributed import use_bfloat16
from capexp.errors import InputError
from capexp.settings import (
    PHOTO_SIZE,
    FeaturesConfig,
    Layer,
    PhotoSize,
    Pool,
    Precision,
    check_grid,
    grid_shape,
    pooled,
)


@dataclass(frozen=True)
class EncoderIdentity:
    """All that decides what a photo's features are; features of different identities never mix."""

    layer: Layer
    pool: Pool
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    weights_digest: str
    weights: str
    size: PhotoSize = PHOTO_SIZE
    transform: Literal["squash-bilinear-antialias", "squash-bilinear-antialias-mirror"] = "squash-bilinear-antialias"

    def __post_init__(self) -> None:
        """Raises ValueError where no photo of that size has features of that layer and pool."""
        check_grid(self.layer, self.pool, self.size)

    @property
    def shape(self) -> tuple[int, int]:
        """(P, F): grid positions and features at each."""
        return grid_shape(self.layer, self.pool, self.size)

    @property
    def is_mirrored(self) -> bool:
        """Whether left and right of a photo change places."""
        return self.transform == "squash-bilinear-antialias-mirror"

    def mirrored(self) -> "EncoderIdentity":
        """The same of photos whose left and right have changed places."""
        return replace(self, transform="squash-bilinear-antialias-mirror")

    def key(self) -> str:
        """A short digest of the identity; the weights' name is a hint where to get them, not part of it."""
        record = asdict(self)
        del record["weights"]
        return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:16]

    def __str__(self) -> str:
        mirrored = ", mirrored" if self.is_mirrored else ""
        size = "" if self.size == PHOTO_SIZE else f" at {self.size} pixels"
        return f"VGG16 {self.layer}{size}, pool {self.pool}, weights {self.weights_digest[:12]}{mirrored}"


# Photos at a time through the convolutions on a CPU: a layer's output of more is memory that is mapped anew each time.
_AT_ONCE: Final = 2


class Encoder(nn.Module):
    """VGG16 up to the layer that its identity names, with its preprocessing inside."""

    def __init__(self, identity: EncoderIdentity, state: State) -> None:
        super().__init__()
        self.identity = identity
        self.convolutions, self.dense = network(identity.layer)
        self.load_state_dict({name: value.float() for name, value in state.items()}, assign=True)
        self.requires_grad_(False).eval()
        # Buffers, so that the numbers travel with the network; not in the state, they are in the identity.
        self.register_buffer("mean", torch.tensor(identity.mean), persistent=False)
        self.register_buffer("std", torch.tensor(identity.std), persistent=False)

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.parameters()).device

    @property
    def at_once(self) -> int:
        """Photos that a core of a CPU should be given at a time: the dense layers are read once for all of them."""
        return _AT_ONCE * (8 if self.identity.layer == "fc2" else 1)

    @torch.inference_mode()
    def forward(self, photos: Tensor) -> Tensor:
        """Features of photos ``(B, size, size, 3)`` in 0..255, as float16 ``(B, P, F)``."""
        parts = torch.split(photos, _AT_ONCE) if self.device.type == "cpu" else [photos]
        x = torch.cat([self._convolved(part) for part in parts])  # (B, 512, side, side); 7 for fc2
        if self.identity.layer == "fc2":
            dense: Tensor = self.dense(x.contiguous().flatten(1))  # (B, 4096)
            return dense.unsqueeze(1).half()
        if pooled(self.identity.pool) > 1:
            x = nn.functional.max_pool2d(x, pooled(self.identity.pool))
        grid = x.flatten(2).transpose(1, 2)  # (B, P, 512)
        if self.identity.pool == "mean":
            grid = grid.float().mean(1, keepdim=True)
        return grid.half()

    def _convolved(self, photos: Tensor) -> Tensor:
        assert isinstance(self.mean, Tensor) and isinstance(self.std, Tensor)
        weight = next(self.parameters())
        # Bytes go to the device, a quarter of what floats would be.
        moved = photos.to(weight.device, non_blocking=True)
        pixels = ((moved.flip(2) if self.identity.is_mirrored else moved).float() - self.mean) / self.std
        x: Tensor = self.convolutions(pixels.permute(0, 3, 1, 2).to(weight.dtype))  # channels last in memory
        return x

    def prepare(self, device: torch.device, precision: Precision) -> "Encoder":
        """Moves the network to a device, in the precision that is fast there."""
        dtype = torch.bfloat16 if use_bfloat16(device, precision) else torch.float32
        buffers = dict(self.named_buffers())
        self.to(device, dtype).to(memory_format=torch.channels_last)
        for name, buffer in buffers.items():  # preprocessing stays in float32
            setattr(self, name, buffer.to(device))
        return self

    def encode(self, photos: list[NDArray[np.uint8]]) -> NDArray[np.float16]:
        """Features ``(B, P, F)`` of squashed photos, each ``(size, size, 3)``."""
        return self.begin(torch.from_numpy(np.stack(photos)))()

    def begin(self, photos: Tensor) -> Callable[[], NDArray[np.float16]]:
        """Begins with squashed photos ``(B, size, size, 3)``, and gives what waits for their features ``(B, P, F)``.

        A GPU works on meanwhile, from the start where the photos are in pinned memory.
        """
        features = self(photos)
        if self.device.type != "cuda":
            return lambda: features.cpu().numpy()
        copied = torch.empty(features.shape, dtype=features.dtype, pin_memory=True)
        copied.copy_(features, non_blocking=True)
        there = torch.cuda.Event()  # type: ignore[no-untyped-call]
        there.record(torch.cuda.current_stream(self.device))

        def finish() -> NDArray[np.float16]:
            there.synchronize()
            return copied.numpy()

        return finish

    def weights(self) -> State:
        """The layers used, in float16, which is what they are rounded to at loading."""
        return {name: value.half() for name, value in self.state_dict().items()}


def identify(config: FeaturesConfig) -> EncoderIdentity:
    """The identity of the encoder that a config asks for, without its weights where their digest is known.

    Raises:
        InputError: as :func:`load_encoder`.
    """
    net = NETS.get(config.weights)
    known = net.digests.get(config.layer) if net is not None else None
    if known is not None:
        return _identity(config, known)
    return _identity(config, digest_weights(read_weights(config.weights, config.layer)))


def load_encoder(config: FeaturesConfig, mirrored: bool = False) -> Encoder:
    """The encoder that a config asks for, or that of mirrored photos; torchvision fetches weights at their first use.

    Raises:
        InputError: weights that are missing, cut short, not VGG16's, or cannot be fetched.
    """
    state = read_weights(config.weights, config.layer)
    identity = _identity(config, digest_weights(state))
    net = NETS.get(config.weights)
    known = net.digests.get(config.layer) if net is not None else None
    if known is not None and known != identity.weights_digest:
        raise InputError(
            f"features.weights = '{config.weights}': digest {identity.weights_digest[:12]}, expected {known[:12]}; "
            f"delete {hub_file(config.weights)} to fetch it again, or give the path of a weights file"
        )
    return Encoder(identity.mirrored() if mirrored else identity, state)


def encoder_at_hand(config: FeaturesConfig) -> bool:
    """Whether the encoder can be loaded without fetching anything."""
    return config.weights not in NETS or hub_file(config.weights).is_file()


def _identity(config: FeaturesConfig, weights_digest: str) -> EncoderIdentity:
    net = NETS.get(config.weights, NETS["IMAGENET1K_FEATURES"])
    name = config.weights if config.weights in NETS else Path(config.weights).name
    return EncoderIdentity(config.layer, config.pool, net.mean, net.std, weights_digest, name, config.size)
