"""Captions a second at beam 3: a thousand photos at once against one photo at a time, in turn, on this machine.

    python experiments/bench_decoding.py                     made-up features, an untrained decoder, 12 words a caption
    python experiments/bench_decoding.py --model MODEL       a captioner's own decoder and vocabulary

Prints the median of each and the median ratio over rounds, and writes them as JSON with ``--output``.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from capexp.captioning.captioner import Captioner
from capexp.captioning.decoder import ModelConfig
from capexp.captioning.decoding import DecodingConfig, Hypothesis, decode
from capexp.data.features import EncoderIdentity
from capexp.data.vocabulary import Vocabulary
from capexp.tracking.bundle import find_bundle
from capexp.training.fit import choose_device

WORDS, WORDS_A_CAPTION = 2536, 12  # of Flickr8k with minimum count 5; with EOS, its mean caption
AT_ONCE = 256  # photos, as the captioner takes them


def untrained() -> Captioner:
    """A captioner of the size that flickr8k-merge-conv has."""
    words = Vocabulary(tuple(f"w{number}" for number in range(WORDS)), "standard", "token")
    identity = EncoderIdentity("conv5_3", "mean", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "0" * 64, "made up")
    decoding = DecodingConfig(maximum_length=WORDS_A_CAPTION)
    return Captioner.fresh(ModelConfig(photo_norm="unit"), words, identity, decoding, seed=1)


def seconds(work: Callable[[], object]) -> float:
    """How long some work takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a bundle's folder, or what MLflow registered")
    parser.add_argument("--photos", type=int, default=1000)
    parser.add_argument("--one-by-one", type=int, default=100, help="photos taken one at a time in a round")
    parser.add_argument("--beam-width", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    arguments = parser.parse_args()
    device = choose_device(arguments.device)
    captioner = Captioner.load(find_bundle(arguments.model), device) if arguments.model else untrained()
    decoder = captioner.decoder.to(device)
    config = captioner.decoding.model_copy(update={"method": "beam", "beam_width": arguments.beam_width})
    shape = captioner.encoder_identity.shape
    features = torch.rand(arguments.photos, *shape, generator=torch.Generator().manual_seed(1)).to(device)

    def decoded(photos: int, at_once: int) -> list[Hypothesis]:
        parts = [features[start : start + at_once] for start in range(0, photos, at_once)]
        return [found[0] for part in parts for found in decode(decoder, part, captioner.vocabulary, config)]

    def batched() -> list[Hypothesis]:
        return decoded(arguments.photos, AT_ONCE)

    def one_by_one() -> list[Hypothesis]:
        return decoded(arguments.one_by_one, 1)

    same = [a.tokens == b.tokens for a, b in zip(batched(), one_by_one(), strict=False)]
    rounds = [
        (arguments.photos / seconds(batched), arguments.one_by_one / seconds(one_by_one))
        for _ in range(arguments.rounds)
    ]
    record = {
        "device": str(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "photos": arguments.photos,
        "beam_width": arguments.beam_width,
        "model": arguments.model or "untrained",
        "batched_captions_per_second": statistics.median(a for a, _ in rounds),
        "one_by_one_captions_per_second": statistics.median(b for _, b in rounds),
        "ratio": statistics.median(a / b for a, b in rounds),
        "same_captions": sum(same) / len(same),
    }
    print(json.dumps(record, indent=2))
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
