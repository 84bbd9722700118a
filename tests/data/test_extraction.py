"""From photo files to features: the same however they are decoded, a few ahead of need, and nothing left behind."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from capexp.data.extraction import Result, compute_features
from capexp.data.photo_transform import PhotoTransform
from capexp.data.photos import read_photo
from capexp.data.pixels import (
    PHOTOS_PER_TASK,
    TASKS_PER_WORKER,
    Pixels,
    decode_by_processes,
    decode_by_threads,
    decoding_processes,
)
from capexp.data.vgg16 import Encoder, load_encoder
from capexp.errors import InputError, Outage
from capexp.settings import FeaturesConfig, PhotoResize

SIZE = 224
AHEAD = TASKS_PER_WORKER * PHOTOS_PER_TASK  # photos that a process is ahead, or all threads together
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def encoder(random_vgg16: Path) -> Encoder:
    return load_encoder(FeaturesConfig(layer="conv5_3", pool="max2", weights=str(random_vgg16))).prepare(CPU, "auto")


@pytest.fixture
def three_threads() -> Iterator[None]:
    """As many of torch's, however many the tests have."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def write_photos(folder: Path, count: int, width: int = 40, height: int = 30) -> list[Path]:
    folder.mkdir()
    generator = np.random.default_rng(count)
    paths = [folder / f"{number}.jpg" for number in range(count)]
    for path in paths:
        coarse = Image.fromarray(generator.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        coarse.resize((width, height), Image.Resampling.BICUBIC).save(path)
    return paths


def pixels_of(decoded: Iterator[Pixels]) -> NDArray[np.uint8]:
    """Of the photos that can be read: (B, size, size, 3)."""
    return np.stack([pixels for pixels in decoded if not isinstance(pixels, InputError)])


def flat(batches: Iterator[list[Result]]) -> list[Result]:
    return [result for batch in batches for result in batch]


@pytest.mark.slow
@pytest.mark.usefixtures("three_threads")
def test_features_are_the_encoders_own_whoever_decodes(tmp_path: Path, encoder: Encoder) -> None:
    photos = write_photos(tmp_path / "photos", 5)
    photos[1].write_text("no picture")
    own = iter(encoder.encode(list(pixels_of(decode_by_threads(photos, PhotoTransform(SIZE))))).astype(np.float32))
    results = [flat(compute_features(photos, encoder, 3, processes)) for processes in (0, 2)]
    for i, (alone, shared) in enumerate(zip(*results, strict=True)):
        if i == 1:
            assert isinstance(alone, InputError) and isinstance(shared, InputError)
            assert str(photos[1]) in str(alone) and str(alone) == str(shared)
        else:
            assert not isinstance(alone, InputError) and not isinstance(shared, InputError)
            expected = next(own)
            assert float(expected.std()) > 0.1
            # With another number of threads, the network may add in another order.
            np.testing.assert_allclose(alone, expected, rtol=2e-2, atol=1e-1)
            np.testing.assert_allclose(shared, expected, rtol=2e-2, atol=1e-1)


@pytest.mark.parametrize(("resize", "view"), [("bilinear", "crop1"), ("nearest", "")])
def test_processes_decode_as_threads_do(tmp_path: Path, resize: PhotoResize, view: str) -> None:
    transform = PhotoTransform(SIZE, resize, view)
    photos = write_photos(tmp_path / "photos", 3 * PHOTOS_PER_TASK + 5)
    by_threads = pixels_of(decode_by_threads(photos, transform))
    assert len(by_threads) == len(photos) and not np.array_equal(by_threads[0], by_threads[1])
    assert np.array_equal(by_threads[0], transform(read_photo(photos[0])))
    assert np.array_equal(by_threads, pixels_of(decode_by_processes(photos, transform, 2)))


@pytest.mark.slow
@pytest.mark.usefixtures("three_threads")
def test_features_are_those_of_photos_resized_as_the_encoder_says(tmp_path: Path, random_vgg16: Path) -> None:
    photos = write_photos(tmp_path / "photos", 3, 300, 200)
    config = FeaturesConfig(layer="conv5_3", pool="mean", size=SIZE, resize="nearest", weights=str(random_vgg16))
    encoder = load_encoder(config).prepare(torch.device("cpu"), "float32")
    expected = encoder.encode([PhotoTransform(SIZE, "nearest")(read_photo(photo)) for photo in photos])
    other = encoder.encode([PhotoTransform(SIZE, "bilinear")(read_photo(photo)) for photo in photos])
    for processes in (0, 2):
        for i, result in enumerate(flat(compute_features(photos, encoder, 3, processes))):
            assert not isinstance(result, InputError)
            np.testing.assert_allclose(result.astype("f4"), expected[i].astype("f4"), rtol=1e-2, atol=1e-2)
            assert np.abs(result.astype("f4") - other[i]).max() > 0.1


class Taken:
    """Photos that tell how many of them have been taken."""

    def __init__(self, photos: list[Path]) -> None:
        self.photos = iter(photos)
        self.count = 0

    def __iter__(self) -> "Taken":
        return self

    def __next__(self) -> Path:
        photo = next(self.photos)
        self.count += 1
        return photo


@pytest.mark.parametrize(("processes", "most"), [(0, AHEAD), (2, 2 * AHEAD)])
def test_decoding_is_ahead_and_never_far_ahead(tmp_path: Path, processes: int, most: int) -> None:
    """So many photos are in memory at most, whatever their number, and when it ends early, nothing is left."""
    photos = Taken(write_photos(tmp_path / "photos", 1) * 10_000)
    decoded = (
        decode_by_processes(photos, PhotoTransform(SIZE), processes)
        if processes
        else decode_by_threads(photos, PhotoTransform(SIZE))
    )
    ahead = []
    for taken in range(5 * most):
        next(decoded)
        ahead.append(photos.count - taken)
    assert most - PHOTOS_PER_TASK <= min(ahead) and max(ahead) <= most
    children = [child for child in psutil.Process().children() if "spawn_main" in " ".join(child.cmdline())]
    assert len(children) == processes
    decoded.close()  # type: ignore[attr-defined]
    assert photos.count < 10_000
    assert not any(child.is_running() for child in children)


@pytest.mark.slow
@pytest.mark.usefixtures("three_threads")
def test_each_core_takes_a_few_photos_at_a_time(tmp_path: Path, encoder: Encoder) -> None:
    most = TASKS_PER_WORKER * encoder.photos_per_core * 3
    photos = Taken(write_photos(tmp_path / "photos", 1) * (most + 10))
    done = 0
    for batch in compute_features(photos, encoder, 32):
        assert len(batch) <= photos.count - done <= most
        done += len(batch)
    assert done == most + 10


class Watched(Encoder):
    """Tells how many threads of torch's worked for each thread that asked."""

    seen: dict[int, int]

    def encode(self, photos: list[NDArray[np.uint8]]) -> NDArray[np.float16]:
        self.seen[threading.get_ident()] = torch.get_num_threads()
        return super().encode(photos)


@pytest.mark.usefixtures("three_threads")
def test_each_thread_has_a_core_and_torch_keeps_its_own_number(tmp_path: Path, encoder: Encoder) -> None:
    """The number is torch's own for all threads that begin, so it must be as it was."""
    watched = Watched(encoder.identity, encoder.weights())
    watched.seen, later = {}, []
    watched.prepare(CPU, "auto")
    flat(compute_features(write_photos(tmp_path / "photos", 6), watched, 1))
    thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert list(watched.seen.values()) == [1, 1, 1]
    assert [torch.get_num_threads(), *later] == [3, 3]


def test_few_photos_are_worth_no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    assert decoding_processes(100, SIZE) == 0
    assert 0 < decoding_processes(8000, SIZE) <= 15
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    assert decoding_processes(8000, SIZE) == 0


def test_killed_process_is_an_outage(tmp_path: Path) -> None:
    decoded = decode_by_processes(write_photos(tmp_path / "photos", 1) * 10_000, PhotoTransform(SIZE), 2)
    next(decoded)
    child = next(child for child in psutil.Process().children() if "spawn_main" in " ".join(child.cmdline()))
    child.kill()
    with pytest.raises(Outage, match="a process that decodes photos was killed"):
        list(decoded)


DECODE = """
import sys
from pathlib import Path
from capexp.data.photo_transform import PhotoTransform
from capexp.data.pixels import decode_by_processes

if __name__ == "__main__":
    for pixels in decode_by_processes([Path(sys.argv[1])] * 1_000_000, PhotoTransform(224), 2):
        print("decoded", flush=True)
"""


def test_a_process_that_decodes_imports_nothing_heavy() -> None:
    code = "import sys; from capexp.data import pixels; print(*{'torch', 'pydantic', 'filelock'} & set(sys.modules))"
    root = Path(__file__).parents[2]
    ended = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert ended.stdout == "\n"


def test_no_process_outlives_a_killed_parent(tmp_path: Path) -> None:
    (tmp_path / "decode.py").write_text(DECODE)
    (photo,) = write_photos(tmp_path / "photos", 1)
    parent = subprocess.Popen(
        [sys.executable, tmp_path / "decode.py", photo],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        stdout=subprocess.PIPE,
    )
    assert parent.stdout is not None and parent.stdout.readline() == b"decoded\n"
    children = psutil.Process(parent.pid).children(recursive=True)
    assert len(children) == 3, "two that decode, and Python's own that clears shared memory away"
    parent.kill()
    parent.wait()
    parent.stdout.close()
    _, left = psutil.wait_procs(children, timeout=300)
    for child in left:
        child.kill()
    assert not left


PEAK = """
import resource, sys
from pathlib import Path
import torch
from capexp.data.cache import FeatureCache
from capexp.data.vgg16 import FeaturesConfig, load_encoder
from capexp.data.photos import digest_photos

weights, folder, *photos = sys.argv[1:]
encoder = load_encoder(FeaturesConfig(layer="conv5_3", weights=weights)).prepare(torch.device("cpu"), "auto")
paths = [Path(photo) for photo in photos]
for some in (paths[:8], paths[8:]):
    FeatureCache(Path(folder), encoder.identity).extend(some, digest_photos(some), encoder, 32)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_photos(tmp_path: Path, random_vgg16: Path) -> None:
    """Sixteen photos of 18 MB each after the first eight: 288 MB, were they kept."""
    photos = write_photos(tmp_path / "photos", 24, 3000, 2000)
    ended = subprocess.run(
        [sys.executable, "-c", PEAK, random_vgg16, tmp_path / "cache", *photos],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    first, second = map(int, ended.stdout.split())
    assert second - first < 60 * 2**20


@pytest.mark.gpu
@pytest.mark.parametrize("processes", [0, 2])
def test_gpu_gives_what_the_cpu_gives(tmp_path: Path, random_vgg16: Path, processes: int) -> None:
    config = FeaturesConfig(layer="conv5_3", weights=str(random_vgg16))
    photos = write_photos(tmp_path / "photos", 7)
    found = []
    for device in (CPU, torch.device("cuda")):
        encoder = load_encoder(config).prepare(device, "bfloat16")
        results = flat(compute_features(photos, encoder, 3, processes))
        found.append(np.stack([result for result in results if not isinstance(result, InputError)]).astype(np.float32))
    assert found[0].shape == (7, 196, 512)
    assert float(np.linalg.norm(found[0] - found[1]) / np.linalg.norm(found[0])) < 0.03
