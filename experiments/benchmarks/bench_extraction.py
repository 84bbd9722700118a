"""Photos per second from JPEG files to cached features, against a plain loop, decoding alone, and the arithmetic.

    python bench_extraction.py                                 drawn photos, random weights
    python bench_extraction.py --photos FOLDER --weights FILE  real ones: the arithmetic is the same

Contestants run in turn on photos of the same files:

- *ours*: as ``capexp.extract`` does it: digests, decoding, VGG16 up to the whole grid of conv5_3, and the file on disk;
- *ours, float32*;
- *one by one*: a simple loop with torchvision, one photo at a time, in float32;
- *decoding*: ours, without the network;
- *products*: the floor: large products of matrices in the faster precision; 30.7 GFLOP count as one photo;
- *convolution*: the same with one layer of VGG16, which may do more operations per second than a product;
- on a GPU, *network*: ours, without files; and ours with *a quarter of the photos*. The difference between that and all
  photos gives the time of *each photo more*, without the time of the start.

The peak of memory is measured in a new process: with all photos, and with a quarter of them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING or __name__ != "__mp_main__":  # the processes that decode import this file too, but need none of this
    sys.path.insert(0, str(Path(__file__).parents[2]))

    import shutil
    import tempfile
    from itertools import repeat

    import numpy as np
    import torch
    import torchvision
    from bench import Record, arguments, flops, peak
    from PIL import Image
    from torch import nn

    from capexp.data.cache import FeatureCache, cache_features
    from capexp.data.extraction import _batch_by_batch
    from capexp.data.photo_transform import PhotoTransform
    from capexp.data.photos import find_photos
    from capexp.data.pixels import decode_by_processes, decode_by_threads, decoding_processes
    from capexp.data.vgg16 import load_encoder
    from capexp.data.vgg16_weights import NETS
    from capexp.distributed import choose_device
    from capexp.settings import PHOTO_SIZE, FeaturesConfig, Precision

GFLOP: Final = 30.693  # per photo in the convolutions up to conv5_3; a multiplication and an addition count as two
LAYER: Final = (8, 256, 56)  # the number of photos, the channels and the side of the map of conv3_2
DRAWN: Final = 256  # pictures that are drawn; further files are copies, each with a different mark after its end


def draw_photos(folder: Path, count: int) -> list[Path]:
    """Draw JPEG files of 500x375 and about 130 KB, like Flickr's: clouds of many sizes, and noise."""
    generator = np.random.default_rng(0)
    paths = [folder / f"{number:06}.jpg" for number in range(count)]
    for path in paths:
        pixels = generator.normal(0, 9, (375, 500, 3))
        for side in (4, 12, 36, 108):
            cloud = Image.fromarray(generator.integers(0, 256, (side, side, 3), dtype=np.uint8))
            pixels += 0.25 * np.asarray(cloud.resize((500, 375), Image.Resampling.BICUBIC))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=95)
    return paths


def repeated(photos: list[Path], count: int, folder: Path) -> list[Path]:
    """Return ``count`` files that all differ in content, by copying the given photos as often as needed."""
    files = photos[:count]
    for number in range(len(files), count):
        photo = photos[number % len(photos)]
        files.append(folder / f"again-{number:06}{photo.suffix}")
        files[-1].write_bytes(photo.read_bytes() + b"%d" % number)
    return files


def delete(scratch: Path) -> None:
    """Delete the cache, if there is one."""
    shutil.rmtree(scratch / "cache", ignore_errors=True)


def draw_weights(path: Path) -> Path:
    """Write VGG16's convolutions with random weights to a file; return its path."""
    net: nn.Sequential = torchvision.models.vgg16(weights=None).features
    torch.save({f"features.{name}": value.half() for name, value in net.state_dict().items()}, path)
    return path


def extract(photos: list[Path], weights: Path, precision: Precision, device: torch.device, batch_size: int) -> None:
    """Compute the features of photos into a new cache, as the command does."""
    import tempfile

    from capexp.data.cache import FeatureCache, cache_features
    from capexp.data.vgg16 import load_encoder
    from capexp.settings import FeaturesConfig

    config = FeaturesConfig(layer="conv5_3", weights=str(weights), precision=precision)
    encoder = load_encoder(config).prepare(device, precision)
    with tempfile.TemporaryDirectory() as folder:
        cache_features(photos, FeatureCache(Path(folder), encoder.identity), lambda: encoder, batch_size)


def main() -> None:
    """Run the benchmark and print its record."""
    parser = arguments(__doc__)
    parser.add_argument("--photos", metavar="FOLDER", help="folder of photos; default: drawn ones")
    parser.add_argument("--weights", type=Path, metavar="FILE", help="VGG16's convolutions; default: random weights")
    parser.add_argument("--count", type=int, help="number of photos in a round; default: 64, and 32,768 on a GPU")
    parser.add_argument("--batch-size", type=int, default=FeaturesConfig().batch_size, help="batch size on a GPU")
    flags = parser.parse_args()
    torch.set_num_threads(flags.threads)
    device = choose_device(flags.device)
    count = flags.count or (64 if device.type == "cpu" else 32_768)
    with tempfile.TemporaryDirectory() as folder:
        found = find_photos([flags.photos]) if flags.photos else draw_photos(Path(folder), min(count, DRAWN))
        photos = repeated(found, count, Path(folder))
        weights = flags.weights or draw_weights(Path(folder) / "random.pth")
        measure(photos, Path(folder), weights, device, flags.batch_size, flags.rounds).finish(flags.output)


