"""Captions per second at beam 3: a thousand photos at once against one photo at a time, with both decoders.

Then captions per second and seconds for a thousand photos of an attention decoder of 512 units by greedy search,
beam 5 and consensus (beam 10, 40 samples).

    python bench_decoding.py                made-up features and decoders, captions as long as people's
    python bench_decoding.py --model MODEL  a captioner's own decoder and vocabulary
    python bench_decoding.py --no-race --no-peaks --method-photos 1000    the three methods alone

The floor is the time of the vocabulary layer's matrix products alone. Peaks of memory are measured in a process that
does nothing else.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).parents[2]))

import bench
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from capexp.captioning.captioner import Captioner
from capexp.captioning.decoder import Decoder, DecoderState, RecurrentDecoder
from capexp.data.vgg16 import EncoderIdentity
from capexp.data.vocabulary import EOS, Vocabulary
from capexp.distributed import choose_device
from capexp.settings import DecodingConfig, ModelConfig
from capexp.tracking.models import find_bundle

WORDS = 2536  # the size of Flickr8k's vocabulary with minimum count 5
MEAN, DEVIATION = 10.8, 3.8  # the number of words of a Flickr8k caption
PHOTOS, WIDTHS = (256, 512, 1024), (1, 3, 10)
LARGE = {"embedding_size": 512, "lstm_units": 512, "attention_size": 256}  # as in flickr8k-attention.toml

Kind = Literal["merge", "attention"]


@dataclass(frozen=True)
class Timed(DecoderState):
    """A decoder's state, with the number of words that each caption will have (``words``) and now has (``said``)."""

    state: DecoderState
    words: Tensor  # (B,)
    said: int

    def select(self, rows: Tensor) -> "Timed":
        """Return the state of the captions ``rows``."""
        return Timed(self.state.select(rows), self.words[rows], self.said)

    def repeat(self, times: int) -> "Timed":
        """Return the state with each caption repeated ``times`` times in a row."""
        return Timed(self.state.repeat(times), self.words.repeat_interleave(times), self.said)


class EndsLikePeople(RecurrentDecoder):
    """An untrained decoder whose captions are as long as people's; each photo's features determine the length."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    def start(self, features: Tensor) -> Timed:
        """Return the state before the first word; the photo's first feature determines the caption's length."""
        words = (MEAN + DEVIATION * features[:, 0, 0]).round().clamp(2, 30)
        return Timed(self.decoder.start(features), words, 0)

    def read(self, state: DecoderState, words: Tensor, counts: Sequence[int]) -> tuple[Tensor, DecoderState]:
        """Raise NotImplementedError: decoding does not call this method."""
        raise NotImplementedError

    def step(self, state: DecoderState, words: Tensor) -> tuple[Tensor, Timed]:
        """Take the decoder's own step, but set the logit of EOS so that the caption ends at its length."""
        assert isinstance(state, Timed)
        logits, after = self.decoder.step(state.state, words)
        logits[:, EOS] = torch.where(state.words <= state.said, 100.0, -100.0)
        return logits, Timed(after, state.words, state.said + 1)


def made_up(kind: Kind, **sizes: Any) -> Captioner:
    """Return an untrained captioner of the tutorial's sizes, or of the given ones."""
    words = Vocabulary(tuple(f"w{number}" for number in range(WORDS)), "standard", "token")
    pool: Literal["mean", "max2"] = "mean" if kind == "merge" else "max2"
    identity = EncoderIdentity("conv5_3", pool, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "0" * 64, "made up")
    captioner = Captioner.fresh(ModelConfig(decoder=kind, **sizes), words, identity, DecodingConfig(), seed=1)
    captioner.decoder = EndsLikePeople(captioner.decoder)
    return captioner


def features_of(captioner: Captioner, photos: int) -> NDArray[np.float16]:
    """Return made-up features of ``photos`` photos."""
    shape = (photos, *captioner.encoder_identity.shape)
    return np.random.default_rng(1).standard_normal(shape, np.float32).astype(np.float16)


def beam(captioner: Captioner, width: int) -> DecodingConfig:
    """Return the captioner's decoding settings with beam search of a given width."""
    return captioner.decoding.model_copy(update={"method": "beam", "beam_width": width})


