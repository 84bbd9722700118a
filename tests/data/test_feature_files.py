"""Files of features in all formats: read as they were written, matched with photos by name, refused in one line."""

import gzip
import io
import pickle
import warnings
import zipfile
from collections import deque
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import scipy.io
from feature_formats import FORMATS, NAMES, Table, table, write_hdf5, write_matlab5, write_npy, write_npz, write_pickle
from PIL import Image

from capexp.data.dataset import Dataset
from capexp.data.encoder_check import Reference, compare_features
from capexp.data.feature_files import FeatureFile
from capexp.data.features import Features
from capexp.errors import InputError
from capexp.experiment import find_experiment, load_experiment
from capexp.settings import CaptionsConfig, FeaturesConfig


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "features"  # the format is recognised by content


def opened(path: Path) -> FeatureFile:
    captions = CaptionsConfig(root=path.parent, captions=Path("captions.json"))
    return FeatureFile.open(FeaturesConfig(file=str(path)), captions)


def read_whole(path: Path) -> None:
    file = opened(path)
    deque(file.read(set(file.names)), 0)


def refusal(path: Path) -> str:
    """What is said when the file is opened, or when all of it is read."""
    with pytest.raises(InputError) as caught:
        read_whole(path)
    text = str(caught.value)
    assert "\n" not in text and str(path) in text
    return text


SHAPES = ((1, 8), (4, 8), (2, 2, 8), (8,))


