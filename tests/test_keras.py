"""The captioner is the tutorial's: the same numbers as Keras gives, from the same weights, captions and photos.

``pytest -m slow -s tests/test_keras.py`` prints how far they are apart.
"""

import json
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from small import identity
from user_folder import Folder

from capexp.captioning.captioner import Captioner
from capexp.captioning.evaluation import cross_entropy
from capexp.captioning.keras_model import KerasModel, read_keras_model
from capexp.captioning.model import build_decoder
from capexp.data.batches import CaptionBatches
from capexp.data.caption_files import read_captions
from capexp.data.captions import Split
from capexp.data.features import Features
from capexp.data.inert_pickle import read_arrays, read_tokenizer
from capexp.data.photo_transform import PhotoTransform
from capexp.data.photos import read_photo
from capexp.data.vgg16 import load_encoder
from capexp.data.vocabulary import BOS, EOS, Vocabulary, tokenize
from capexp.errors import InputError
from capexp.settings import DecodingConfig, FeaturesConfig, TrainingConfig
from capexp.training.loop import Training
from capexp.training.teacher_forcing import CrossEntropy

pytestmark = pytest.mark.slow

Keras = Callable[[str, Path], None]
CPU = torch.device("cpu")
PHOTOS = 200


@pytest.fixture(scope="module")
def references(request: pytest.FixtureRequest, scenes: Path) -> dict[str, tuple[str, ...]]:
    """Captions by photo: Flickr8k's, or those of the embedded scenes where it is not here."""
    try:
        path = request.getfixturevalue("flickr8k") / "Flickr8k.token.txt"
    except pytest.skip.Exception:
        path = scenes / "Scenes.token.txt"
    return read_captions(path).captions


def tutorial_folder(folder: Path, references: dict[str, tuple[str, ...]], photos: int) -> Split:
    """Writes the tutorial's descriptions.txt of some photos, and features.pkl with made-up features."""
    some: dict[str, tuple[str, ...]] = {}
    for name, captions in references.items():
        cleaned = [" ".join(tokenize(caption, "tutorial", "whitespace")) for caption in captions]
        if all(cleaned) and len(some) < photos:
            some[Path(name).stem] = tuple(cleaned)
    assert len(some) == photos
    rng = np.random.default_rng(11)
    # Most are 0, as fc2's are. They are small: rounding errors then grow little from one training step to the next.
    values = (np.maximum(rng.normal(-1.5, 1, (photos, 1, 4096)), 0) / 4).astype(np.float16)
    lines = [f"{name} {caption}\n" for name, captions in some.items() for caption in captions]
    (folder / "descriptions.txt").write_text("".join(lines))
    with (folder / "features.pkl").open("wb") as file:
        pickle.dump({name: row.astype(np.float32) for name, row in zip(some, values, strict=True)}, file)
    return Split("train", folder, tuple(some), tuple(some.values()))


def features_of(folder: Path, split: Split) -> Features:
    arrays = read_arrays(folder / "features.pkl")
    records = np.stack([arrays[name] for name in split.photos]).astype(np.float16)
    return Features(records, np.arange(len(records)))


def captioner_of(folder: Path, file: str = "model.h5") -> tuple[KerasModel, list[int], Captioner]:
    """The model that Keras has saved, the classes of its words, and what is made of them here."""
    model = read_keras_model(folder / file)
    vocabulary, classes = model.vocabulary(read_tokenizer(folder / "tokenizer.pkl"))
    decoder = build_decoder(model.config, (1, model.features), len(vocabulary))
    decoder.load_state_dict(model.decoder_state(classes))
    decoding = DecodingConfig(maximum_length=model.maximum_length)
    return model, classes, Captioner((model.config,), decoder.eval(), vocabulary, identity("mean"), decoding)


