"""Processes and devices: torchrun's ranks, spawned processes and their environment, and the device to compute on.

Under torchrun each rank computes its shard of every batch, and gradients are summed over all ranks, so that all ranks
make the same optimizer step. Only rank 0 tracks, saves and prints.
"""

import atexit
import gc
import multiprocessing
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

from capexp.errors import InputError, Outage

# torch and pydantic are not imported here because they load slowly: a command needs its rank before it parses its
# flags, and processes that decode photos import this module.
if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from capexp.settings import Precision

T = TypeVar("T")
# Collective operations time out after this: the other ranks wait while rank 0 evaluates or hashes photos.
_TIMEOUT = timedelta(hours=6)
_GRACE = 10.0  # seconds that other ranks wait for rank 0 to end first; torchrun usually ends them earlier


@dataclass(frozen=True)
class World:
    """The rank of this process and the number of ranks; without torchrun, no method communicates."""

    rank: int = 0
    size: int = 1
    has_torchrun: bool = False
    """Whether torchrun has started this process; it may have started only this one."""

    @classmethod
    def from_environment(cls) -> "World":
        """Return the rank and size from torchrun's environment variables; without them, a world of one rank.

        It does not connect the ranks; :meth:`start` does.
        """
        if {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= os.environ.keys():
            return cls(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), has_torchrun=True)
        return cls()

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which tracks, saves and prints."""
        return self.rank == 0

    def start(self) -> None:
        """Connect the ranks, and wait until all are connected."""
        if self._is_alone:
            return
        import torch
        import torch.distributed
        import torch.distributed.nn.functional  # before init: else its default arguments keep the process group alive

        backend = "gloo"
        # NCCL needs a GPU for each rank.
        if torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", self.size)):
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            backend = "cpu:gloo,cuda:nccl"
        with self._collective():
            torch.distributed.init_process_group(backend, timeout=_TIMEOUT)
        atexit.register(self.stop)

    def stop(self) -> None:
        """Disconnect the ranks and end their communication threads; :meth:`start` registers it to run at exit.

        A communication thread that is alive at interpreter exit may abort the process (SIGABRT) when it frees its last
        tensor. torchrun would then report a failure of a run that has succeeded.
        """
        if self._is_alone:
            return
        import torch.distributed

        if torch.distributed.is_initialized():
            gc.collect()  # NCCL does not end before all CUDA graphs that contain its operations are deleted
            torch.distributed.destroy_process_group()

    def shard(self, items: T) -> T:
        """Return this rank's shard of a list or array: every ``size``-th item, from ``rank`` on."""
        shard: T = items[self.rank :: self.size]  # type: ignore[index]
        return shard

    def barrier(self) -> None:
        """Wait until all ranks have called this."""
        self.sum(0.0)

    def sum(self, *values: float) -> list[float]:
        """Return each value's sum over all ranks (all-reduce)."""
        if self._is_alone:
            return list(values)
        import torch

        sums = torch.tensor(values, dtype=torch.float64)
        self._all_reduce(sums)
        return [float(value) for value in sums]

    def sum_gradients(self, module: "nn.Module", loss: "Tensor") -> "Tensor":
        """Replace each gradient of the module by its sum over all ranks; return the loss, summed over all ranks.

        It does not wait for a GPU, and can be captured in a CUDA graph.
        """
        if self._is_alone:
            return loss
        import torch

        gradients = [value.grad for value in module.parameters() if value.grad is not None]
        flat = torch.cat([loss.detach().reshape(1), *[gradient.flatten() for gradient in gradients]])
        self._all_reduce(flat)
        parts = torch.split(flat[1:], [gradient.numel() for gradient in gradients])
        torch._foreach_copy_(
            gradients, [part.view_as(gradient) for part, gradient in zip(parts, gradients, strict=True)]
        )
        return flat[0]

    def broadcast(self, make: Callable[[], T]) -> T:
        """Run ``make`` on rank 0 and broadcast its result: tensors and plain values only."""
        if self._is_alone:
            return make()
        import torch
        import torch.distributed

        results = [make() if self.is_main else None]
        with self._collective():
            # weights_only: do not execute pickled code.
            torch.distributed.broadcast_object_list(results, 0, device=torch.device("cpu"), weights_only=True)
        return results[0]  # type: ignore[return-value]

    @property
    def _is_alone(self) -> bool:
        """Whether there is no process group to communicate with."""
        return self.size == 1 and not self.has_torchrun

    def _all_reduce(self, values: "Tensor") -> None:
        import torch.distributed

        with self._collective():
            torch.distributed.all_reduce(values)

    @contextmanager
    def _collective(self) -> Iterator[None]:
        """End this process if a collective operation in the block fails, because another rank has died.

        Rank 0 raises an :class:`Outage`. The other ranks exit with status 1 and no message. torchrun reports the exit
        status of the rank that ends first, so they wait before they exit, to let rank 0 end first.
        """
        try:
            yield
        except RuntimeError as error:
            if not self.is_main:
                time.sleep(_GRACE)
                raise SystemExit(1) from error
            # Ignore the SIGTERM that torchrun sends to all remaining ranks: rank 0 still has to close the run.
            signal.signal(signal.SIGTERM, lambda number, frame: None)
            raise Outage(
                "another of torchrun's processes has gone; see what it or torchrun has printed, then resume the run "
                "with --resume"
            ) from error


ALONE = World()
"""The world of a single process."""


@contextmanager
def environment(**values: str | None) -> Iterator[None]:
    """Set environment variables for the block, unset those given as None, and restore all of them after it."""
    before = {name: os.environ.get(name) for name in values}
    _set_environment(values)
    try:
        yield
    finally:
        _set_environment(before)


def _set_environment(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def follow_parent(end: Callable[[], object]) -> None:
    """Call ``end`` in a background thread when the process that has started this one dies."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "not a process that multiprocessing has started"

    def follow() -> None:
        parent.join()
        end()

    threading.Thread(target=follow, daemon=True).start()


def choose_device(name: str) -> "torch.device":
    """Return the device that ``training.device`` names; ``auto`` is CUDA if available, else the CPU.

    Under torchrun, ``auto`` and ``cuda`` give each process its own GPU.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if World.from_environment().size > 1 and name.startswith("cuda"):
        if name != "cuda":
            raise InputError(f"training.device = '{name}': torchrun gives each process a GPU of its own; use 'cuda'")
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    if not re.fullmatch(r"cpu|cuda(:\d{1,3})?", name):
        raise InputError(f"training.device = '{name}': use 'auto', 'cpu', 'cuda' or 'cuda:0'")
    device = torch.device(name)
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise InputError(f"training.device = '{name}': this machine has {count} CUDA devices; use 'auto' or 'cpu'")
    return device


def use_bfloat16(device: "torch.device", precision: "Precision") -> bool:
    """Return whether to compute in bfloat16; ``auto`` does if the device has instructions for it."""
    import torch

    if precision != "auto":
        return precision == "bfloat16"
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
