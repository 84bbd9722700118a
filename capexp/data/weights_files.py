"""Files of VGG16's weights, as PyTorch and Keras write them, read into the encoder's layers.

The form of a file is recognised by its content. A PyTorch ``state_dict`` has torchvision's names, or any others: then
its tensors are taken in their order, if they have VGG16's shapes. An HDF5 file is one of Keras's: kernels are (height,
width, in, out) and dense weights (in, out), and the first dense layer reads the grid with its channels last. Every file
is untrusted: no code is run, no other file is opened, and a shape is checked before its values are read.
"""

import io
import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from capexp.data.hdf5 import arrays, group_in, is_hdf5, opened, values_of
from capexp.errors import InputError

if TYPE_CHECKING:
    from h5py import File

State = dict[str, Tensor]
Shapes = Mapping[str, tuple[int, ...]]
"""The shapes of the layers to read, in order, by the encoder's parameter names."""

FIRST_KERNEL = "convolutions.0.weight"
"""The encoder's only parameter that depends on the order of the colours."""

_DENSE = 4096 * 25088  # weights of the first fully connected layer
_CONVOLUTIONS = 26  # parameters: 13 kernels and 13 biases
# The layers in Keras, in order: by their own names, and by the names of their classes in Keras 3's .weights.h5.
_BLOCKS = [f"block{block}_conv{i}" for block, count in enumerate((2, 2, 3, 3, 3), 1) for i in range(1, count + 1)]
_BY_NAME = (*_BLOCKS, "fc1", "fc2")
_BY_CLASS = ("conv2d", *(f"conv2d_{i}" for i in range(1, 13)), "dense", "dense_1")
# The group that holds the layers' groups, by the kind of file: weights, a whole model, Keras 3's weights.
_KERAS_FORMS = (("", _BY_NAME), ("model_weights", _BY_NAME), ("layers", _BY_CLASS))
_DEPTH = 3  # groups from a layer's group to its values, at most


@dataclass(frozen=True)
class WeightsFile:
    """VGG16's layers from a file, in float16 and in the encoder's layout, by the encoder's parameter names."""

    state: State
    is_bgr: bool
    """Whether a net in a file of this form reads BGR photos, unless it is known to read RGB."""
    has_dense: bool
    """Whether the file holds fully connected layers."""
    has_usual_names: bool
    """Whether it is a PyTorch file with torchvision's names."""


def read_weights_file(path: Path, shapes: Shapes) -> WeightsFile:
    """Read the layers of ``shapes`` from a file in any of the known forms."""
    file = _read_keras(path, shapes) if is_hdf5(path) else _read_torch(path, shapes)
    unfit = [name for name, value in file.state.items() if not bool(value.isfinite().all())]
    if unfit:
        raise InputError(f"{path}: {unfit[0]} holds values that are not finite; get the file again")
    return file


def _require_dense(path: Path, shapes: Shapes, has_dense: bool) -> None:
    """Raise InputError if fully connected layers are to be read that the file does not hold."""
    if len(shapes) > _CONVOLUTIONS and not has_dense:
        raise InputError(
            f"{path}: holds no fully connected layers, which features.layer = 'fc2' needs; give a file with them, "
            "features.weights = KERAS, or use layer conv5_3"
        )


def _not_vgg16(path: Path, what: str) -> InputError:
    return InputError(f"{path}: not VGG16's weights ({what} is missing or has another shape)")


# PyTorch.


def _read_torch(path: Path, shapes: Shapes) -> WeightsFile:
    state = _load_state(path)
    named = _by_name(state, shapes)
    has_usual_names = all(name in named for name in list(shapes)[:_CONVOLUTIONS])
    has_dense, is_bgr = False, False
    if has_usual_names:
        is_bgr = "classifier.0.weight" not in state and "classifier.1.weight" in state
        dense = state.get("classifier.1.weight" if is_bgr else "classifier.0.weight")
        # Torchvision's file of the convolutions alone has dense layers of NaN. A hostile file may claim any shape.
        has_dense = dense is not None and (dense.numel() > _DENSE or _is_finite(dense))
    if len(named) < len(shapes):
        ordered, is_followed = _by_order(state, shapes)
        if len(ordered) == len(shapes) or (ordered and not has_usual_names):
            named, has_dense = ordered, is_followed
    missing = [name for name in shapes if name not in named]
    if missing and missing[0].startswith("convolutions."):
        raise _not_vgg16(path, missing[0])
    _require_dense(path, shapes, has_dense)
    if missing:
        raise _not_vgg16(path, missing[0])
    halves = {name: named[name].half() for name in shapes}  # only now: a hostile file may claim any shape
    return WeightsFile(halves, is_bgr, has_dense, has_usual_names)


