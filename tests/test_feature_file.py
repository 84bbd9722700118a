"""From a file of features to captions of new photos, as a user of the tutorial's files goes."""

import pickle
import shutil
from pathlib import Path

import mlflow
import numpy as np
import pytest
from keras_files import saved_model, tokenizer_json
from PIL import Image, ImageOps
from user_folder import Folder

from capexp.data.dataset import Dataset
from capexp.experiment import find_experiment, load_experiment

pytestmark = pytest.mark.slow

MODEL = ("--model", "models:/capexp-scenes@champion")


@pytest.fixture
def folder(tmp_path: Path, scenes: Path) -> Folder:
    """A folder with captions, lists and features.pkl, but without photos."""
    data = Dataset.read(load_experiment(find_experiment("scenes"), {})).with_features()
    features = {
        name.removesuffix(".jpg"): data.features[split.name].gather(np.array([position]))[0].astype(np.float32)
        for split in data.splits.values()
        for position, name in enumerate(split.photos)
    }
    (tmp_path / "features.pkl").write_bytes(pickle.dumps(features))
    for path in scenes.glob("*.txt"):
        shutil.copy(path, tmp_path)
    shutil.copytree(scenes / "features", tmp_path / "cache")
    return Folder(tmp_path, has_store=True)


def train(folder: Folder, *arguments: str) -> str:
    return folder.run(
        "train", "--experiment", "scenes", "--captions.root", ".", "--features.file", "features.pkl",
        "--features.cache", "cache", "--training.epochs", "1", "--model.lstm_units", "32", *arguments,
    ).stdout  # fmt: skip


def test_a_captioner_of_a_file_captions_photos_once_its_encoder_is_checked(
    folder: Folder, scenes: Path, vgg16: Path
) -> None:
    printed = train(folder)
    assert "caption --model models:/capexp-scenes@champion --features.weights PATH PHOTO" in printed
    (run,) = folder.runs()
    gallery = folder.artifact(run, "captions.html").read_text()
    assert "photo not at hand" in gallery and "data:image" not in gallery
    # Without weights, nothing new is captioned.
    photo = str(scenes / "Scenes_Dataset/scene_0107.jpg")
    assert "to caption photos give --features.weights" in folder.run("caption", *MODEL, photo, status=2).stderr
    mlflow.set_tracking_uri(folder.store)
    served = mlflow.pyfunc.load_model("models:/capexp-scenes@champion")
    ((answer,),) = [served.predict({"photo": [Path(photo).read_bytes()]})]
    assert answer["caption"] is None and "--features.weights" in answer["error"]
    # With them, they are checked where the photos are.
    weights = ("--features.weights", str(vgg16))
    unchecked = folder.run("caption", *MODEL, *weights, photo)
    assert "not checked, because none of the photos" in unchecked.stderr
    photos = ("--captions.root", str(scenes), "--captions.photos", "Scenes_Dataset")
    checked = folder.run("caption", *MODEL, *weights, *photos, photo)
    assert checked.stdout == unchecked.stdout and checked.stderr == ""
    inverted = folder.path / "inverted"
    inverted.mkdir()
    for path in (scenes / "Scenes_Dataset").iterdir():
        ImageOps.invert(Image.open(path)).save(inverted / path.name)
    refused = folder.run("caption", *MODEL, *weights, "--captions.root", str(inverted), photo, status=2).stderr
    assert "whose cosine with those of features.file is 0." in refused


def test_an_encoder_that_was_checked_in_training_is_known(folder: Folder, scenes: Path, vgg16: Path) -> None:
    shutil.copytree(scenes / "Scenes_Dataset", folder.path / "Scenes_Dataset")
    train(folder, "--features.weights", str(vgg16))
    photo = "Scenes_Dataset/scene_0107.jpg"
    captioned = folder.run("caption", *MODEL, photo).stdout  # the registered model holds the weights
    assert captioned.startswith(f"{photo}\t")
    train(folder, "--features.file", "none", "--registry.model", "of-photos")
    # The features of photos are not the file's, however near they are.
    words = ("--experiment", "scenes", "--captions.root", ".", "--features.cache", "cache")
    refused = folder.run("evaluate", *MODEL, *words, "--features.weights", str(vgg16), status=2).stderr
    assert "takes features of file features.pkl" in refused and "give that file with --features.file" in refused
    compared = folder.run(
        "compare", "models:/of-photos@champion", "models:/capexp-scenes@champion", *words,
        "--features.file", "features.pkl",
    )  # fmt: skip
    assert "100 photos of dev" in compared.stdout, "each captioner has its own features"


def test_an_ensemble_of_members_from_before_its_encoder_was_checked(folder: Folder, scenes: Path, vgg16: Path) -> None:
    members = '[{"experiment": "scenes", "seeds": [1, 2], "settings": {"training.epochs": 1, "model.lstm_units": 32}}]'
    words = (
        *("--experiment", "scenes-ensemble", "--captions.root", ".", "--features.file", "features.pkl"),
        *("--features.cache", "cache", "--ensemble.members", members),
    )
    folder.run("train", *words)
    shutil.copytree(scenes / "Scenes_Dataset", folder.path / "Scenes_Dataset")
    found = folder.run("train", *words, "--features.weights", str(vgg16), "--registry.model", "checked")
    assert "found" in found.stderr, "the members are the same"
    photo = "Scenes_Dataset/scene_0107.jpg"
    assert folder.run("caption", "--model", "models:/checked@champion", photo).stdout.startswith(f"{photo}\t")


def test_the_tutorials_model_is_compared_on_its_own_features(folder: Folder) -> None:
    (folder.path / "model.h5").write_bytes(saved_model(features=512))
    (folder.path / "tokenizer.json").write_text(tokenizer_json())
    files = ("--keras", "model.h5", "--tokenizer", "tokenizer.json", "--features.file", "features.pkl")
    printed = folder.run("bundle", *files, "--output", "tutorial", "--registry.model", "tutorial").stdout
    assert "features of file features.pkl" in printed and "--features.file features.pkl" in printed
    assert "registered  tutorial version 1: models:/tutorial/1" in printed
    mlflow.set_tracking_uri(folder.store)
    (answer,) = mlflow.pyfunc.load_model("models:/tutorial/1").predict({"photo": [b"no picture"]})
    assert answer["caption"] is None and "cannot be read as a picture" in answer["error"]
    train(folder)
    words = ("--experiment", "scenes", "--captions.root", ".", "--features.file", "features.pkl")
    cache = ("--features.cache", "cache")
    compared = folder.run("compare", "tutorial", "models:/capexp-scenes@champion", *words, *cache).stdout
    assert "100 photos of dev" in compared and "cider" in compared
    message = folder.run("evaluate", "--model", "tutorial", *words[:4], *cache, status=2).stderr
    assert "give that file with --features.file" in message
    logged = folder.run("evaluate", "--model", "models:/tutorial/1", *words, *cache, "--log")
    assert logged.stdout.startswith("{") and "logged as run" in logged.stderr
    wider = ("--keras", "other.h5", "--tokenizer", "tokenizer.json", "--output", "wider")
    (folder.path / "other.h5").write_bytes(saved_model(features=513))
    message = folder.run("bundle", *wider, "--features.file", "features.pkl", status=2).stderr
    assert "reads 513 values for a photo, the features have 1 x 512" in message
    assert not (folder.path / "wider").exists()
