"""One of torchrun's processes in the tests of several: trains in a folder, and leaves its results there.

torchrun --nproc-per-node 2 tests/training/train_together.py FOLDER [cpu|cuda]
"""

import hashlib
import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import small
import test_self_critical
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from capexp.distributed import ALONE, World, choose_device
from capexp.settings import Order
from capexp.training.loop import Training, fit
from capexp.training.policy_steps import CapturedPolicySteps, PackedPolicySteps
from capexp.training.steps import CapturedSteps, PackedSteps
from capexp.training.teacher_forcing import CrossEntropy

KINDS: tuple[tuple[small.Kind, Order], ...] = (("merge", "captions"), ("attention", "photos"))
STEPS = {"packed": PackedSteps, "captured": CapturedSteps}
CONFIG = small.with_epochs(3, average=0.9, label_smoothing=0.1, schedule="cosine")
BATCH = 26  # captions: a last batch of 4 captions, or of 2 photos, which three processes cannot share


def training(
    kind: tuple[small.Kind, Order], dropout: float = 0.0, device: torch.device = small.CPU, world: World = ALONE
) -> Training:
    """A training without dropout, whose masks differ by process."""
    return replace(small.small(*kind, dropout=dropout, batch_size=BATCH), config=CONFIG, device=device, world=world)


def trained(made: Training, steps: str, folder: Path) -> list[tuple[float, float]]:
    """Trains with steps of a kind: the losses of each epoch."""
    checkpoints = small.checkpoints_in(folder) if made.world.is_main else None
    return small.losses(list(fit(made, CrossEntropy(made, STEPS[steps]), checkpoints)))


def digest(decoder: nn.Module) -> str:
    """Of the weights, bit for bit."""
    values = decoder.state_dict().values()
    return hashlib.sha256(b"".join(value.cpu().numpy().tobytes() for value in values)).hexdigest()


def difference(one: nn.Module, other: nn.Module) -> float:
    """The largest difference between two decoders' weights."""
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max(float((a - b).detach().abs().max()) for a, b in pairs)


def all_reduces(made: Training) -> dict[str, int]:
    """How often a step calls the all-reduce while it is captured, and how many kernels of NCCL a replay runs."""
    steps = CapturedSteps(made, made.decoder)
    next(steps.of_epoch(1))  # without a graph, so that NCCL is connected
    with profile(activities=[ProfilerActivity.CPU]) as captured:
        graph = steps._graphs._capture(partial(steps._work, made.train.longest - 1), steps.optimizer.zero_grad)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as replayed:
        graph.replay()
        torch.cuda.synchronize()
    return {
        "captured": sum(event.name == "c10d::allreduce_" for event in captured.events()),
        "kernels": sum("ncclDevKernel" in event.name for event in replayed.events()),
    }


def main(folder: Path, device_name: str = "cpu") -> None:
    """Each kind without dropout, with steps of both kinds; one with dropout; and the self-critical phase."""
    world = World.from_environment()
    world.start()
    device = choose_device(device_name)
    own = folder / f"rank{world.rank}"
    own.mkdir()
    told: dict[str, object] = {}
    for kind in KINDS:
        packed, captured = (training(kind, 0.0, device, world) for _ in STEPS)
        for steps, made in (("packed", packed), ("captured", captured)):
            told[f"{kind[0]} {steps}"] = trained(made, steps, own / kind[0] / steps)
            told[f"{kind[0]} {steps} weights"] = digest(made.decoder)
        told[f"{kind[0]} difference"] = difference(packed.decoder, captured.decoder)
    for steps in STEPS:
        made = training(KINDS[0], 0.2, device, world)
        told[f"dropout {steps}"] = trained(made, steps, own / "dropout" / steps)
        told[f"dropout {steps} weights"] = digest(made.decoder)
    if device.type == "cuda":
        made = training(KINDS[0], 0.0, device, world)
        told["chosen"] = type(CrossEntropy(made).steps).__name__
        told["all-reduces"] = all_reduces(made)
    for steps, make_steps in (("packed", PackedPolicySteps), ("captured", CapturedPolicySteps)):
        refined = test_self_critical.Task(own / f"self-critical {steps}", cross_entropy=0.1)
        if not world.is_main:  # as after a resume: rank 0 alone reads bundles
            refined.captioner.record = None
        epochs = list(refined.started(3, world=world, make_steps=make_steps, device=device))
        told[f"rewards {steps}"] = [epoch.reward for epoch in epochs]
        told[f"self-critical {steps} weights"] = digest(refined.captioner.decoder)
    world.stop()
    threads = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
    told["threads"] = [name for name in threads if "gloo" in name]
    (own / "told.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
