"""What strangers give (experiments, captions, bundles, caches, weights, pictures) is read or refused, and no more.

Each test tries as many inputs as ``CAPEXP_FUZZ`` says, new ones each time, and prints how many of them were read and
refused (``-s``); without it a few, the same each time.
"""

import hashlib
import io
import json
import os
import pickle
import resource
import shutil
import struct
import tempfile
import tomllib
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import scipy.io
import tomli_w
import torch
from feature_formats import FORMATS, NAMES as NAMES_OF_FEATURES, table
from hypothesis import HealthCheck, given, settings, strategies as st
from keras_files import saved_model, write as write_model
from PIL import Image
from safetensors.torch import load_file, save_file
from user_folder import ROOT

from capexp.captioning.captioner import Captioner
from capexp.captioning.keras_model import read_keras_model
from capexp.data.cache import FeatureCache
from capexp.data.caption_files import read_captions, read_list
from capexp.data.captions import read_splits
from capexp.data.feature_files import FeatureFile
from capexp.data.inert_pickle import read_arrays, read_tokenizer
from capexp.data.photos import read_photo
from capexp.data.tokenizer import split_characters, split_words
from capexp.data.vgg16 import load_encoder
from capexp.errors import InputError
from capexp.experiment import load_experiment, setting_names
from capexp.settings import CaptionsConfig, CaptionsFormat, FeaturesConfig

pytestmark = pytest.mark.slow

TRIES = int(os.environ.get("CAPEXP_FUZZ", "50"))
IS_THE_SAME = "CAPEXP_FUZZ" not in os.environ  # the same inputs each time, but for who looks for new ones
BUNDLE = ROOT / "tests/captioning/golden-1/bundle"
SCENES = ROOT / "experiments/scenes"
LEFT = 2 * 2**30  # bytes of address space that reading something may take beside what is taken already
TOLD: Counter[tuple[str, bool]] = Counter()

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=10,
)
NAMES = st.sampled_from(["a.jpg", "../a.jpg", "/etc/passwd", "b/../../c.jpg", "b\\c.jpg", "\0", "", "./a.jpg"])


def fuzz(function: Callable[..., None]) -> Callable[..., None]:
    quiet = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(
        max_examples=TRIES, derandomize=IS_THE_SAME, deadline=None, suppress_health_check=quiet, database=None
    )(function)


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Bytes that are nearly those of a good file: some changed, cut out, doubled, or put in."""
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(content)))
        stop = min(len(content), start + draw(st.integers(0, 40)))
        put = draw(
            st.binary(max_size=12) | st.sampled_from([b"", content[start:stop] * 2, b"\0" * 8, b"9" * 11, b"-1"])
        )
        content = content[:start] + put + content[stop:]
    return content


@contextmanager
def refusable(what: str) -> Iterator[None]:
    """It is done, or refused in one line: no other exception, and no memory for what the input only claims."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + LEFT, before[1]))
    refused = ""
    try:
        yield
    except InputError as error:
        refused = str(error)
        assert refused
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    TOLD[what, not refused] += 1


@pytest.fixture(autouse=True, scope="module")
def tell() -> Iterator[None]:
    yield
    for what in sorted({what for what, _ in TOLD}):
        print(f"\n{what}: {TOLD[what, True]} read, {TOLD[what, False]} refused", end="")