def words_of(vocabulary: Vocabulary, caption: str) -> tuple[torch.Tensor, torch.Tensor]:
    entries = vocabulary.encode(caption)
    return torch.tensor([BOS, *entries]), torch.tensor([*entries, EOS])


@torch.inference_mode()
def test_the_network_is_the_tutorials(tmp_path: Path, keras: Keras, references: dict[str, tuple[str, ...]]) -> None:
    split = tutorial_folder(tmp_path, references, 60)
    keras("network", tmp_path)
    theirs = np.load(tmp_path / "network.npz")
    _, classes, captioner = captioner_of(tmp_path)
    decoder, vocabulary = captioner.decoder, captioner.vocabulary
    assert len(vocabulary) == theirs["probabilities"].shape[1]
    features = features_of(tmp_path, split)
    row, farthest, farthest_loss = 0, 0.0, 0.0
    for photo, captions in enumerate(split.references):
        vector = torch.from_numpy(features.gather(np.array([photo]))).float()
        for caption in captions:
            words, targets = words_of(vocabulary, caption)
            rows = slice(row, row + len(words))
            assert [classes[word] for word in targets] == theirs["targets"][rows].tolist()
            assert theirs["prefixes"][rows.stop - 1].tolist()[-len(words) :] == [classes[word] for word in words]
            ours = decoder.logits(vector, None, words, [1] * len(words)).softmax(1).numpy()
            wanted = theirs["probabilities"][rows][:, classes]  # of the same words
            farthest = max(farthest, float(np.abs(ours - wanted).max()))
            # The whole caption's cross-entropy, in nats.
            loss = float(decoder.cross_entropy(vector, None, words, targets, [1] * len(words))) * len(words)
            chosen = np.log(wanted[np.arange(len(words)), targets.numpy()].astype(np.float64))
            farthest_loss = max(farthest_loss, abs(loss + chosen.sum()) / -chosen.sum())
            row += len(words)
    assert row == len(theirs["targets"]) >= 500
    top = theirs["probabilities"].max(1)
    print(f"\n{row:,} prefixes of {len(vocabulary):,} words, the likeliest has {np.median(top):.2f} (median): ", end="")
    print(f"probabilities differ by {farthest:.1e}, captions' cross-entropies by {farthest_loss:.1e} of them", end="")
    assert np.median(top) > 0.02, "the probabilities are not all alike"
    assert farthest < 1e-5
    assert farthest_loss < 1e-5
    # The whole split at once, in packed batches of captions of different lengths.
    total = cross_entropy(decoder, CaptionBatches(split, vocabulary, features, 64).in_order()).total
    nats = -np.log(theirs["probabilities"][np.arange(row), theirs["targets"]].astype(np.float64)).sum()
    print(f", their sum by {abs(total - nats) / nats:.1e}", end="")
    assert total == pytest.approx(nats, rel=1e-5)
    # Keras's own form of files holds the same.
    archived, _, _ = captioner_of(tmp_path, "model.keras")
    assert all(
        np.array_equal(value, archived.weights[name]) for name, value in captioner_of(tmp_path)[0].weights.items()
    )
    assert read_tokenizer(tmp_path / "tokenizer.json") == read_tokenizer(tmp_path / "tokenizer.pkl")


