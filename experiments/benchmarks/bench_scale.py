"""Memory of training on very many photos: made-up features in a real cache on disk, one caption per photo.

    python bench_scale.py                 10,000, 100,000 and 1,000,000 photos, 400 batches of each
    python bench_scale.py --batches 4000  a whole epoch of the million, a quarter of an hour

Each number of photos is measured in a new process, which looks the photos up, makes batches of their captions, and
trains on them. Two kinds of memory are reported: the process's own, and pages of the file of features, which the system
can take back. The captioner is small, because the question is the memory that the data needs. The cache of a million
photos takes 1 GiB in a temporary folder (``TMPDIR``). Linux only.
"""

import hashlib
import json
import sys
import tempfile
import threading
import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import bench
import numpy as np
import torch

from capexp.captioning.captioner import Captioner
from capexp.data.batches import Batch, CaptionBatches
from capexp.data.cache import FeatureCache
from capexp.data.captions import Split
from capexp.data.vgg16 import EncoderIdentity
from capexp.data.vocabulary import build_vocabulary
from capexp.distributed import ALONE, World
from capexp.settings import DecodingConfig, ModelConfig, TrainingConfig, VocabularyConfig
from capexp.training.loop import Training
from capexp.training.steps import PackedSteps
from capexp.training.teacher_forcing import CrossEntropy

IDENTITY = EncoderIdentity("conv5_3", "mean", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "0" * 64, "made up")
WORDS, LENGTH, UNITS, BATCH = 500, 9, 32, 256
_AT_ONCE = 10_000  # photos whose features are made up at a time


def digest_of(photo: int) -> bytes:
    """Return a made-up digest of a photo."""
    return hashlib.sha256(str(photo).encode()).digest()


def write_cache(folder: Path, photos: int) -> None:
    """Write a cache of made-up records, as an extraction writes it."""
    cache, rng = FeatureCache(folder, IDENTITY), np.random.default_rng(1)
    with cache._open_to_append() as file:
        for start in range(0, photos, _AT_ONCE):
            records = np.empty(min(_AT_ONCE, photos - start), cache._record)
            records["features"] = rng.random((len(records), *IDENTITY.shape), dtype=np.float32)
            for i, record in enumerate(records):
                record["photo"], record["check"] = digest_of(start + i), zlib.crc32(record["features"])
            file.write(records.tobytes())


def make_split(photos: int) -> Split:
    """Return a split with one caption per photo; the words have Zipf's frequencies."""
    rng = np.random.default_rng(2)
    words = [f"word{chr(97 + i // 26)}{chr(97 + i % 26)}" for i in range(WORDS)]
    captions = (
        " ".join(words[i] for i in row)
        for start in range(0, photos, _AT_ONCE)
        for row in np.minimum(rng.zipf(1.3, (min(_AT_ONCE, photos - start), LENGTH)), WORDS) - 1
    )
    return Split("train", Path(), tuple(f"{i}.jpg" for i in range(photos)), tuple((text,) for text in captions))


class Some(CaptionBatches):
    """Batches of which an epoch has only the first ``most``."""

    most = 0

    def epoch(self, seed: int, number: int, world: World = ALONE, done: int = 0) -> Iterator[Batch]:
        """Yield the first batches of an epoch."""
        return islice(super().epoch(seed, number, world, done), self.most)


def resident() -> dict[str, float]:
    """Return this process's resident memory in MiB: its own (``RssAnon``), and pages of files (``RssFile``)."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return {
        name: int(rest.split()[0]) / 1024 for name, _, rest in (line.partition(":") for line in lines if "Rss" in line)
    }


def work(folder: str, photos: int, steps: int) -> None:
    """Look up photos, make batches, train on some; write the memory that this took to a file in the folder."""
    split = make_split(photos)
    vocabulary = build_vocabulary((one for photo in split.references for one in photo), VocabularyConfig())
    features = FeatureCache(Path(folder), IDENTITY).open([digest_of(photo) for photo in range(photos)])
    batches = Some(split, vocabulary, features, BATCH)
    batches.most = steps
    config, device = TrainingConfig(precision="float32"), torch.device("cpu")
    small = ModelConfig(embedding_size=UNITS, lstm_units=UNITS)
    captioner = Captioner.fresh(small, vocabulary, IDENTITY, DecodingConfig(), seed=1)
    objective = CrossEntropy(Training(captioner, batches, batches, config, 1, device), PackedSteps)
    before, seen, ended = resident(), [], threading.Event()

    def look() -> None:
        while not ended.wait(0.02):
            seen.append(resident())

    watch = threading.Thread(target=look)
    watch.start()
    objective.train_epoch(1)
    ended.set()
    watch.join()
    most = {name: max(one[name] for one in seen) for name in before}
    held = {
        "of its own before training": before["RssAnon"],
        "of its own while training": most["RssAnon"],
        "of files before training": before["RssFile"],
        "of files while training": most["RssFile"],
    }
    (Path(folder) / "held.json").write_text(json.dumps(held), encoding="utf-8")


def main() -> None:
    """Run the benchmark, and print or write its record."""
    parser = bench.arguments(__doc__)
    parser.add_argument("--photos", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--batches", type=int, default=400)
    arguments = parser.parse_args()
    settings = {
        "batches": arguments.batches,
        "words": WORDS,
        "words of a caption": LENGTH,
        "units": UNITS,
        "batch": BATCH,
    }
    record = bench.Record("scale", "photos", torch.device("cpu"), settings)
    with tempfile.TemporaryDirectory() as folder:
        for photos in arguments.photos:
            one = Path(folder) / str(photos)
            one.mkdir()
            write_cache(one, photos)
            peak = bench.peak(work, str(one), photos, arguments.batches)
            held = json.loads((one / "held.json").read_text(encoding="utf-8"))
            for name, value in {"at most": peak, **held}.items():
                record.growth.setdefault(f"MiB {name}, by photos", {})[str(photos)] = value
    record.finish(arguments.output)


if __name__ == "__main__":
    main()
