"""Memory of training on very many photos: made-up features in a real cache on disk, one caption a photo.

    python experiments/bench_scale.py                         10,000, 100,000 and 1,000,000 photos; half an hour
    python experiments/bench_scale.py --photos 10000          some seconds

Each number of photos is measured in two processes of its own: one that looks the photos up and makes batches of their
captions, and one that then trains an epoch as well. The captioner is small, so that an epoch of a million captions does
not take hours; it is the data whose memory is in question. The cache of a million photos takes 1 GiB in a temporary
folder (``TMPDIR``).
"""

import hashlib
import sys
import tempfile
import zlib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import bench
import numpy as np
import torch

from capexp.captioning.captioner import Captioner
from capexp.captioning.decoder import ModelConfig, RecurrentDecoder
from capexp.captioning.decoding import DecodingConfig
from capexp.data.batches import CaptionBatches
from capexp.data.cache import FeatureCache
from capexp.data.captions import Split
from capexp.data.features import EncoderIdentity
from capexp.data.vocabulary import VocabularyConfig, build_vocabulary
from capexp.training.fit import TrainingConfig, train_epoch

IDENTITY = EncoderIdentity("conv5_3", "mean", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "0" * 64, "made up")
WORDS, LENGTH, UNITS, BATCH = 500, 9, 32, 256
_AT_ONCE = 10_000  # photos whose features are made up together


def digest_of(photo: int) -> bytes:
    """As if of a photo's bytes."""
    return hashlib.sha256(str(photo).encode()).digest()


def write_cache(folder: Path, photos: int) -> None:
    """Records as an extraction leaves them."""
    cache, rng = FeatureCache(folder, IDENTITY), np.random.default_rng(1)
    with cache._appending() as file:
        for start in range(0, photos, _AT_ONCE):
            records = np.empty(min(_AT_ONCE, photos - start), cache._record)
            records["features"] = rng.random((len(records), *IDENTITY.shape), dtype=np.float32)
            for i, record in enumerate(records):
                record["photo"], record["check"] = digest_of(start + i), zlib.crc32(record["features"])
            file.write(records.tobytes())


def make_split(photos: int) -> Split:
    """Photos with a caption each, of words with Zipf's frequencies."""
    rng = np.random.default_rng(2)
    words = [f"word{chr(97 + i // 26)}{chr(97 + i % 26)}" for i in range(WORDS)]
    captions = (
        " ".join(words[i] for i in row)
        for start in range(0, photos, _AT_ONCE)
        for row in np.minimum(rng.zipf(1.3, (min(_AT_ONCE, photos - start), LENGTH)), WORDS) - 1
    )
    return Split("train", Path(), tuple(f"{i}.jpg" for i in range(photos)), tuple((text,) for text in captions))


def work(folder: str, photos: int, epochs: int) -> None:
    """Looks up, makes batches, and trains so many epochs."""
    split = make_split(photos)
    vocabulary = build_vocabulary((one for photo in split.references for one in photo), VocabularyConfig())
    features = FeatureCache(Path(folder), IDENTITY).open([digest_of(photo) for photo in range(photos)])
    batches = CaptionBatches(split, vocabulary, features, BATCH)
    config, device = TrainingConfig(precision="float32"), torch.device("cpu")
    small = ModelConfig(embedding_size=UNITS, lstm_units=UNITS)
    decoder = Captioner.fresh(small, vocabulary, IDENTITY, DecodingConfig(), seed=1).decoder
    assert isinstance(decoder, RecurrentDecoder)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=1e-3)
    for number in range(1, epochs + 1):
        train_epoch(decoder, decoder, optimizer, batches, config, 1, number, device)


def main() -> None:
    """Measures, and prints or writes the record."""
    parser = bench.arguments(__doc__)
    parser.add_argument("--photos", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    arguments = parser.parse_args()
    settings = {"words": WORDS, "words of a caption": LENGTH, "units": UNITS, "batch": BATCH}
    record = bench.Record("scale", "photos", torch.device("cpu"), settings)
    looked_up, trained = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for photos in arguments.photos:
            one = Path(folder) / str(photos)
            one.mkdir()
            write_cache(one, photos)
            looked_up[str(photos)] = bench.peak(work, str(one), photos, 0)
            trained[str(photos)] = bench.peak(work, str(one), photos, 1)
    record.growth = {"MiB at most before training, by photos": looked_up, "MiB at most, by photos": trained}
    record.finish(arguments.output)


if __name__ == "__main__":
    main()