@fuzz
@given(damaged((ROOT / "experiments/scenes.toml").read_bytes()) | damaged(b"") | st.binary(max_size=200))
def test_experiments(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "experiment.toml"
    path.write_bytes(content)
    with refusable("TOML"):
        load_experiment(path, {})


TOML = st.recursive(
    st.booleans()
    | st.integers(-3, 2**63 - 1)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["fc2", "auto", "."]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@fuzz
@given(st.sampled_from(setting_names()) | st.text(max_size=8), TOML)
def test_settings(tmp_path: Path, name: str, value: object) -> None:
    table = tomllib.loads((ROOT / "experiments/scenes.toml").read_text())
    section, _, key = name.rpartition(".")
    place = table
    for part in section.split(".") if section else []:
        place = place.setdefault(part, {})
    place[key] = value
    path = tmp_path / "experiment.toml"
    path.write_text(tomli_w.dumps(table), encoding="utf-8", errors="replace")
    with refusable("settings in files"):
        load_experiment(path, {})
    with refusable("settings as flags"):
        load_experiment(ROOT / "experiments/scenes.toml", {name: str(value)})


@fuzz
@given(damaged(b"a.jpg#0\tA cat .\nb/c.jpg#0\tA dog .\nb/c.jpg#1\tTwo dogs .\n") | st.binary(max_size=200))
def test_captions_in_lines(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "captions.txt"
    path.write_bytes(content)
    with refusable("captions in lines"):
        read_captions(path)
    with refusable("lists"):
        for name in read_list(path):
            assert (tmp_path / name).resolve().is_relative_to(tmp_path.resolve())


TABLES = [
    b'image,caption\na.jpg,"A dog, a cat"\nb c.jpg,"It says ""hello"""\n',
    b"image_name| comment_number| comment\na.jpg| 0| A dog\na.jpg| 1   A cat\n",
    b"file_name\tcaption_0\tcaption_1\tsplit\na.jpg\tA dog\t\ttrain\n",
    b"1000_a child in pink\n1000_a girl goes in\n",
    b'{"file_name": "a.jpg", "text": ["A dog", "A cat"]}\n{"file_name": "b.jpg", "text": "A cow", "split": "val"}\n',
    b'[{"image": "a.jpg", "caption": "A dog"}]',
    b'{"a.jpg": ["A dog", "A cat"]}',
]


@fuzz
@given(st.sampled_from(TABLES).flatmap(damaged), st.sampled_from(["auto", "csv", "json", "descriptions", "flickr8k"]))
def test_captions_in_tables_and_records(tmp_path: Path, content: bytes, form: CaptionsFormat) -> None:
    path = tmp_path / "captions"
    path.write_bytes(content)
    with refusable("captions in tables and records"):
        for name, captions in read_captions(path, form).captions.items():
            assert (tmp_path / name).resolve().is_relative_to(tmp_path.resolve())
            assert captions and all(caption.strip() for caption in captions)


@fuzz
@given(st.text(max_size=200))
def test_tokens(text: str) -> None:
    for token in (*split_words(text), *split_characters(text)):
        assert token and not any(character.isspace() for character in token)


IMAGES = st.fixed_dictionaries(
    {},
    optional={
        "id": st.integers(0, 3) | JSON,
        "file_name": NAMES | JSON,
        "filename": NAMES | JSON,
        "filepath": NAMES | JSON,
        "split": st.sampled_from(["train", "val", "test", "restval"]) | JSON,
        "sentences": st.lists(st.fixed_dictionaries({"raw": st.text(max_size=5) | JSON}), max_size=3) | JSON,
    },
)
NOTES = st.fixed_dictionaries({"image_id": st.integers(0, 3) | JSON, "caption": st.text(max_size=5) | JSON})
COCO = {"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": [{"image_id": 1, "caption": "A cat"}]}
KARPATHY = {"images": [{"filename": "a.jpg", "split": "train", "sentences": [{"raw": "A cat"}]}]}


@fuzz
@given(
    st.fixed_dictionaries({"images": st.lists(IMAGES, max_size=3), "annotations": st.lists(NOTES, max_size=3)})
    .map(json.dumps)
    .map(str.encode)
    | st.sampled_from([COCO, KARPATHY]).flatmap(lambda good: damaged(json.dumps(good).encode()))
    | JSON.map(json.dumps).map(str.encode)
)
def test_captions_in_json(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "photos").mkdir(exist_ok=True)
    (tmp_path / "captions.json").write_bytes(content)
    with refusable("captions in JSON"):
        for name in read_captions(tmp_path / "captions.json").captions:
            assert (tmp_path / "photos" / name).resolve().is_relative_to(tmp_path.resolve())
    with refusable("splits in JSON"):
        read_splits(
            CaptionsConfig(root=tmp_path, photos=Path("photos"), captions=Path("captions.json"), splits="karpathy")
        )


def caption_with(captioner: Captioner) -> None:
    """Whoever is loaded can be used."""
    shape = captioner.encoder_identity.shape
    (caption,) = captioner.caption_features(np.ones((1, *shape), np.float16))
    assert isinstance(caption.text, str)


def seal(folder: Path) -> None:
    """Makes a bundle's digests fit, as whoever has changed it would."""
    files = [path for path in sorted(folder.iterdir()) if path.name != "manifest.json"]
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    record = json.loads((BUNDLE / "manifest.json").read_text()) | {"sha256": digests}
    (folder / "manifest.json").write_text(json.dumps(record))


@fuzz
@given(st.data(), st.sampled_from(sorted(path.name for path in BUNDLE.iterdir())))
def test_bundles(tmp_path: Path, data: st.DataObject, name: str) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(BUNDLE, folder, dirs_exist_ok=True)
    (folder / name).write_bytes(data.draw(damaged((BUNDLE / name).read_bytes())))
    if name != "manifest.json":
        seal(folder)
    with refusable("bundles"):
        caption_with(Captioner.load(folder))


@fuzz
@given(st.data())
def test_bundles_whose_sizes_are_made_up(tmp_path: Path, data: st.DataObject) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(BUNDLE, folder, dirs_exist_ok=True)
    record = json.loads((BUNDLE / "captioner.json").read_text())
    section = data.draw(st.sampled_from(sorted(key for key, value in record.items() if isinstance(value, dict))))
    key = data.draw(st.sampled_from(sorted(record[section])))
    record[section][key] = data.draw(st.integers(-2, 2**70) | JSON | st.sampled_from([2**31, 2**40]))
    (folder / "captioner.json").write_text(json.dumps(record))
    seal(folder)
    with refusable("bundles with made-up sizes"):
        caption_with(Captioner.load(folder))


def cache_file() -> Path:
    (path,) = (SCENES / "features").glob("*.features")
    return path


def cache_in(folder: Path) -> FeatureCache:
    header = cache_file().read_bytes()[:4096]
    record = json.loads(header.split(b"\n", 1)[1].rstrip(b"\0"))
    identity = Captioner.load(BUNDLE).encoder_identity
    del record["size"], record["transform"]
    fields = {**record, "mean": tuple(record["mean"]), "std": tuple(record["std"]), "weights": "IMAGENET1K_FEATURES"}
    return FeatureCache(folder, type(identity)(**fields))


@fuzz
@given(st.data())
def test_caches(tmp_path: Path, data: st.DataObject) -> None:
    good = cache_file().read_bytes()[: 4096 + 3 * (32 + 4 + 1024)]
    cache = cache_in(tmp_path)
    assert cache.path.name == cache_file().name
    cut = data.draw(st.integers(0, len(good)))
    content = data.draw(damaged(good) | st.just(good[:cut]) | damaged(good[:200]).map(lambda head: head + good[200:]))
    cache.path.write_bytes(content)
    wanted = [good[start : start + 32] for start in range(4096, len(good), 32 + 4 + 1024)]
    with refusable("caches"):
        found = cache.find(wanted)
        if found is not None:
            first = np.frombuffer(good, "<f2", 512, 4096 + 36)
            assert np.array_equal(found.gather(np.array([0]))[0, 0], first), "what is read is what was written"


def weights_of(path: Path) -> FeaturesConfig:
    return FeaturesConfig(layer="conv5_3", pool="mean", weights=str(path))


def small_state() -> bytes:
    content = io.BytesIO()
    torch.save({"features.0.weight": torch.ones(64, 3, 3, 3), "features.0.bias": torch.ones(64)}, content)
    return content.getvalue()


def legacy_state() -> bytes:
    content = io.BytesIO()
    state = {"features.0.weight": torch.ones(64, 3, 3, 3), "features.0.bias": torch.ones(64)}
    torch.save(state, content, _use_new_zipfile_serialization=False)
    return content.getvalue()


@fuzz
@given(st.sampled_from([small_state(), legacy_state()]).flatmap(damaged) | st.binary(max_size=100))
def test_weights(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    with refusable("weights"):
        load_encoder(weights_of(path))


def keras_file(layer: str, form: str, kernel: np.ndarray[Any, Any], **options: Any) -> bytes:
    """A small file in one of Keras's forms, with the first layer alone."""
    content = io.BytesIO()
    with h5py.File(content, "w") as file:
        file.attrs["layer_names"] = [layer.encode()]
        file.create_dataset(form.format(layer, "kernel"), data=kernel, **options)
        file.create_dataset(form.format(layer, "bias"), data=np.zeros(64, "f4"))
    return content.getvalue()


def keras_files() -> list[bytes]:
    kernel = np.ones((3, 3, 3, 64), "f4")
    return [
        keras_file("block1_conv1", "{0}/{0}_{1}", kernel),
        keras_file("block1_conv1", "model_weights/{0}/{0}/{1}", kernel.astype("f2"), chunks=(3, 3, 3, 32)),
        keras_file("conv2d", "layers/{0}/vars/{1}", kernel, compression="gzip"),
    ]


@fuzz
@given(st.sampled_from(keras_files()).flatmap(damaged))
def test_keras_weights(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "weights.h5"
    path.write_bytes(content)
    with refusable("Keras's weights"):
        load_encoder(weights_of(path))


@pytest.mark.parametrize("chunks", [None, (2**15, 2**15)])
def test_an_hdf5_array_takes_no_memory_before_its_shape_is_checked(
    tmp_path: Path, chunks: tuple[int, ...] | None
) -> None:
    path = tmp_path / "weights.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("block1_conv1/kernel", (2**20, 2**20), "f4", chunks=chunks)
    assert path.stat().st_size < 10_000
    with pytest.raises(InputError, match="block1_conv1's kernel is missing or has another shape"), refusable_raises():
        load_encoder(weights_of(path))


def test_an_hdf5_array_that_swells_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("fc1/kernel", (25088, 4096), "f4", chunks=(25088, 4096), compression="gzip")
        file.create_dataset("block1_conv1/kernel", data=np.zeros((3, 3, 3, 64), "f4"), compression="gzip")
    with pytest.raises(InputError, match="is compressed, virtual or in another file"), refusable_raises():
        load_encoder(weights_of(path))


def test_groups_that_hold_one_another_come_to_an_end(tmp_path: Path) -> None:
    path = tmp_path / "weights.h5"
    with h5py.File(path, "w") as file:
        group = file.create_group("block1_conv1")
        for i in range(1000):
            group[f"{i}"] = group
            file.create_group(f"other{i}")["block1_conv1"] = group
    with pytest.raises(InputError, match="block1_conv1's kernel is missing"), refusable_raises():
        load_encoder(weights_of(path))


def expanded(name: str) -> dict[str, torch.Tensor]:
    """One value that claims to be a tera of them."""
    return {name: torch.ones(1).expand(2**20, 2**20)}


class Executed:
    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("name", ["features.0.weight", "classifier.0.weight", "anything"])
def test_a_shape_takes_no_memory_before_it_is_checked(tmp_path: Path, name: str) -> None:
    path = tmp_path / "weights.pth"
    torch.save(expanded(name), path)
    assert path.stat().st_size < 10_000
    with pytest.raises(InputError, match="not VGG16's weights"), refusable_raises():
        load_encoder(weights_of(path))


@contextmanager
def refusable_raises() -> Iterator[None]:
    """As ``refusable``, for who wants to see the refusal."""
    fault: list[InputError] = []
    with refusable("claims of memory"):
        try:
            yield
        except InputError as error:
            fault.append(error)
            raise
    raise fault[0]


def test_an_archive_that_swells_is_refused(tmp_path: Path) -> None:
    plain, path = tmp_path / "plain.pth", tmp_path / "weights.pth"
    torch.save({"features.0.weight": torch.zeros(2**28)}, plain)  # 1 GiB
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for entry in source.infolist():
            with source.open(entry) as content, packed.open(entry.filename, "w", force_zip64=True) as copy:
                shutil.copyfileobj(content, copy, 2**20)
    plain.unlink()
    assert path.stat().st_size < 2 * 2**20
    with pytest.raises(InputError, match="would swell"), refusable_raises():
        load_encoder(weights_of(path))


def test_code_in_weights_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"features.0.weight": Executed()}, "weights.pth")
    Path("pickled.pth").write_bytes(pickle.dumps(Executed()))
    for name in ("weights.pth", "pickled.pth"):
        with pytest.raises(InputError, match="holds more than tensors"):
            load_encoder(weights_of(Path(name)))
    assert not Path("executed").exists()


def test_a_safetensors_header_that_claims_more_than_the_file_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(BUNDLE, folder)
    header = {"x": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}
    text = json.dumps(header).encode()
    for content in (struct.pack("<Q", len(text)) + text, struct.pack("<Q", 2**62) + text, b""):
        (folder / "decoder.safetensors").write_bytes(content)
        seal(folder)
        with pytest.raises(InputError, match=r"decoder\.safetensors: cannot be read"), refusable_raises():
            Captioner.load(folder)


@pytest.mark.parametrize("kind", [torch.float64, torch.float16, torch.int32, torch.bool])
def test_a_decoder_of_other_numbers_is_refused(tmp_path: Path, kind: torch.dtype) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(BUNDLE, folder)
    state = load_file(BUNDLE / "decoder.safetensors")
    save_file({name: value.to(kind) for name, value in state.items()}, folder / "decoder.safetensors")
    seal(folder)
    with pytest.raises(InputError, match="not float32"):
        Captioner.load(folder)


@pytest.mark.parametrize("state", [{}, {"convolutions.0.weight": torch.ones(2)}, {"convolutions.x": torch.ones(2)}])
def test_a_bundled_encoder_that_is_none_is_refused(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(BUNDLE, folder)
    save_file(state, folder / "encoder.safetensors")
    seal(folder)
    with pytest.raises(InputError, match=r"encoder\.safetensors: not VGG16's weights"):
        Captioner.load(folder).use_encoder()


PICKLES = [
    pickle.dumps({"a": np.ones((1, 8), np.float32), "b": np.asfortranarray(np.ones((3, 2), ">f8"))}, protocol)
    for protocol in range(6)
]
TOKENIZERS = [
    b"ccopy_reg\n_reconstructor\n(ckeras.preprocessing.text\nTokenizer\nc__builtin__\nobject\nNtR(dS'word_index'\n"
    b"ccollections\nOrderedDict\n((lp1\n(lS'dog'\naI1\naa(lS'cat'\naI2\naatRsb.",
    b"\x80\x02ckeras.preprocessing.text\nTokenizer\n)\x81}q\x01(U\nword_index}(X\x03\0\0\0dogK\x01uub.",
    b'{"class_name": "Tokenizer", "config": {"word_index": "{\\"dog\\": 1, \\"cat\\": 2}", "num_words": null}}',
]


@fuzz
@given(st.sampled_from(PICKLES + TOKENIZERS).flatmap(damaged) | st.binary(max_size=200))
def test_pickles(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "features.pkl"
    path.write_bytes(content)
    with refusable("pickles of arrays"):
        for array in read_arrays(path).values():
            assert array.dtype.kind in "fiu" and array.nbytes <= len(content)
    with refusable("tokenizers"):
        assert all(number >= 1 for number in read_tokenizer(path).word_index.values())


@cache
def feature_file(kind: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        FORMATS[kind](Path(folder) / "features", table(8) if "matlab" in kind else table(2, 8))
        return (Path(folder) / "features").read_bytes()


@fuzz
@given(st.sampled_from([*FORMATS]).map(feature_file).flatmap(damaged) | st.binary(max_size=200))
def test_files_of_features(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "features"
    path.write_bytes(content)
    (tmp_path / "features.txt").write_text("\n".join(NAMES_OF_FEATURES))
    with refusable("files of features"):
        read_features(path)


def read_features(path: Path) -> None:
    file = FeatureFile.open(FeaturesConfig(file=str(path)), CaptionsConfig(root=path.parent))
    for _, features in file.read(set(file.names)):
        assert features.shape == file.identity.shape and np.isfinite(features).all()


def test_features_that_swell_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "features"
    for write in (swelling_npz, swelling_hdf5, swelling_matlab):
        write(path)
        assert path.stat().st_size < 10**7
        with pytest.raises(InputError, match=r"features: .*"), refusable_raises():
            read_features(path)


def swelling_npz(path: Path) -> None:
    with path.open("wb") as file:
        np.savez_compressed(file, a=np.zeros((2, 2**28), np.int8))


def swelling_hdf5(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file.create_dataset("a.jpg", (2**12, 2**40), "<f4", chunks=(1, 2**20))


def swelling_matlab(path: Path) -> None:
    scipy.io.savemat(path, {"feats": np.zeros((2**10, 2**18))}, appendmat=False, do_compression=True)


SAVED = [saved_model(form, features=16) for form in ("Keras 2", "Keras 3", "keras")]
WITHIN = [(content.index(b'{"class_name"'), content) for content in SAVED]


@fuzz
@given(
    st.sampled_from(SAVED).flatmap(damaged)
    | st.sampled_from(WITHIN).flatmap(
        lambda its: damaged(its[1][its[0] : its[0] + 1500]).map(
            lambda part: its[1][: its[0]] + part[:1500].ljust(1500) + its[1][its[0] + 1500 :]
        )
    )
)
def test_models_of_keras(tmp_path: Path, content: bytes) -> None:
    path, words = write_model(tmp_path, content)
    with refusable("models of Keras"):
        vocabulary, weights = read_keras_model(path).convert(read_tokenizer(words))
        assert len(weights["vocabulary.bias"]) == len(vocabulary)


def pictures() -> list[bytes]:
    found = []
    for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "TGA", "ICO"):
        content = io.BytesIO()
        Image.linear_gradient("L").resize((40, 30)).convert("RGB").save(content, kind)
        found.append(content.getvalue())
    return found


@fuzz
@given(st.sampled_from(pictures()).flatmap(damaged) | st.binary(max_size=200))
def test_pictures(tmp_path: Path, content: bytes) -> None:
    with refusable("pictures"):
        assert read_photo(content).mode == "RGB"
    path = tmp_path / "photo.jpg"
    path.write_bytes(content)
    with refusable("picture files"):
        read_photo(path)


def test_a_picture_that_claims_too_many_pixels_takes_no_memory() -> None:
    content = pictures()[0]
    assert content[12:16] == b"IHDR"
    header = b"IHDR" + struct.pack(">II", 30_000, 30_000) + content[24:29]
    bomb = content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:]
    with pytest.raises(InputError, match="pixels"), refusable_raises():
        read_photo(bomb)