def measure(
    photos: list[Path], scratch: Path, weights: Path, device: torch.device, batch_size: int, rounds: int
) -> Record:
    """Measure all contestants; return the record."""
    side = 2048 if device.type == "cpu" else 8192  # the side of the matrices, which are much larger than the caches
    speeds = {dtype: flops((side, side), (side, side), dtype, device) for dtype in (torch.float32, torch.bfloat16)}
    best = max(speeds, key=lambda dtype: speeds[dtype])
    kilobytes = sum(photo.stat().st_size for photo in photos) / len(photos) / 1000
    processes = decoding_processes(len(photos), PHOTO_SIZE) if device.type == "cuda" else 0
    settings = {"photos": len(photos), "kilobytes": round(kilobytes), "pixels": Image.open(photos[0]).size}
    settings |= {"precision": str(best).removeprefix("torch."), "batch_size": batch_size, "processes": processes}
    record = Record("extraction", "photos", device, settings)

    def ours(precision: Precision, count: int = len(photos)) -> Callable[[], int]:
        config = FeaturesConfig(layer="conv5_3", weights=str(weights), precision=precision)
        encoder = load_encoder(config).prepare(device, precision)

        def work() -> int:
            cache = FeatureCache(scratch / "cache", encoder.identity)
            return len(cache_features(photos[:count], cache, lambda: encoder, batch_size))

        return work

    net = torchvision.models.vgg16(weights=None).features[:30].to(device).eval()
    mean = torch.tensor(NETS["IMAGENET1K_FEATURES"].mean).view(3, 1, 1)
    few = photos[: min(max(1, len(photos) // 8), 256)]

    @torch.no_grad()
    def one_by_one() -> int:
        for photo in few:
            with Image.open(photo) as image:
                pixels = np.asarray(image.convert("RGB").resize((PHOTO_SIZE, PHOTO_SIZE), Image.Resampling.BILINEAR))
            grid = net((torch.tensor(pixels).permute(2, 0, 1) - mean)[None].to(device))
            grid.half().cpu().numpy()
        return len(few)

    def decoding() -> int:
        transform = PhotoTransform(PHOTO_SIZE)
        decoded = (
            decode_by_processes(photos, transform, processes) if processes else decode_by_threads(photos, transform)
        )
        return sum(1 for _ in decoded)

    left, right = (torch.randn(side, side, device=device, dtype=best) for _ in range(2))
    batch, channels, width = LAYER if device.type == "cpu" else (128, *LAYER[1:])
    layer = nn.Conv2d(channels, channels, 3, padding=1).to(device, best).to(memory_format=torch.channels_last)
    maps = torch.randn(batch, channels, width, width, device=device, dtype=best).to(memory_format=torch.channels_last)
    speed = speeds[best]  # limits how long a round of products or convolutions takes

    def for_a_while(work: Callable[[], object], gflop: float) -> float:
        times = max(1, round(2 * speed / 1e9 / gflop))
        for _ in range(times):
            work()
        return times * gflop / GFLOP

    @torch.inference_mode()
    def convolution() -> object:
        return layer(maps)

    contestants: dict[str, Callable[[], float]] = {
        "ours": ours("auto"),
        "ours, float32": ours("float32"),
        "one by one": one_by_one,
        "decoding": decoding,
        "products": partial(for_a_while, lambda: left @ right, 2 * side**3 / 1e9),
        "convolution": partial(for_a_while, convolution, 2 * batch * 9 * channels**2 * width**2 / 1e9),
    }
    if device.type == "cuda":
        encoder = load_encoder(FeaturesConfig(layer="conv5_3", weights=str(weights))).prepare(device, "auto")
        pixels = np.random.default_rng(0).integers(0, 256, (PHOTO_SIZE, PHOTO_SIZE, 3), dtype=np.uint8)
        photo_after_photo = partial(repeat, pixels, min(len(photos), 8192))
        contestants["network"] = lambda: sum(map(len, _batch_by_batch(photo_after_photo(), encoder, batch_size)))
        contestants["ours, a quarter of the photos"] = ours("auto", len(photos) // 4)
    pairs = [("ours", name) for name in contestants if name != "ours"] + [("ours, float32", "one by one")]
    record.race(contestants, pairs, rounds, tidy=partial(delete, scratch))
    if device.type == "cuda":
        quarter = len(photos) // 4
        seconds = len(photos) / record.rates["ours"] - quarter / record.rates["ours, a quarter of the photos"]
        record.rates["ours, each photo more"] = (len(photos) - quarter) / seconds
    for part in (photos[: max(1, len(photos) // 4)], photos):
        reached = peak(extract, part, weights, "auto", device, batch_size)
        record.growth.setdefault("MiB by photos", {})[str(len(part))] = reached
    record.peaks["ours"] = reached
    return record


if __name__ == "__main__":
    main()