def _by_name(state: State, shapes: Shapes) -> State:
    """Return VGG16's tensors, of the right shapes, under torchvision's or the published Caffe net's names."""
    numbers = {"dense.0": "dense.1", "dense.3": "dense.4"} if "classifier.0.weight" not in state else {}
    ours = {
        name.replace("features.", "convolutions.", 1).replace("classifier.", "dense.", 1): value
        for name, value in state.items()
    }
    named: State = {}
    for name, shape in shapes.items():
        layer, _, kind = name.rpartition(".")
        value = ours.get(f"{numbers.get(layer, layer)}.{kind}")
        if value is not None and _has_shape(value, shape):
            named[name] = value
    return named


def _by_order(state: State, shapes: Shapes) -> tuple[State, bool]:
    """Return tensors of any names by their order, and whether fully connected layers follow the convolutions.

    The convolutions, each a kernel and then its bias, must follow one another from the first kernel on, else nothing is
    returned: nets with more layers, or with batch normalisation, are other nets.
    """
    values = list(state.values())
    start = next((i for i, value in enumerate(values) if _is_plain(value) and value.dim() == 4), len(values))
    found = {
        name: value
        for (name, shape), value in zip(shapes.items(), values[start:], strict=False)
        if _has_shape(value, shape)
    }
    if not all(name in found for name in list(shapes)[:_CONVOLUTIONS]):
        return {}, False
    after = values[start + _CONVOLUTIONS :]
    if any(_is_plain(value) and value.dim() == 4 for value in after):
        return {}, False
    return found, any(_is_plain(value) and value.dim() == 2 for value in after)


def _is_plain(value: Tensor) -> bool:
    """Return whether a tensor is a dense one of floating-point numbers in memory."""
    is_dense = not value.is_nested and value.layout is torch.strided and not value.is_quantized
    return is_dense and value.device.type == "cpu" and value.is_floating_point()


def _is_finite(value: Tensor) -> bool:
    return _is_plain(value) and bool(value.isfinite().all())


def _has_shape(value: Tensor, shape: tuple[int, ...]) -> bool:
    return _is_plain(value) and tuple(value.shape) == shape


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


# Keras.


def _read_keras(path: Path, shapes: Shapes) -> WeightsFile:
    with opened(path) as file:
        return _read_groups(path, file, shapes)


def _read_groups(path: Path, file: "File", shapes: Shapes) -> WeightsFile:
    # Which of the forms it is.
    forms = [
        (parent, names)
        for prefix, names in _KERAS_FORMS
        if (parent := group_in(file, prefix) if prefix else file) is not None and group_in(parent, names[0]) is not None
    ]
    if not forms:
        raise InputError(f"{path}: not VGG16's weights (an HDF5 file without Keras's group block1_conv1)")
    parent, names = forms[0]
    has_dense = group_in(parent, names[len(_BLOCKS)]) is not None
    _require_dense(path, shapes, has_dense)
    # The kernel and the bias of each layer, one layer in float32 at a time.
    state: State = {}
    layers = dict.fromkeys(name.rpartition(".")[0] for name in shapes)
    for layer, name in zip(layers, names, strict=False):
        group = group_in(parent, name)
        datasets = [] if group is None else list(arrays(path, group, _DEPTH))
        for kind in ("weight", "bias"):
            ours = shapes[f"{layer}.{kind}"]
            theirs = (*ours[2:], *ours[1::-1])  # (out, in, height, width) is (height, width, in, out) there
            dataset = next((one for one in datasets if one.shape == theirs), None)
            if dataset is None:
                raise _not_vgg16(path, f"{name}'s {'kernel' if kind == 'weight' else 'bias'}")
            state[f"{layer}.{kind}"] = _as_torch(torch.from_numpy(values_of(path, dataset)).half(), f"{layer}.{kind}")
    return WeightsFile(state, is_bgr=True, has_dense=has_dense, has_usual_names=False)


def _as_torch(values: Tensor, name: str) -> Tensor:
    """Return Keras's values in PyTorch's layout."""
    if name == "dense.0.weight":  # its rows are a grid with the channels last
        return values.view(7, 7, 512, -1).permute(3, 2, 0, 1).flatten(1).contiguous()
    order = {1: (0,), 2: (1, 0), 4: (3, 2, 0, 1)}[values.dim()]
    return values.permute(order).contiguous()