def test_the_training_is_the_tutorials(tmp_path: Path, keras: Keras, references: dict[str, tuple[str, ...]]) -> None:
    """The same losses as Keras's, step by step, once two habits of its Adam are set aside; the mean is near anyway.

    Keras adds epsilon before it corrects the bias of the second moment, torch after: that makes Keras's epsilon larger
    in the first steps, where a step is as long for a tiny gradient as for a large one. And where a batch has a word
    several times, Keras squares the gradient of each occurrence by itself, torch their sum.
    """
    split = tutorial_folder(tmp_path, references, 60)
    features = features_of(tmp_path, split)
    config = TrainingConfig(
        epochs=1, batch_size=5, order="photos", clip_norm=1e9, precision="float32", device="cpu", learning_rate=1e-3
    )

    def batches(vocabulary: Vocabulary) -> CaptionBatches:
        return CaptionBatches(split, vocabulary, features, config.batch_size, config.order)

    # The order of the first epoch, which a batch's features tell.
    table = {features.gather(np.array([photo])).tobytes(): name for photo, name in enumerate(split.photos)}
    any_words = Vocabulary(("dog",), "tutorial", "drop")
    order = [table[batch.features.numpy().tobytes()] for batch in batches(any_words).epoch(1, 1)]
    assert sorted(order) == sorted(split.photos)
    (tmp_path / "order.txt").write_text("\n".join(order))
    keras("fit", tmp_path)
    theirs = np.load(tmp_path / "fit.npz")
    targets = theirs["targets"]

    def epoch(with_keras_epsilon: bool) -> NDArray[np.float64]:
        """The losses of the same steps here, from the weights that Keras began with, by the project's own steps."""
        _, _, captioner = captioner_of(tmp_path)
        assert captioner.models[0].dropout == 0
        data = batches(captioner.vocabulary)
        objective = CrossEntropy(Training(captioner, data, data, config, seed=1, device=CPU))
        objective.training.decoder.train()
        (group,) = objective.steps.optimizer.param_groups
        losses, epsilon = [], group["eps"]
        assert epsilon == 1e-7
        if with_keras_epsilon:
            group["eps"] = epsilon / (1 - 0.999) ** 0.5
        for number, step in enumerate(objective.steps.of_epoch(1), start=1):
            losses.append(float(step.loss))
            assert step.targets == targets[number - 1]
            if with_keras_epsilon:
                group["eps"] = epsilon / (1 - 0.999 ** (number + 1)) ** 0.5
        return np.array(losses)

    same, own = epoch(with_keras_epsilon=True), epoch(with_keras_epsilon=False)
    for what, ours, other, most_of_20, most_of_mean in (
        ("epsilon and sums alike", same, theirs["summed"], 1e-4, 1e-2),
        ("epsilon alike", same, theirs["losses"], 0.5, 0.1),
        ("as they are", own, theirs["losses"], 0.5, 0.1),
    ):
        apart = np.abs(ours - other)
        mean, other_mean = np.average(ours, weights=targets), np.average(other, weights=targets)
        print(
            f"\n{len(order)} steps, {what}: losses {ours[0]:.3f} to {ours[-20:].mean():.3f} differ by {apart[0]:.1e} "
            f"at the first step, at most {apart[:20].max():.1e} in 20 and {apart.max():.1e} in all; the epoch's means, "
            f"{mean:.4f} and {other_mean:.4f}, by {abs(mean - other_mean):.1e}",
            end="",
        )
        assert apart[0] < 1e-5
        assert apart[:20].max() < most_of_20
        assert abs(mean - other_mean) < most_of_mean


@pytest.fixture
def keras_features(
    once: Callable[[str, Callable[[Path], None]], Path], keras: Keras, flickr8k: Path, vgg16: Path
) -> Path:
    """A folder with real photos, Keras's features of them, and VGG16's weights."""

    def make(folder: Path) -> None:
        photos_for_keras(folder, flickr8k, vgg16)
        keras("vgg16", folder)

    return once("features by Keras", make)


def photos_for_keras(folder: Path, flickr8k: Path, vgg16: Path) -> None:
    """Real photos in two sizes, and the real convolutions, for the step ``vgg16``."""
    (folder / "photos").mkdir()
    some = sorted((flickr8k / "Flicker8k_Dataset").glob("*.jpg"))[:PHOTOS]
    for number, path in enumerate(some):
        with Image.open(path) as photo:
            enlarged = photo.convert("RGB").resize((333, 500) if number % 2 else (500, 375), Image.Resampling.BICUBIC)
        enlarged.save(folder / "photos" / path.name, quality=95)
    state = list(torch.load(vgg16, weights_only=True).values())
    layers = {f"{('kernel', 'bias')[i % 2]}{i // 2}": value.numpy() for i, value in enumerate(state)}
    np.savez(folder / "convolutions.npz", **layers)


