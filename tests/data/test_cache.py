"""The feature cache: each photo computed once, whatever is killed, changed or damaged between two runs."""

import hashlib
import io
import mmap
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from numpy.typing import NDArray
from PIL import Image

from capexp.data.cache import FeatureCache, cache_features
from capexp.data.features import Features
from capexp.data.photo_transform import PhotoTransform
from capexp.data.photos import digest_photos, read_photo
from capexp.data.vgg16 import Encoder, load_encoder
from capexp.errors import InputError, Outage
from capexp.settings import FeaturesConfig, PhotoSize

SIZE: PhotoSize = 96  # of photos, for speed
HEADER, RECORD = 4096, 32 + 4 + 2 * 512  # bytes: digest, checksum, features of pool "mean"


@pytest.fixture(scope="module")
def encoder(random_vgg16: Path) -> Encoder:
    config = FeaturesConfig(layer="conv5_3", pool="mean", size=SIZE, weights=str(random_vgg16))
    return load_encoder(config).prepare(torch.device("cpu"), "auto")


def picture(seed: int) -> bytes:
    """A small PNG, its colours by seed."""
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((48, 36)).save(file, "PNG")
    return file.getvalue()


def write_photos(folder: Path, count: int) -> list[Path]:
    folder.mkdir()
    paths = [folder / f"{number}.png" for number in range(count)]
    for number, path in enumerate(paths):
        path.write_bytes(picture(number))
    return paths


@pytest.fixture(scope="module")
def computed(tmp_path_factory: pytest.TempPathFactory, encoder: Encoder) -> Path:
    """A folder with four photos and the cache of their features; tests work on copies."""
    folder = tmp_path_factory.mktemp("computed")
    photos = write_photos(folder / "photos", 4)
    cache_features(photos, FeatureCache(folder / "cache", encoder.identity), lambda: encoder, batch_size=2)
    return folder


@pytest.fixture
def photos(computed: Path, tmp_path: Path) -> list[Path]:
    shutil.copytree(computed, tmp_path, dirs_exist_ok=True)
    return sorted((tmp_path / "photos").iterdir())


@pytest.fixture
def cache(photos: list[Path], tmp_path: Path, encoder: Encoder) -> FeatureCache:
    return FeatureCache(tmp_path / "cache", encoder.identity)


def all_of(features: Features) -> NDArray[np.float16]:
    return features.gather(np.arange(len(features)))


def missing(cache: FeatureCache, photos: list[Path]) -> list[int]:
    """The photos, by position, that the cache lacks."""
    return np.flatnonzero(cache.lookup(digest_photos(photos)) < 0).tolist()


def never() -> Encoder:
    pytest.fail("the encoder was asked for")


def digests_in(cache: FeatureCache) -> list[bytes]:
    """The digests of the file's records, in order; the file holds whole records only."""
    content = cache.path.read_bytes()
    assert (len(content) - HEADER) % RECORD == 0
    return [content[start : start + 32] for start in range(HEADER, len(content), RECORD)]


def test_features_equal_the_encoders_own(cache: FeatureCache, photos: list[Path], encoder: Encoder) -> None:
    features = cache.open(digest_photos(photos))
    assert (len(features), features.shape) == (4, (1, 512))
    own = encoder.encode([PhotoTransform(SIZE)(read_photo(photos[2]))])
    # Alone or in a batch, the network may add in another order.
    np.testing.assert_allclose(features.gather(np.array([2])), own, rtol=2e-2, atol=1e-1)
    distances = np.abs(all_of(features)[:, 0].astype(float) - own[0].astype(float)).mean(1)  # (4,)
    assert distances[2] < 0.05 * np.delete(distances, 2).min()


def test_features_come_in_the_order_asked_for(cache: FeatureCache, photos: list[Path]) -> None:
    plain = all_of(cache.open(digest_photos(photos)))
    order = np.array([3, 1, 1, 0])
    mixed = cache_features([photos[i] for i in order], cache, never, 1)
    assert np.array_equal(all_of(mixed), plain[order])
    assert np.array_equal(all_of(mixed.slice(1, 3)), plain[[1, 1]])