def decode_made_up(kind: Kind, photos: int, width: int) -> None:
    """Caption ``photos`` made-up photos, a part at a time, as if their features were read from a cache."""
    captioner = made_up(kind)
    features, config = features_of(captioner, PHOTOS[0]), beam(captioner, width)
    captions = [captioner.caption_features(features, config) for _ in range(photos // PHOTOS[0])]
    assert sum(map(len, captions)) == photos


def contestants(captioner: Captioner, photos: int, one_by_one: int, width: int) -> dict[str, Callable[[], float]]:
    """Return the contestants: batched, one photo at a time, and the vocabulary layer's products alone.

    Each returns the number of captions it made.
    """
    features, config = features_of(captioner, photos), beam(captioner, width)
    said = captioner.caption_features(features, config)
    steps = sum(len(caption.text.split()) + 1 for caption in said)
    weighed = torch.randn(steps * width, units(captioner), device=captioner.device)
    words = torch.randn(len(captioner.vocabulary), weighed.shape[1], device=captioner.device)

    def floor() -> float:
        for part in torch.split(weighed, 256 * width):
            part @ words.t()
        return photos

    def alone() -> float:
        for photo in range(one_by_one):
            captioner.caption_features(features[photo : photo + 1], config)
        return one_by_one

    return {
        "batched": lambda: len(captioner.caption_features(features, config)),
        "one at a time": alone,
        "floor": floor,
    }


def methods(captioner: Captioner, photos: dict[str, int]) -> dict[str, Callable[[], float]]:
    """Return a contestant for each method of decoding, which captions as many photos as given for it."""
    settings: dict[str, dict[str, Any]] = {
        "greedy": {"method": "greedy"},
        "beam 5": {"method": "beam", "beam_width": 5},
        "consensus": {"method": "consensus", "beam_width": 10, "samples": 40, "length_penalty": 0.7},
    }

    def contestant(config: DecodingConfig, features: NDArray[np.float16]) -> Callable[[], float]:
        return lambda: len(captioner.caption_features(features, config))

    return {
        name: contestant(captioner.decoding.model_copy(update=update), features_of(captioner, photos[name]))
        for name, update in settings.items()
    }


def units(captioner: Captioner) -> int:
    """Return the width of the output before the vocabulary layer."""
    return captioner.models[0].lstm_units


def same_captions(captioner: Captioner, photos: int, width: int) -> float:
    """Return the share of photos whose caption in a batch equals their caption alone."""
    features, config = features_of(captioner, photos), beam(captioner, width)
    together = captioner.caption_features(features, config)
    alone = [captioner.caption_features(features[photo : photo + 1], config)[0] for photo in range(photos)]
    return sum(a.text == b.text for a, b in zip(together, alone, strict=True)) / photos


def main() -> None:
    """Run the benchmark and print its record."""
    parser = bench.arguments(__doc__)
    parser.add_argument("--model", help="a bundle's folder, or a model in MLflow's store")
    parser.add_argument("--photos", type=int, default=1000)
    parser.add_argument("--one-by-one", type=int, default=50, help="photos per round, one at a time")
    parser.add_argument("--beam-width", type=int, default=3)
    parser.add_argument(
        "--consensus-photos", type=int, help="photos per round by consensus [on a CPU 50, else --photos]"
    )
    parser.add_argument("--no-race", action="store_true", help="leave out the comparison with one photo at a time")
    parser.add_argument("--no-peaks", action="store_true", help="leave out the peaks of memory")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = choose_device(arguments.device)
    if arguments.model is None:
        captioners = {"merge": made_up("merge"), "attention": made_up("attention")}
    else:
        captioner = Captioner.load(find_bundle(arguments.model))
        assert len(captioner.models) == 1, "an ensemble"
        captioners = {captioner.models[0].decoder: captioner}
    width = arguments.beam_width
    settings = {name: getattr(arguments, name) for name in ("model", "photos", "one_by_one", "beam_width")}
    record = bench.Record("decoding", "captions", device, settings)
    for kind, captioner in captioners.items():
        captioner.decoder.to(device)
        if arguments.no_race:
            continue
        runners = contestants(captioner, arguments.photos, arguments.one_by_one, width)
        record.race(
            {f"{kind} {name}": work for name, work in runners.items()},
            [(f"{kind} batched", f"{kind} one at a time"), (f"{kind} batched", f"{kind} floor")],
            arguments.rounds,
        )
        settings[f"{kind} same captions"] = same_captions(captioner, arguments.one_by_one, width)
    if arguments.model is None or "attention" in captioners:
        captioner = captioners["attention"] if arguments.model is not None else made_up("attention", **LARGE)
        captioner.decoder.to(device)
        default = (200, 200, 50) if device.type == "cpu" else (arguments.photos,) * 3
        given = default if arguments.method_photos is None else (arguments.method_photos,) * 3
        photos = dict(zip(("greedy", "beam 5", "consensus"), given, strict=True))
        settings["photos by method"] = photos
        contestants_by_method = methods(captioner, photos)
        record.race(contestants_by_method, [(name, "greedy") for name in ("beam 5", "consensus")], arguments.rounds)
        seconds = {name: 1000 / record.rates[name] for name in contestants_by_method}
        record.growth["attention seconds per 1,000 photos"] = seconds
    if arguments.model is None and not arguments.no_peaks:
        for kind in captioners:
            peaks = {str(photos): bench.peak(decode_made_up, kind, photos, width) for photos in PHOTOS}
            record.peaks[kind] = max(peaks.values())
            record.growth[f"{kind} MiB by photos"] = peaks
            record.growth[f"{kind} MiB by beam width"] = {
                str(wide): bench.peak(decode_made_up, kind, PHOTOS[0], wide) for wide in WIDTHS
            }
    record.finish(arguments.output)


if __name__ == "__main__":
    main()