@pytest.mark.parametrize(
    ("kind", "shape"), [(kind, shape) for kind in FORMATS for shape in SHAPES if "matlab" not in kind or shape == (8,)]
)
def test_every_format_is_read_as_it_was_written(path: Path, kind: str, shape: tuple[int, ...]) -> None:
    values = table(*shape)
    FORMATS[kind](path, values)
    file = opened(path)
    assert set(file.names) == set(NAMES)
    assert file.identity.shape == (max(1, np.prod(shape) // 8), 8)
    read = dict(file.read({"b.jpg", "d.jpg"}))
    assert set(read) == {"b.jpg", "d.jpg"}, "only what is wanted is read"
    for name, found in read.items():
        assert np.array_equal(found, values[name].reshape(found.shape))


def test_names_are_found_with_and_without_their_extensions(path: Path) -> None:
    write_npz(path, {"a": table()["a.jpg"], "sub/c": table()["sub/c.png"], "e.jpg": table()["b.jpg"]})
    assert opened(path).find(["a.jpg", "sub/c.png", "e"], "train") == ["a", "sub/c", "e.jpg"]


def test_missing_photos_are_counted_and_named(path: Path) -> None:
    write_npz(path, table())
    with pytest.raises(InputError, match=r"no features of 4 of the 5 photos of dev: 0, 1, 2 and 1 more"):
        opened(path).find(["0", "1", "2", "3", "a.jpg"], "dev")


def test_two_photos_of_one_stem_are_refused(path: Path) -> None:
    write_npz(path, {"a": table()["a.jpg"]})
    with pytest.raises(InputError, match=r"'a\.png' and 'a\.jpg' of train would both have the features of 'a'"):
        opened(path).find(["a.jpg", "a.png"], "train")
    write_npz(path, {"a.jpg": table()["a.jpg"], "a.png": table()["a.jpg"]})
    with pytest.raises(InputError, match=r"'a' may be a\.jpg or a\.png"):
        opened(path).find(["a"], "train")


def test_other_content_is_another_identity(path: Path) -> None:
    write_npy(path, table())
    first = opened(path).identity
    assert opened(path).identity == first
    path.with_suffix(".txt").write_text("\n".join(reversed(NAMES)))
    assert opened(path).identity.key() != first.key(), "the same rows under other names"
    write_npy(path, {name: 2 * values for name, values in table().items()})
    assert opened(path).identity.key() != first.key()


@pytest.mark.parametrize("kind", FORMATS)
def test_a_file_that_is_cut_short_is_refused(path: Path, kind: str) -> None:
    FORMATS[kind](path, table(8) if "matlab" in kind else table())
    content = path.read_bytes()
    for length in (1, len(content) // 3, len(content) - 9):
        path.write_bytes(content[:length])
        refusal(path)


@pytest.mark.parametrize("kind", [kind for kind in FORMATS if "matlab" not in kind])
@pytest.mark.parametrize(("value", "told"), [(np.nan, "not finite"), (-np.inf, "not finite"), (1e6, "65,504")])
def test_values_that_cannot_be_features_are_refused(path: Path, kind: str, value: float, told: str) -> None:
    values = table()
    values["b.jpg"][0, 3] = value
    FORMATS[kind](path, values)
    assert told in refusal(path) and "'b.jpg'" in refusal(path)


@pytest.mark.parametrize("kind", ["pickle", "npz", "hdf5", "safetensors"])
def test_photos_of_another_shape_are_refused(path: Path, kind: str) -> None:
    FORMATS[kind](path, table() | {"d.jpg": np.ones((1, 9), np.float32)})
    assert "'d.jpg': an array (1, 9), where the first is (1, 8)" in refusal(path)


def save(path: Path, **arrays: object) -> None:
    with path.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def cut_names(path: Path) -> None:
    write_npy(path, table())
    path.with_suffix(".txt").write_text("\n".join(NAMES[:3]))


def name_twice(path: Path) -> None:
    write_npy(path, table())
    path.with_suffix(".txt").write_text("\n".join([*NAMES[:3], "a.jpg"]))


def without_names(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, np.ones((3, 4)))
    path.with_name("captions.json").write_text('{"file_name": "a.jpg", "text": "a dog"}\n')


def external(path: Path) -> None:
    (path.parent / "raw").write_bytes(bytes(4 * 8))
    with h5py.File(path, "w") as file:
        file.create_dataset("a.jpg", (1, 8), "<f4", external=[(str(path.parent / "raw"), 0, 4 * 8)])


def archive(path: Path, *names: str) -> None:
    content = io.BytesIO()
    np.save(content, np.ones((1, 8), np.float32))
    with zipfile.ZipFile(path, "w") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the name that is there twice
        for name in names:
            file.writestr(name, content.getvalue())


def matlab(path: Path, **variables: object) -> None:
    scipy.io.savemat(path, variables, appendmat=False)


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "a text": (lambda path: path.write_text("a.jpg 1 2 3"), "no known format of features"),
    "empty": (lambda path: path.write_text(""), "no known format of features"),
    "a folder": (lambda path: path.mkdir(), "is no file"),
    "features first": (lambda path: write_npz(path, table(512, 7, 7)), "bring them last: (7, 7, 512)"),
    "features first, flat": (lambda path: write_npz(path, table(512, 49)), "bring them last: (49, 512)"),
    "one feature": (lambda path: write_npz(path, table(64, 1)), "bring them last: (1, 64)"),
    "Fortran order": (lambda path: save(path, a=np.asfortranarray(np.ones((3, 4)))), "numpy.ascontiguousarray"),
    "gzip": (lambda path: path.write_bytes(gzip.compress(b"x")), "unpack it first"),
    "another archive": (lambda path: archive(path, "data.pkl"), "not one of NumPy's"),
    "an array twice": (lambda path: archive(path, "a.npy", "a.npy"), "is there twice"),
    "five axes": (lambda path: write_npz(path, table(2, 2, 2, 2, 2)), "(F,), (P, F) or (height, width, F) is needed"),
    "single numbers": (lambda path: save(path, a=np.float32(1)), "an array ()"),
    "objects": (lambda path: save(path, a=np.array([None, {}])), "an array of objects"),
    "texts": (lambda path: save(path, a=np.array(["x", "y"])), "not numbers"),
    "no names": (without_names, "has no names of photos"),
    "too few names": (cut_names, "4 photos' features, but 3 names"),
    "a name twice": (name_twice, "a.jpg is there twice"),
    "MATLAB without feats": (lambda path: matlab(path, x=np.ones(3)), "no variable 'feats' but x"),
    "MATLAB with texts": (lambda path: matlab(path, feats="abc"), "no matrix of numbers"),
    "a pickle of something else": (lambda path: path.write_bytes(pickle.dumps([1])), "dict"),
    "a pickle with code": (lambda path: path.write_bytes(b"cos\nsystem\n(S'touch x'\ntR."), "os.system"),
    "an empty archive": (lambda path: zipfile.ZipFile(path, "w").close(), "holds no features"),
    "no arrays in HDF5": (lambda path: h5py.File(path, "w").close(), "holds no features"),
    "names that are not Unicode": (
        lambda path: write_pickle(path, {"a\udc80": np.ones((1, 8), np.float32)}),
        "cannot be names",
    ),
    "values in another file": (external, "in another file"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_are_no_features_is_refused(path: Path, name: str) -> None:
    make, told = REFUSED[name]
    make(path)
    assert told in refusal(path)


def test_links_out_of_an_hdf5_file_are_not_followed(path: Path) -> None:
    write_hdf5(path.with_name("other.h5"), table())
    with h5py.File(path, "w") as file:
        file["a.jpg"] = np.ones((1, 8))
        file["b.jpg"] = h5py.ExternalLink("other.h5", "b.jpg")
        file["loop"] = h5py.SoftLink("/")
    assert opened(path).names == ("a.jpg",)


def test_a_table_in_blocks_of_rows(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks may hold a few values of every row, and are decompressed once for each block, not for each row."""
    monkeypatch.setattr("capexp.data.feature_formats._BLOCK", 2 * 8 * 4)
    values = table(8)
    with h5py.File(path, "w") as file:
        file["names"] = NAMES
        file.create_dataset("features", data=np.stack([*values.values()]), compression="gzip", chunks=(4, 2))
    read = dict(opened(path).read({NAMES[0], NAMES[1], NAMES[3]}))
    assert list(read) == [NAMES[0], NAMES[1], NAMES[3]]
    assert all(np.array_equal(read[name][0], values[name]) for name in read)


def test_rows_of_an_archive_without_names(path: Path) -> None:
    values = table()
    save(path, features=np.stack([*values.values()]))
    path.with_name("names.txt").write_text("\n".join(NAMES))
    assert np.array_equal(dict(opened(path).read({"d.jpg"}))["d.jpg"], values["d.jpg"])


@pytest.mark.parametrize("kind", ["npz", "npy", "hdf5 table", "safetensors"])
def test_a_file_that_changes_while_it_is_read_is_refused(path: Path, kind: str) -> None:
    FORMATS[kind](path, table())
    file = opened(path)
    FORMATS[kind](path, {name: 2 * values for name, values in table().items()})
    with pytest.raises(InputError, match=r"has changed while it was read|bring the file again"):
        deque(file.read(set(NAMES)), 0)


def test_an_array_that_is_cut_after_it_was_opened_is_refused(path: Path) -> None:
    write_npy(path, table())
    file = opened(path)
    path.write_bytes(path.read_bytes()[:140])
    with pytest.raises(InputError, match=r"ends too early|fits into the file"):
        deque(file.read(set(NAMES)), 0)


def test_columns_are_in_the_order_of_the_images_whatever_lies_beside(path: Path) -> None:
    write_matlab5(path, table(8))
    path.with_suffix(".txt").write_text("\n".join(reversed(NAMES)))
    path.with_name("names.txt").write_text("\n".join(reversed(NAMES)))
    assert opened(path).names == tuple(NAMES)


@pytest.mark.parametrize("columns", [3, 5])
def test_columns_without_their_images_are_refused(path: Path, columns: int) -> None:
    write_matlab5(path, table(8))
    scipy.io.savemat(path, {"feats": np.ones((8, columns))}, appendmat=False)
    assert f"{columns} photos' features, but" in refusal(path)
    path.with_name("captions.json").write_text('{"file_name": "a.jpg", "text": "a dog"}\n')
    assert "set captions.captions to the JSON file" in refusal(path)


def scenes(tmp_path: Path, **settings: str) -> Dataset:
    overrides = {f"features.{name}": value for name, value in settings.items()}
    return Dataset.read(
        load_experiment(find_experiment("scenes"), {"features.cache": str(tmp_path / "cache"), **overrides})
    )


def test_a_data_set_from_a_file_has_the_features_of_the_photos(tmp_path: Path) -> None:
    from_photos = Dataset.read(load_experiment(find_experiment("scenes"), {})).with_features()
    values = {
        name.removesuffix(".jpg"): features[None]
        for split in from_photos.splits.values()
        for name, features in zip(
            split.photos, from_photos.features[split.name].gather(np.arange(len(split.photos))), strict=True
        )
    }
    path = tmp_path / "features.pkl"
    path.write_bytes(pickle.dumps(values | {"spare": next(iter(values.values()))}, 2))
    data = scenes(tmp_path, file=str(path))
    assert data.count_uncached() == 700
    loaded = data.with_features()
    for name, features in from_photos.features.items():
        photos = np.arange(len(features))
        assert np.array_equal(loaded.features[name].gather(photos), features.gather(photos))
    assert loaded.digest() == from_photos.digest() and loaded.encoder.key() != from_photos.encoder.key()
    assert data.count_uncached() == 0, "cached by now"
    assert loaded.reference is not None and 1 < len(loaded.reference.features) <= 16


def test_a_refused_photo_leaves_the_cache_as_it_was(tmp_path: Path) -> None:
    data = Dataset.read(load_experiment(find_experiment("scenes"), {}))
    names = [name for split in data.splits.values() for name in split.photos]
    values = {name: np.ones((1, 8), np.float32) for name in names}
    values[names[-1]] = np.full((1, 8), np.nan, np.float32)
    path = tmp_path / "features"
    write_npz(path, values)
    with pytest.raises(InputError, match="not finite"):
        scenes(tmp_path, file=str(path)).with_features()
    assert not list((tmp_path / "cache").glob("*.features")) and not list((tmp_path / "cache").glob("*.part"))


@pytest.mark.slow
def test_the_encoder_is_checked_on_photos_at_hand(tmp_path: Path, random_vgg16: Path, vgg16: Path) -> None:
    claimed = {"layer": "conv5_3", "pool": "mean"}
    photos = Dataset.read(load_experiment(find_experiment("scenes"), {})).with_features()
    path = tmp_path / "features"
    values: Table = {}
    for split in photos.splits.values():
        every: Features = photos.features[split.name]
        for position, name in enumerate(split.photos):
            values[name] = every.gather(np.array([position]))[0].astype(np.float32)
    write_npz(path, values)
    checked = scenes(tmp_path, file=str(path), weights=str(vgg16), **claimed).with_features()
    assert checked.reference is None
    assert checked.encoder.encoder == photos.encoder or str(checked.encoder).endswith(str(photos.encoder))  # type: ignore[union-attr]
    with pytest.raises(InputError, match=r"whose cosine with those of features\.file is 0\.\d{4}, below 0\.999"):
        scenes(tmp_path, file=str(path), weights=str(random_vgg16), **claimed).with_features()
    with pytest.raises(
        InputError, match=r"gives \(196, 512\) features a photo, the file of features\.file has \(1, 512\)"
    ):
        scenes(tmp_path, file=str(path), weights=str(vgg16), layer="conv5_3", pool="none").with_features()


def test_scaled_features_are_of_another_encoder(tmp_path: Path) -> None:
    first = np.abs(np.random.default_rng(3).normal(size=(4, 8))).astype(np.float16)
    assert np.allclose(compare_features(first, first), 1)
    cosine, ratio = compare_features(first, (first / 20).astype(np.float16))
    assert cosine == pytest.approx(1, abs=1e-3) and ratio == pytest.approx(20, rel=1e-2)
    assert compare_features(first * 0, first)[0] == 0


def test_the_data_are_the_same_whether_photos_are_at_hand_or_not(tmp_path: Path) -> None:
    """So that a run is resumed and its captioner compared on both machines."""
    names = ("a", "b", "c", "d")
    (tmp_path / "captions.csv").write_text("image,caption\n" + "".join(f"{name},a dog runs\n" for name in names))
    (tmp_path / "train.txt").write_text("a\nb\nc\n")
    (tmp_path / "dev.txt").write_text("d\n")
    write_npz(tmp_path / "features", {f"{name}.jpg": np.ones((1, 8), np.float32) for name in names})
    overrides = {
        "captions.root": str(tmp_path), "captions.photos": "photos", "captions.captions": "captions.csv",
        "captions.train": "train.txt", "captions.dev": "dev.txt",
        "features.file": str(tmp_path / "features"), "features.cache": str(tmp_path / "cache"),
    }  # fmt: skip
    experiment = load_experiment(find_experiment("scenes"), overrides)
    without = Dataset.read(experiment)
    (tmp_path / "photos").mkdir()
    for name in names:
        Image.new("RGB", (9, 9)).save(tmp_path / "photos" / f"{name}.jpg")
    with_photos = Dataset.read(experiment)
    assert with_photos.digest() == without.digest()
    assert all(path.is_file() for path in with_photos.splits["train"].paths())


def test_a_reference_prefers_photos_that_are_at_hand(tmp_path: Path) -> None:
    data = Dataset.read(load_experiment(find_experiment("scenes"), {})).with_features()
    split, features = data.splits["train"], data.features["train"]
    at_hand = split.photos[5:300:100]
    for name in at_hand:
        (tmp_path / name).write_bytes(b"")
    moved = type(split)(split.name, tmp_path, split.photos, split.references)
    assert tuple(Reference.of(moved, features).features) == at_hand
    assert (
        len(Reference.of(type(split)("train", tmp_path / "no", split.photos, split.references), features).features) > 9
    )