def test_second_call_computes_nothing_and_writes_nothing(cache: FeatureCache, photos: list[Path]) -> None:
    before = cache.path.read_bytes()
    cache_features(photos, cache, never, 2)
    assert cache.path.read_bytes() == before


def test_photo_moved_or_renamed_is_not_computed_again(cache: FeatureCache, photos: list[Path]) -> None:
    moved = photos[0].rename(photos[0].with_name("moved.png"))
    cache_features([moved], cache, never, 1)


def test_only_a_changed_photo_is_computed_again(cache: FeatureCache, photos: list[Path], encoder: Encoder) -> None:
    before = all_of(cache.open(digest_photos(photos)))
    photos[1].write_bytes(picture(100))
    assert missing(cache, photos) == [1]
    digests = digest_photos(photos)
    assert cache.extend(photos, digests, encoder, 2) == 1
    after = all_of(cache.open(digests))
    assert [np.array_equal(*pair) for pair in zip(before, after, strict=True)] == [True, False, True, True]


@pytest.mark.parametrize("lost", [1, RECORD - 1])
def test_file_cut_inside_its_last_record_goes_on_from_there(
    cache: FeatureCache, photos: list[Path], encoder: Encoder, lost: int
) -> None:
    whole = cache.path.read_bytes()
    last = digests_in(cache)[-1]
    cache.path.write_bytes(whole[:-lost])
    digests = digest_photos(photos)
    assert [digests[i] for i in missing(cache, photos)] == [last]
    assert cache.extend(photos, digests, encoder, 2) == 1
    assert sorted(digests_in(cache)) == sorted(digests)
    assert cache.path.read_bytes()[: HEADER + 3 * RECORD] == whole[: HEADER + 3 * RECORD]


@pytest.mark.parametrize("at", [0, 32, 36, RECORD - 1], ids=["digest", "checksum", "first feature", "last feature"])
def test_flipped_bit_is_noticed_wherever_it_is(cache: FeatureCache, photos: list[Path], at: int) -> None:
    content = bytearray(cache.path.read_bytes())
    hit = digests_in(cache)[1]
    content[HEADER + RECORD + at] ^= 0x10
    cache.path.write_bytes(content)
    assert [digest_photos(photos)[i] for i in missing(cache, photos)] == [hit]


def test_damaged_photo_alone_is_computed_again_and_mended(
    cache: FeatureCache, photos: list[Path], encoder: Encoder
) -> None:
    digests = digest_photos(photos)
    before = all_of(cache.open(digests))
    content = bytearray(cache.path.read_bytes())
    content[HEADER + RECORD + 100] ^= 1
    cache.path.write_bytes(content)
    assert cache.extend(photos, digests, encoder, 2) == 1
    np.testing.assert_allclose(all_of(cache.open(digests)), before, rtol=2e-2, atol=1e-1)
    cache_features(photos, cache, never, 2)


def refusal(act: Callable[[], object]) -> str:
    with pytest.raises(InputError) as caught:
        act()
    (line,) = str(caught.value).splitlines()
    return line


@pytest.mark.parametrize("damage", ["another encoder", "cut", "not a cache"])
def test_file_with_another_header_is_refused_and_left_alone(
    cache: FeatureCache, photos: list[Path], encoder: Encoder, damage: str
) -> None:
    content = cache.path.read_bytes()
    if damage == "another encoder":
        content = content.replace(encoder.identity.weights_digest.encode(), b"0" * 64)
    else:
        content = content[:100] if damage == "cut" else b"x" * len(content)
    cache.path.write_bytes(content)
    digests = digest_photos(photos)
    for act in (lambda: cache.lookup(digests), lambda: cache.extend(photos, digests, encoder, 2)):
        line = refusal(act)
        assert str(cache.path) in line and "delete it" in line
        assert ("another encoder" in line) == (damage == "another encoder")
    assert cache.path.read_bytes() == content


def test_empty_file_is_an_empty_cache(cache: FeatureCache, photos: list[Path]) -> None:
    cache.path.write_bytes(b"")
    assert missing(cache, photos) == [0, 1, 2, 3]


