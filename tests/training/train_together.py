"""One of torchrun's processes in the tests of several: trains in a folder, and leaves what it came to there.

torchrun --nproc-per-node 2 tests/training/train_together.py FOLDER
"""

import hashlib
import json
import sys
from pathlib import Path

import small
import test_self_critical
from torch import nn

from capexp.distributed import World
from capexp.settings import Order
from capexp.training.loop import Training

KINDS: tuple[tuple[small.Kind, Order], ...] = (("merge", "captions"), ("attention", "photos"))
CONFIG = small.with_epochs(3, average=0.9, label_smoothing=0.1, schedule="cosine")
BATCH = 26  # captions: a last batch of 4 captions, or of 2 photos, which three processes cannot share


def training(kind: tuple[small.Kind, Order], dropout: float = 0.0) -> Training:
    """A training without dropout, whose masks differ by process."""
    return small.small(*kind, dropout=dropout, batch_size=BATCH)


def digest(decoder: nn.Module) -> str:
    """Of the weights, bit for bit."""
    return hashlib.sha256(b"".join(value.numpy().tobytes() for value in decoder.state_dict().values())).hexdigest()


def main(folder: Path) -> None:
    """Each kind without dropout, one with dropout, and the self-critical phase."""
    world = World.from_environment()
    world.start()
    own = folder / f"rank{world.rank}"
    own.mkdir()
    told: dict[str, object] = {}
    trainings: dict[str, Training] = {kind[0]: training(kind) for kind in KINDS}
    trainings |= {"dropout": training(KINDS[0], dropout=0.2)}
    for name, made in trainings.items():
        checkpoints = small.checkpoints_in(own / name)
        told[name] = small.losses(list(small.started(made, checkpoints, CONFIG, world=world)))
        told[f"{name} weights"] = digest(made.captioner.decoder)
    refined = test_self_critical.Task(own / "self-critical", cross_entropy=0.1)
    if not world.is_main:  # as after a resume: rank 0 alone reads bundles
        refined.captioner.record = None
    epochs = list(refined.started(3, world=world))
    told["rewards"] = [epoch.reward for epoch in epochs]
    told["self-critical weights"] = digest(refined.captioner.decoder)
    world.stop()
    threads = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
    told["threads"] = [name for name in threads if "gloo" in name]
    (own / "told.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
