"""CUDA graphs' rules on a CPU: operations are recorded once with their tensors, and run again without any Python."""

import sys
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from capexp.captioning import attention, vocabulary_layer
from capexp.captioning.decoder import Decoder
from capexp.training import graphs, policy_steps, steps

_aten = torch.ops.aten
_WAITING = {
    _aten._local_scalar_dense.default, _aten.equal.default, _aten.nonzero.default, _aten.masked_select.default,
    _aten._unique2.default, _aten.bincount.default, _aten.repeat_interleave.Tensor, _aten.lift_fresh.default,
}  # fmt: skip
"""Operations that would wait for a GPU, or copy from memory of the CPU that is gone at a replay."""
_INDEXING = {_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default}


def _can_be_captured(function: Any, args: tuple[Any, ...]) -> bool:
    if function in _INDEXING:
        return not any(isinstance(index, Tensor) and index.dtype == torch.bool for index in args[1])
    return function not in _WAITING or _is_asked_on_a_cpu_alone()


def _is_asked_on_a_cpu_alone() -> bool:
    """Whether the loss's backward pass asks if its gradient is 1; a replay checks that the answer is the same."""
    frame = sys._getframe()
    while frame.f_code.co_filename != vocabulary_layer.__file__:
        if frame.f_back is None:
            return False
        frame = frame.f_back
    return frame.f_code.co_name == "backward"


class Recording(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The operations of a piece of work, in their order.

    It finds values of the CPU that a graph would keep, and waits for the GPU. It does not find what is particular to a
    GPU: memory that is used again, streams, and kernels that cannot be captured.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._operations: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Any]]] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        assert _can_be_captured(function, args), f"{function} cannot be captured"
        # Other tensors on the same memory, because some operations change a tensor's shape in place.
        args, kwargs, kept = tree_map_only(Tensor, Tensor.detach, (args, kwargs or {}, tree_leaves(result)))
        self._operations.append((function, args, kwargs, kept))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        """Run all operations again on the same tensors."""
        for function, args, kwargs, before in self._operations:
            inputs = {_storage(value) for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)}
            for old, new in zip(before, tree_leaves(function(*args, **kwargs)), strict=True):
                if isinstance(old, bool | int | float):
                    assert new == old, f"{function}: {old} is part of the graph, but it would be {new} now"
                elif isinstance(old, Tensor) and _storage(old) not in inputs:
                    # Neither a view nor an operation in place.
                    assert new.shape == old.shape, f"{function}: {tuple(old.shape)}, but {tuple(new.shape)} now"
                    old.copy_(new)


def _storage(value: Tensor) -> int:
    return value.untyped_storage().data_ptr()


class RecordedGraphs(graphs.Graphs):
    """Runs each kind of work first as it is, then records it, and then only replays it."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.recorded: dict[Hashable, Recording | None] = {}

    def run(self, kind: Hashable, work: graphs.Work, release: graphs.Work | None = None) -> None:
        recording = self.recorded.get(kind)
        if recording is not None:
            recording.replay()
        elif kind not in self.recorded:
            self.recorded[kind] = None
            work()
        else:
            if release is not None:
                release()
            self.recorded[kind] = Recording()
            with self.recorded[kind]:  # type: ignore[union-attr]
                work()


@contextmanager
def as_on_a_gpu(*modules: Any) -> Iterator[None]:
    """Steps of these modules record their work; decoders compute in a GPU's ways, with fixed shapes."""

    def undistinguished(values: Tensor) -> tuple[Tensor, None]:
        return values, None

    def is_by_word(device: torch.device) -> bool:
        return False

    def clip(decoder: Decoder, most: float) -> None:
        nn.utils.clip_grad_norm_(decoder.parameters(), most)

    with pytest.MonkeyPatch.context() as patch:
        for module in (steps, policy_steps):
            patch.setattr(module, "clip", clip)
        for module in modules:
            patch.setattr(module, "Graphs", RecordedGraphs)
        patch.setattr(attention, "distinct", undistinguished)
        patch.setattr(vocabulary_layer, "_is_by_word", is_by_word)
        yield
