"""One of torchrun's processes in the tests of several: trains in a folder, and leaves what it came to there.

torchrun --nproc-per-node 2 tests/training/train_together.py FOLDER
"""

import hashlib
import json
import sys
from pathlib import Path

import test_fit
import test_self_critical
from torch import nn

from capexp.data.batches import Order
from capexp.distributed import place

KINDS: tuple[tuple[test_fit.Kind, Order], ...] = (("merge", "captions"), ("attention", "photos"))
CONFIG = test_fit.replace_epochs(3, average=0.9, label_smoothing=0.1, schedule="cosine")
BATCH = 26  # captions: a last batch of 4 captions, or of 2 photos, which three processes cannot share


def task(folder: Path, kind: tuple[test_fit.Kind, Order], dropout: float = 0.0) -> test_fit.Task:
    """Something to train on; without dropout, whose masks differ by process."""
    return test_fit.Task(folder, 1, *kind, dropout=dropout, batch_size=BATCH)


def digest(decoder: nn.Module) -> str:
    """Of the weights, bit for bit."""
    return hashlib.sha256(b"".join(value.numpy().tobytes() for value in decoder.state_dict().values())).hexdigest()


def main(folder: Path) -> None:
    """Each kind without dropout, one with dropout, and the self-critical phase."""
    ranks = place()
    ranks.join()
    own = folder / f"rank{ranks.rank}"
    own.mkdir()
    told: dict[str, object] = {}
    for kind in KINDS:
        made = task(own / kind[0], kind)
        told[kind[0]] = test_fit.losses(list(made.started(CONFIG, ranks=ranks)))
        told[f"{kind[0]} weights"] = digest(made.captioner.decoder)
    made = task(own / "dropout", KINDS[0], dropout=0.2)
    told["dropout"] = test_fit.losses(list(made.started(CONFIG, ranks=ranks)))
    told["dropout weights"] = digest(made.captioner.decoder)
    refined = test_self_critical.Task(own / "self-critical", cross_entropy=0.1)
    epochs = list(refined.started(3, ranks=ranks))
    told["rewards"] = [epoch.reward for epoch in epochs]
    told["self-critical weights"] = digest(refined.captioner.decoder)
    ranks.leave()
    threads = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
    told["threads"] = [name for name in threads if "gloo" in name]
    (own / "told.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