def test_other_pools_and_weights_have_files_of_their_own(tmp_path: Path, random_vgg16: Path, encoder: Encoder) -> None:
    config = FeaturesConfig(layer="conv5_3", pool="max2", weights=str(random_vgg16))
    assert FeatureCache(tmp_path, load_encoder(config).identity).path != FeatureCache(tmp_path, encoder.identity).path


def test_equal_files_under_two_names_are_stored_once(tmp_path: Path, encoder: Encoder) -> None:
    photos = write_photos(tmp_path / "photos", 1)
    twin = Path(shutil.copy(photos[0], tmp_path / "photos" / "twin.png"))
    cache = FeatureCache(tmp_path / "cache", encoder.identity)
    features = all_of(cache_features([*photos, twin], cache, lambda: encoder, 2))
    assert digests_in(cache) == digest_photos(photos)
    assert np.array_equal(features[0], features[1])


def test_digest_that_ends_in_a_zero_byte_is_found_again(tmp_path: Path, encoder: Encoder) -> None:
    contents = (picture(1) + str(number).encode() for number in range(10_000))  # Pillow ignores what follows a PNG
    content = next(content for content in contents if hashlib.sha256(content).digest()[-1] == 0)
    (tmp_path / "photo.png").write_bytes(content)
    cache = FeatureCache(tmp_path / "cache", encoder.identity)
    cache_features([tmp_path / "photo.png"], cache, lambda: encoder, 1)
    cache_features([tmp_path / "photo.png"], cache, never, 1)


def test_bad_photos_are_all_named_and_the_good_ones_kept(tmp_path: Path, encoder: Encoder) -> None:
    photos = write_photos(tmp_path / "photos", 4)
    photos[0].write_text("no picture")
    photos[2].write_bytes(picture(2)[:-200])
    cache = FeatureCache(tmp_path / "cache", encoder.identity)
    line = refusal(lambda: cache_features(photos, cache, lambda: encoder, 4))
    assert line.startswith("2 photos cannot be read as pictures: ") and all(str(photos[i]) in line for i in (0, 2))
    assert missing(cache, photos) == [0, 2]
    photos[2].unlink()
    cache_features([photos[1], photos[3]], cache, never, 2)


def test_recomputed_features_replace_the_old_and_those_of_other_photos_stay(
    cache: FeatureCache, photos: list[Path], encoder: Encoder
) -> None:
    before = all_of(cache.open(digest_photos(photos)))
    with cache.path.open("r+b") as file:  # another value with its right checksum: only computing it again corrects it
        file.seek(HEADER + 2 * RECORD)
        record = file.read(RECORD)
        file.seek(HEADER + 1 * RECORD + 32)
        file.write(record[32:])
    assert np.array_equal(all_of(cache.open(digest_photos(photos)))[1], before[2])
    renewed = cache_features(photos[:2], cache, lambda: encoder, 2, recompute=True)
    np.testing.assert_allclose(all_of(renewed), before[:2], rtol=2e-2, atol=1e-1)
    assert np.array_equal(all_of(cache.open(digest_photos(photos)))[2:], before[2:])
    assert sorted(digests_in(cache)) == sorted(digest_photos(photos)), "each photo once"


def test_what_cannot_be_recomputed_stays_as_it_was(cache: FeatureCache, photos: list[Path], encoder: Encoder) -> None:
    photos[1].write_bytes(b"no picture")
    before = cache.path.read_bytes()
    with pytest.raises(InputError, match="cannot be read as a picture"):
        cache_features(photos, cache, lambda: encoder, 2, recompute=True)
    assert cache.path.read_bytes() == before
    assert [path.suffix for path in cache.path.parent.iterdir() if path.suffix != ".lock"] == [".features"]