def test_the_encoder_is_the_tutorials(keras_features: Path) -> None:
    fc2 = read_arrays(keras_features / "features.pkl")
    grids = np.load(keras_features / "grids.npz")["grids"]
    paths = sorted((keras_features / "photos").iterdir())[: len(grids)]
    wanted = {"fc2": np.concatenate([fc2[path.stem] for path in paths]), "conv5_3": grids}
    for layer, theirs in wanted.items():
        config = FeaturesConfig(layer=layer, weights=str(keras_features / "vgg16.h5"), resize="nearest")  # type: ignore[arg-type]
        encoder = load_encoder(config).prepare(CPU, "float32")
        pixels = [PhotoTransform(224, "nearest")(read_photo(path)) for path in paths]
        ours = encoder.encode(pixels).astype(np.float32).reshape(len(paths), -1)
        if layer == "conv5_3":
            theirs = np.maximum(theirs, 0)  # Keras's layer has its ReLU too
        flat = theirs.reshape(len(paths), -1)  # (N, P * F): grids have their channels last in both
        cosine = (ours * flat).sum(1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(flat, axis=1)
        other = (flat[1:] * flat[:-1]).sum(1) / np.linalg.norm(flat[1:], axis=1) / np.linalg.norm(flat[:-1], axis=1)
        largest = np.abs(ours - flat).max()
        print(
            f"\n{layer} of {len(paths)} photos: cosine at least {cosine.min():.7f}, largest difference {largest:.3f} "
            f"where values go up to {flat.max():.1f}; cosine of different photos at most {other.max():.3f}, "
            f"{(flat > 0).mean():.0%} of the values above zero",
            end="",
        )
        assert cosine.min() > 0.9999
        assert other.max() < 0.98, "different photos have different features"


@pytest.mark.soak  # the test of all commands has captions of real features
def test_a_saved_models_captions_are_its_own(
    tmp_path: Path, keras: Keras, references: dict[str, tuple[str, ...]]
) -> None:
    split = tutorial_folder(tmp_path, references, 60)
    keras("train", tmp_path)
    theirs = json.loads((tmp_path / "captions.json").read_text())
    _, _, captioner = captioner_of(tmp_path)
    captions = captioner.caption_features(features_of(tmp_path, split).gather(np.arange(60)))
    ours = {name: caption.text for name, caption in zip(split.photos, captions, strict=True)}
    print(f"\n{len(set(theirs.values()))} different captions of 60 photos, such as {theirs[split.photos[0]]!r}", end="")
    assert len(set(theirs.values())) > 3
    assert ours == theirs


def test_what_keras_saves_of_other_models_is_refused(tmp_path: Path, keras: Keras) -> None:
    (tmp_path / "descriptions.txt").write_text("")
    keras("others", tmp_path)
    for name, says in {
        "concatenate": "is Concatenate where a layer of the kind Add should be",
        "tanh": "with activation = tanh, not relu",
        "normalised": "is BatchNormalization where a layer of the kind Add should be",
        "unmasked": "with mask_zero = False, not True",
        "hard": "with recurrent_activation = hard_sigmoid, not sigmoid",
        "gru": "another architecture",
        "sequential": "another architecture: a model of the kind Sequential",
        "only.weights": "weights without their network",
    }.items():
        with pytest.raises(InputError) as fault:
            read_keras_model(tmp_path / f"{name}.h5")
        assert says in str(fault.value), name


def dev_loss(printed: str) -> float:
    found = re.findall(r"^epoch +1 .* dev ([0-9.]+)", printed, re.MULTILINE)
    assert len(found) == 1, printed
    return float(found[0])


def test_the_tutorials_files_in_all_commands(
    tmp_path: Path,
    keras: Keras,
    keras_features: Path,
    references: dict[str, tuple[str, ...]],
) -> None:
    """features.pkl, descriptions.txt, the model and its tokenizer, as the tutorial's steps in Keras have made them."""
    for name in ("photos", "vgg16.h5"):
        (tmp_path / name).symlink_to(keras_features / name)
    names = sorted(path.name for path in (tmp_path / "photos").iterdir())
    tutorial_folder(tmp_path, {name: references[name] for name in names}, PHOTOS)
    train = PHOTOS * 4 // 5
    (tmp_path / "train.txt").write_text("".join(f"{name}\n" for name in names[:train]))
    (tmp_path / "dev.txt").write_text("".join(f"{name}\n" for name in names[train:]))
    shutil.copy(keras_features / "features.pkl", tmp_path)
    keras("train", tmp_path)
    folder = Folder(tmp_path)
    data = (
        *("--experiment", "flickr8k-tutorial", "--captions.root", ".", "--captions.captions", "descriptions.txt"),
        *("--captions.photos", "photos", "--captions.train", "train.txt", "--captions.dev", "dev.txt"),
        *("--features.cache", "cache"),
    )
    # Training on the file of features, and on the photos.
    # Few and small steps: in many, the rounding of features to float16 would grow.
    training = (
        *("--training.epochs", "1", "--training.batch_size", "100", "--training.learning_rate", "1e-4"),
        *("--training.device", "cpu"),
    )
    from_file = folder.run("train", *data, *training, "--features.file", "features.pkl")
    (first,) = (tmp_path / "checkpoints").glob("*/ep*")
    from_photos = folder.run("train", *data, *training, "--features.weights", "vgg16.h5")
    (second,) = set((tmp_path / "checkpoints").glob("*/ep*")) - {first}
    losses = [dev_loss(done.stdout) for done in (from_file, from_photos)]
    print(f"\ndev losses on Keras's features {losses[0]:.4f}, on our own {losses[1]:.4f}", end="")
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)
    # The tutorial's model as a bundle. Its captions from Keras's features are Keras's.
    files = ("--keras", "model.h5", "--tokenizer", "tokenizer.pkl", "--features.weights", "vgg16.h5")
    print(folder.run("bundle", *files, "--output", "tutorial").stdout, end="")
    captioner = Captioner.load(tmp_path / "tutorial")
    theirs = json.loads((tmp_path / "captions.json").read_text())
    arrays = read_arrays(tmp_path / "features.pkl")
    features = np.stack([arrays[name] for name in theirs]).astype(np.float16)
    ours = [caption.text for caption in captioner.caption_features(features)]
    same = np.mean([our == their for our, their in zip(ours, theirs.values(), strict=True)])
    print(f"{same:.1%} of {PHOTOS} captions are the same from Keras's features, rounded to float16; ", end="")
    assert same >= 0.98
    # Every command takes the bundle; its encoder is in it.
    printed = folder.run("caption", "--model", "tutorial", *(f"photos/{name}" for name in names[:20])).stdout
    captions = [line.partition("\t")[2] for line in printed.splitlines()]
    same = np.mean([our == theirs[Path(name).stem] for our, name in zip(captions, names, strict=False)])
    print(f"{same:.0%} of 20 from photos", end="")
    assert same >= 0.8, "the encoder may compute in bfloat16"
    weights = ("--features.weights", "vgg16.h5")
    scores = json.loads(folder.run("evaluate", *data, *weights, "--model", "tutorial").stdout)
    assert scores["photos"] == PHOTOS - train and scores["vocabulary_digest"] == captioner.vocabulary.digest()
    compared = folder.run("compare", *data, *weights, "tutorial", str(second.relative_to(tmp_path))).stdout
    print(f"\n{compared}", end="")
    assert "cider" in compared and f"{PHOTOS - train} photos of dev" in compared
