"""The processes that torchrun starts to train one captioner together.

Each takes its share of every batch, and the sum of their gradients is that of the whole batch, so that all take the
same step. The first (rank 0) alone tracks, saves and tells.
"""

import atexit
import io
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

from capexp.errors import Outage

if TYPE_CHECKING:  # a command asks which process it is before it has read its flags
    from torch import Tensor, nn

T = TypeVar("T")
_PATIENCE = timedelta(hours=6)  # the first one measures, or hashes photos, while the others wait
_GRACE = 10.0  # seconds; torchrun ends the others long before


@dataclass(frozen=True)
class Ranks:
    """This process and how many there are; alone, nothing is sent or waited for."""

    rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this one tracks, saves and tells."""
        return self.rank == 0

    def join(self) -> None:
        """Waits until all processes are here."""
        if self.count == 1:
            return
        import torch
        import torch.distributed
        import torch.distributed.nn.functional  # once there is a group, its functions would hold it for good

        backend = "gloo"
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            backend = "cpu:gloo,cuda:nccl"
        with _together(self.rank):
            torch.distributed.init_process_group(backend, timeout=_PATIENCE)
        atexit.register(self.leave)

    def add_gradients(self, decoder: "nn.Module", loss: "Tensor") -> "Tensor":
        """Makes each gradient the sum of all processes', and returns the sum of their losses."""
        if self.count == 1:
            return loss
        import torch

        gradients = [value.grad for value in decoder.parameters() if value.grad is not None]
        flat = torch.cat([loss.detach().reshape(1), *[gradient.flatten() for gradient in gradients]])
        self._reduce(flat)
        parts = torch.split(flat[1:], [gradient.numel() for gradient in gradients])
        torch._foreach_copy_(
            gradients, [part.view_as(gradient) for part, gradient in zip(parts, gradients, strict=True)]
        )
        return flat[0]

    def add(self, *values: float) -> list[float]:
        """The sum over all processes of each value."""
        if self.count == 1:
            return list(values)
        import torch

        sums = torch.tensor(values, dtype=torch.float64)
        self._reduce(sums)
        return [float(value) for value in sums]

    def from_first(self, make: Callable[[], T]) -> T:
        """What the first process makes of plain values and tensors, in all of them."""
        if self.count == 1:
            return make()
        import torch
        import torch.distributed

        content = io.BytesIO()
        made = make() if self.is_first else None
        torch.save(made, content)
        size = torch.tensor([content.tell()])
        with _together(self.rank):
            torch.distributed.broadcast(size, 0)
            sent = torch.empty(int(size), dtype=torch.uint8)
            if self.is_first:
                sent = torch.frombuffer(content.getbuffer(), dtype=torch.uint8)
            torch.distributed.broadcast(sent, 0)
        if self.is_first:
            return made  # type: ignore[return-value]
        return torch.load(io.BytesIO(sent.numpy().tobytes()), weights_only=True)  # type: ignore[no-any-return]

    def wait(self) -> None:
        """Until all have come here."""
        self.add(0.0)

    def leave(self) -> None:
        """The work together is done: the threads that sent and received have ended.

        One that outlived it would let go of its last tensor while the interpreter ends, which ends the process by
        SIGABRT, and torchrun then takes its work for failed.
        """
        if self.count == 1:
            return
        import torch.distributed

        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

    def _reduce(self, values: "Tensor") -> None:
        import torch.distributed

        with _together(self.rank):
            torch.distributed.all_reduce(values)


ALONE = Ranks()


def place() -> Ranks:
    """Which of torchrun's processes this is, by the environment; they are not in touch yet."""
    if {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= os.environ.keys():
        return Ranks(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    return ALONE


@contextmanager
def _together(rank: int) -> Iterator[None]:
    """Ends this process where another has gone: the first one in order, the others without a word.

    They give way to the one that has gone, as torchrun tells the status of the one that ends first.
    """
    try:
        yield
    except RuntimeError as error:
        if rank > 0:
            time.sleep(_GRACE)
            raise SystemExit(1) from error
        # torchrun ends the others when one has gone; the run is brought to its end meanwhile.
        signal.signal(signal.SIGTERM, lambda number, frame: None)
        raise Outage(
            "another of torchrun's processes has gone; see what it or torchrun told, then go on with --resume"
        ) from error