EXTEND = """
import os, resource, signal, sys
from pathlib import Path
import torch
from capexp.data.cache import FeatureCache
from capexp.data.vgg16 import FeaturesConfig, load_encoder
from capexp.data.photos import digest_photos

torch.set_num_threads(1)
if "LIMIT" in os.environ:  # as a disk with so much room
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(os.environ["LIMIT"]),) * 2)
weights, folder, *photos = sys.argv[1:]
encoder = load_encoder(FeaturesConfig(layer="conv5_3", pool="mean", size=96, weights=weights))
paths = [Path(photo) for photo in photos]
print("ready", flush=True)
sys.stdin.readline()
print(FeatureCache(Path(folder), encoder.identity).extend(paths, digest_photos(paths), encoder, 1))
"""


class Interrupted:
    """Waits as the module's own, but is interrupted at first."""

    def __init__(self, times: int) -> None:
        self.times = times

    def __call__(self, futures: Any) -> Any:
        self.times -= 1
        if self.times >= 0:
            raise KeyboardInterrupt
        return wait(futures)


@pytest.mark.parametrize("times", [0, 2])
def test_what_was_computed_before_an_interrupt_is_kept_whole(
    cache: FeatureCache, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    monkeypatch.setattr("capexp.data.cache.wait", Interrupted(times))
    slowly = cache._write

    def write(file: Any, content: bytes | memoryview) -> None:
        time.sleep(0.05)
        slowly(file, content)

    monkeypatch.setattr(cache, "_write", write)
    new = {bytes([number]) * 32: np.full((1, 512), number, np.float16) for number in range(1, 8)}

    def work() -> None:
        with cache._open_to_append() as file, cache._writer(file) as writer:
            for digest, features in new.items():
                writer.add({digest: features})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work()
    assert np.array_equal(all_of(cache.open(list(new)))[:, 0, 0], np.arange(1, 8))


def test_an_interrupt_is_told_even_if_the_disk_is_full_too(
    cache: FeatureCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(file: Any, content: bytes | memoryview) -> None:
        raise Outage("full")

    def work(interrupt: bool) -> None:
        with cache._open_to_append() as file, cache._writer(file) as writer:
            writer.add({bytes(32): np.zeros((1, 512), np.float16)})
            if interrupt:
                raise KeyboardInterrupt

    monkeypatch.setattr(cache, "_write", write)
    with pytest.raises(KeyboardInterrupt):
        work(interrupt=True)
    with pytest.raises(Outage, match="full"):
        work(interrupt=False)


def test_nothing_is_written_behind_a_record_that_was_cut_short(
    cache: FeatureCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, written = cache._write, 0

    def write(file: Any, content: bytes | memoryview) -> None:
        nonlocal written
        written += 1
        if written == 2:
            file.write(memoryview(content)[:-100])
            raise Outage("full for a moment")
        whole(file, content)

    monkeypatch.setattr(cache, "_write", write)
    new = {bytes([number]) * 32: np.full((1, 512), number, np.float16) for number in range(1, 8)}
    added: list[bytes] = []

    def work() -> None:
        with cache._open_to_append() as file, cache._writer(file) as writer:
            for digest, features in new.items():
                writer.add({digest: features})
                added.append(digest)

    with pytest.raises(Outage, match="for a moment"):
        work()
    assert written == 2
    assert len(added) < len(new), "the error is raised before all are computed"
    assert (cache.lookup(list(new)) >= 0).tolist() == [True] + [False] * 6
    assert cache.path.stat().st_size == HEADER + 6 * RECORD - 100


@pytest.mark.slow
@pytest.mark.parametrize(("room", "kept"), [(2000, None), (HEADER + 2 * RECORD + 100, 2)])
def test_a_disk_that_is_full_leaves_a_cache_that_goes_on(
    tmp_path: Path, random_vgg16: Path, encoder: Encoder, room: int, kept: int | None
) -> None:
    photos = write_photos(tmp_path / "photos", 4)
    cache = FeatureCache(tmp_path / "cache", encoder.identity)
    ended = subprocess.run(
        [sys.executable, "-c", EXTEND, str(random_vgg16), str(tmp_path / "cache"), *map(str, photos)],
        env={**os.environ, "LIMIT": str(room), "PYTHONPATH": str(Path(__file__).parents[2])},
        input="\n", capture_output=True, text=True,
    )  # fmt: skip
    line = ended.stderr.splitlines()[-1]
    assert f"Outage: {cache.path}: " in line and "free space" in line
    assert [path for path in cache.path.parent.iterdir() if path.suffix == ".part"] == []
    assert cache.path.exists() == (kept is not None)
    assert len(missing(cache, photos)) == 4 - (kept or 0)
    cache_features(photos, cache, lambda: encoder, 2)
    assert missing(cache, photos) == []


@pytest.mark.slow
def test_two_processes_at_once_store_each_photo_once(tmp_path: Path, random_vgg16: Path, encoder: Encoder) -> None:
    photos = write_photos(tmp_path / "photos", 6)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", EXTEND, str(random_vgg16), str(tmp_path / "cache"), *map(str, some)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        for some in (photos[:5], photos[:0:-1])
    ]
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for process in processes:  # both are ready: from here on they compete
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    computed = [int(process.communicate(timeout=300)[0]) for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert sum(computed) == 6
    cache = FeatureCache(tmp_path / "cache", encoder.identity)
    assert sorted(digests_in(cache)) == sorted(digest_photos(photos))
    cache_features(photos, cache, never, 1)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory by kind is told by Linux alone")
def test_what_was_read_is_let_go_of(tmp_path: Path) -> None:
    """However large the file, the process holds what it gathers, not the file."""

    def held() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssFile")) * 1024

    photos, shape = 1500, (49, 512)
    record = 2 * shape[0] * shape[1]
    path = tmp_path / "features"
    path.write_bytes(bytes(record) * photos)
    with path.open("rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    records = np.frombuffer(mapping, np.float16).reshape(photos, *shape)
    features = Features(records, np.arange(photos), mapping)
    order = np.random.default_rng(0).permutation(photos)
    before = held()
    for some in np.array_split(order, 50):
        assert features.gather(some).shape == (30, *shape)
    assert held() - before < photos * record / 5
    assert records.any(axis=(1, 2)).sum() == 0
    assert held() - before > photos * record / 2, "what reading without letting go comes to"


def test_shards_of_ranks_are_merged(photos: list[Path], encoder: Encoder, tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path / "shared", encoder.identity)
    expected = all_of(cache_features(photos, FeatureCache(tmp_path / "whole", encoder.identity), lambda: encoder, 2))
    digests = digest_photos(photos)
    for rank in range(2):
        assert cache.shard(rank).extend(photos[rank::2], digests[rank::2], encoder, 2) == 2
    with cache.shard(1).path.open("ab") as file:
        file.write(b"?" * (RECORD - 1))  # a record that its process was killed in
    with FileLock(cache.shard(0).path.with_suffix(".lock")):
        cache.clean_up()  # passes over the one that is at work
    assert (cache.lookup(digests) >= 0).tolist() == [False, True, False, True]
    found = cache_features(photos, cache, never, 2)  # merges the other one first
    np.testing.assert_array_equal(all_of(found), expected)
    assert not list(cache.path.parent.glob("*-rank*.features"))


@pytest.mark.parametrize("folder", ["/proc/nobody/features", "/dev/null/features"])
def test_a_folder_that_cannot_be_made_is_told_with_the_remedies(
    folder: str, photos: list[Path], encoder: Encoder
) -> None:
    cache = FeatureCache(Path(folder), encoder.identity)
    with pytest.raises(InputError) as caught:
        cache.extend(photos[:1], digest_photos(photos[:1]), encoder, 4)
    line = str(caught.value)
    assert line.startswith(f"features.cache = '{folder}': cannot be written (")
    for remedy in ("--features.cache FOLDER", "XDG_CACHE_HOME", "chmod -R g+w"):
        assert remedy in line


def test_whoever_may_write_in_the_folder_may_lock_the_cache(
    tmp_path: Path, photos: list[Path], encoder: Encoder
) -> None:
    cache = FeatureCache(tmp_path / "shared", encoder.identity)
    before = os.umask(0o002)  # as users set it who share folders with their group
    try:
        cache.extend(photos[:1], digest_photos(photos[:1]), encoder, 4)
    finally:
        os.umask(before)
    for file in cache.path.parent.iterdir():
        assert file.stat().st_mode & 0o060 == 0o060, file
