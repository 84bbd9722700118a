"""The Flickr8k tutorial's steps, in Keras: ``python tutorial_in_keras.py STEP FOLDER``.

Tests run it in an environment of its own (fixture ``keras``), since the project does not need TensorFlow. Each step
reads what it needs from the folder and writes its results there. The code follows the tutorial's ("How to Develop a
Deep Learning Photo Caption Generator from Scratch"), and docstrings say where it differs.
"""

import json
import os
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")  # its default only with AVX-512

import h5py
import keras
import numpy as np
import tensorflow as tf
from keras import layers
from keras.src.legacy.preprocessing.text import Tokenizer
from keras.utils import img_to_array, load_img, pad_sequences, to_categorical

UNITS = 256
Descriptions = dict[str, list[str]]
Features = dict[str, np.ndarray]


def load_descriptions(folder: Path) -> Descriptions:
    """Captions by photo, each between startseq and endseq."""
    descriptions: Descriptions = {}
    for line in (folder / "descriptions.txt").read_text().splitlines():
        name, *words = line.split()
        descriptions.setdefault(name, []).append("startseq " + " ".join(words) + " endseq")
    return descriptions


def load_features(folder: Path) -> Features:
    with (folder / "features.pkl").open("rb") as file:
        features: Features = pickle.load(file)
    return features


def all_lines(descriptions: Descriptions) -> list[str]:
    return [text for texts in descriptions.values() for text in texts]


def create_tokenizer(descriptions: Descriptions) -> Tokenizer:
    tokenizer = Tokenizer()
    tokenizer.fit_on_texts(all_lines(descriptions))
    return tokenizer


def max_length(descriptions: Descriptions) -> int:
    return max(len(text.split()) for text in all_lines(descriptions))


def create_sequences(
    tokenizer: Tokenizer, length: int, texts: list[str], photo: np.ndarray, classes: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every prefix of every caption of a photo, padded on the left, with the word after it."""
    photos, prefixes, targets = [], [], []
    for text in texts:
        sequence = tokenizer.texts_to_sequences([text])[0]
        for i in range(1, len(sequence)):
            photos.append(photo)
            prefixes.append(pad_sequences([sequence[:i]], maxlen=length)[0])
            targets.append(to_categorical([sequence[i]], num_classes=classes)[0])
    return np.array(photos), np.array(prefixes), np.array(targets)


def define_model(classes: int, length: int, dropout: float = 0.5) -> keras.Model:
    inputs1 = layers.Input(shape=(4096,))
    fe1 = layers.Dropout(dropout)(inputs1)
    fe2 = layers.Dense(UNITS, activation="relu")(fe1)
    inputs2 = layers.Input(shape=(length,))
    se1 = layers.Embedding(classes, UNITS, mask_zero=True)(inputs2)
    se2 = layers.Dropout(dropout)(se1)
    se3 = layers.LSTM(UNITS)(se2)
    decoder1 = layers.add([fe2, se3])
    decoder2 = layers.Dense(UNITS, activation="relu")(decoder1)
    outputs = layers.Dense(classes, activation="softmax")(decoder2)
    model = keras.Model(inputs=[inputs1, inputs2], outputs=outputs)
    model.compile(loss="categorical_crossentropy", optimizer="adam", jit_compile=False)
    return model


def data_generator(
    descriptions: Descriptions, features: Features, order: list[str], tokenizer: Tokenizer, length: int, classes: int
) -> Iterator[tuple[tuple[np.ndarray, np.ndarray], np.ndarray]]:
    """One photo a batch. The tutorial's order is that of its dict; here it is given."""
    while True:
        for name in order:
            photos, prefixes, targets = create_sequences(
                tokenizer, length, descriptions[name], features[name][0], classes
            )
            yield (photos, prefixes), targets


class Setting:
    """What every step begins with."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.descriptions, self.features = load_descriptions(folder), load_features(folder)
        self.tokenizer = create_tokenizer(self.descriptions)
        self.classes, self.length = len(self.tokenizer.word_index) + 1, max_length(self.descriptions)
        with (folder / "tokenizer.pkl").open("wb") as file:
            pickle.dump(self.tokenizer, file)
        (folder / "tokenizer.json").write_text(self.tokenizer.to_json())

    def sequences(self, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        texts, photo = self.descriptions[name], self.features[name][0]
        return create_sequences(self.tokenizer, self.length, texts, photo, self.classes)

    def save(self, model: keras.Model) -> None:
        model.save(self.folder / "model.h5")
        model.save(self.folder / "model.keras")


def network(folder: Path) -> None:
    """Random weights that make some words far more probable than others: all prefixes' probabilities, and losses."""
    its = Setting(folder)
    model = define_model(its.classes, its.length)
    rng = np.random.default_rng(5)
    model.set_weights([rng.normal(0, 3 / value.shape[0] ** 0.5, value.shape) for value in model.get_weights()])
    its.save(model)
    names, prefixes, probabilities, targets = [], [], [], []
    for name in its.descriptions:
        photos, sequences, following = its.sequences(name)
        probabilities.append(model([photos, sequences], training=False).numpy())
        names += [name] * len(sequences)
        prefixes.append(sequences)
        targets.append(following.argmax(1))
    np.savez(
        folder / "network.npz",
        names=names,
        prefixes=np.concatenate(prefixes),
        probabilities=np.concatenate(probabilities),
        targets=np.concatenate(targets),
    )


class Losses(keras.callbacks.Callback):  # type: ignore[misc]
    """The loss of each step, which Keras tells only as the mean over the epoch so far."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[float] = []

    def on_train_batch_begin(self, batch: int, logs: object = None) -> None:
        self.model.reset_metrics()

    def on_train_batch_end(self, batch: int, logs: dict[str, float] | None = None) -> None:
        assert logs is not None
        self.losses.append(float(logs["loss"]))


class SummedAdam(keras.optimizers.Adam):  # type: ignore[misc]
    """Adam that sums the gradients of a word's occurrences before it squares them.

    Keras's own squares the gradient of each occurrence by itself, because a sparse gradient lists them separately.
    """

    def update_step(self, gradient: object, variable: object, learning_rate: object) -> None:
        super().update_step(tf.convert_to_tensor(gradient), variable, learning_rate)


def fit(folder: Path) -> None:
    """One epoch without dropout, photos in the order of ``order.txt``, from the weights in ``model.h5``; twice.

    The first time it is the tutorial's, the second time with gradients that are summed first.
    """
    its = Setting(folder)
    keras.utils.set_random_seed(3)
    model = define_model(its.classes, its.length, dropout=0.0)
    its.save(model)
    first = model.get_weights()
    order = (folder / "order.txt").read_text().split()
    targets = [sum(len(text.split()) - 1 for text in its.descriptions[name]) for name in order]
    results: dict[str, list[float]] = {}
    for name, optimizer in (("losses", "adam"), ("summed", SummedAdam())):
        model.set_weights(first)
        model.compile(loss="categorical_crossentropy", optimizer=optimizer, jit_compile=False)
        generator = data_generator(its.descriptions, its.features, order, its.tokenizer, its.length, its.classes)
        told = Losses()
        model.fit(generator, epochs=1, steps_per_epoch=len(order), verbose=0, callbacks=[told])
        results[name] = told.losses
    np.savez(folder / "fit.npz", targets=targets, losses=results["losses"], summed=results["summed"])


def generate_desc(its: Setting, model: keras.Model, names: list[str]) -> list[str]:
    """Greedy captions of photos, all at once, without startseq and endseq."""
    photos = np.concatenate([its.features[name] for name in names])
    texts = ["startseq"] * len(names)
    for _ in range(its.length):
        sequences = pad_sequences(its.tokenizer.texts_to_sequences(texts), maxlen=its.length)
        best = model([photos, sequences], training=False).numpy().argmax(1)
        words = [its.tokenizer.index_word.get(int(number)) for number in best]
        texts = [
            text if text.endswith(" endseq") or word is None else f"{text} {word}"
            for text, word in zip(texts, words, strict=True)
        ]
    return [text.removeprefix("startseq").removesuffix("endseq").strip() for text in texts]


def train(folder: Path) -> None:
    """Some steps as in the tutorial, and greedy captions."""
    its = Setting(folder)
    keras.utils.set_random_seed(3)
    model = define_model(its.classes, its.length)
    names = list(its.descriptions)
    generator = data_generator(its.descriptions, its.features, names, its.tokenizer, its.length, its.classes)
    model.fit(generator, epochs=1, steps_per_epoch=120, verbose=0)
    its.save(model)
    (folder / "captions.json").write_text(json.dumps(dict(zip(names, generate_desc(its, model, names), strict=True))))


def others(folder: Path) -> None:
    """Saved models that are not the tutorial's."""
    length, classes, size = 6, 9, 8

    def save(name: str, outputs: object, *inputs: object) -> None:
        keras.Model(inputs=list(inputs), outputs=outputs).save(folder / f"{name}.h5")

    def parts(mask: bool = True, gates: str = "sigmoid", kind: str = "LSTM") -> tuple[object, object, object, object]:
        photo, words = layers.Input(shape=(4096,)), layers.Input(shape=(length,))
        seen = layers.Dense(size, activation="relu")(photo)
        embedded = layers.Embedding(classes, size, mask_zero=mask)(words)
        own = {"recurrent_activation": gates} if kind == "LSTM" else {}
        return photo, words, seen, getattr(layers, kind)(size, **own)(embedded)

    def after(merged: object, activation: str = "relu") -> object:
        return layers.Dense(classes, activation="softmax")(layers.Dense(size, activation=activation)(merged))

    photo, words, seen, read = parts()
    save("concatenate", after(layers.concatenate([seen, read])), photo, words)
    save("tanh", after(layers.add([seen, read]), "tanh"), photo, words)
    save("normalised", after(layers.BatchNormalization()(layers.add([seen, read]))), photo, words)
    for name, values in {
        "unmasked": {"mask": False},
        "hard": {"gates": "hard_sigmoid"},
        "gru": {"kind": "GRU"},
    }.items():
        photo, words, seen, read = parts(**values)  # type: ignore[arg-type]
        save(name, after(layers.add([seen, read])), photo, words)
    model = keras.Sequential([layers.Input(shape=(4,)), layers.Dense(3, activation="softmax")])
    model.save(folder / "sequential.h5")
    model.save_weights(folder / "only.weights.h5")


def vgg16(folder: Path) -> None:
    """Features of all photos by Keras's VGG16, its weights from a file of the published form."""
    if not (folder / "vgg16.h5").exists():
        make_weights(folder)
    net = keras.applications.VGG16(weights=None)
    net.load_weights(folder / "vgg16.h5")
    outputs = [net.layers[-2].output, net.get_layer("block5_conv3").output]
    model = keras.Model(inputs=net.inputs, outputs=outputs)
    features: Features = {}
    paths = sorted((folder / "photos").iterdir())
    for first in range(0, len(paths), 20):  # the tutorial takes one at a time
        some = paths[first : first + 20]
        pixels = np.stack([img_to_array(load_img(path, target_size=(224, 224))) for path in some])
        fc2, grids = model(keras.applications.vgg16.preprocess_input(pixels), training=False)
        features |= {path.stem: row[None] for path, row in zip(some, fc2.numpy(), strict=True)}
        if first == 0:
            np.savez(folder / "grids.npz", grids=grids.numpy())
    with (folder / "features.pkl").open("wb") as file:
        pickle.dump(features, file)


def make_weights(folder: Path) -> None:
    """Write real convolutions and made-up dense layers as Keras publishes VGG16's weights."""
    rng = np.random.default_rng(7)
    convolutions = np.load(folder / "convolutions.npz")  # as in PyTorch, RGB
    blocks = [f"block{block}_conv{i}" for block, count in enumerate((2, 2, 3, 3, 3), 1) for i in range(1, count + 1)]
    with h5py.File(folder / "vgg16.h5", "w") as file:

        def add(name: str, kernel: np.ndarray, bias: np.ndarray) -> None:
            group = file.create_group(name)
            names = [f"{name}_W_1:0", f"{name}_b_1:0"]
            group.attrs["weight_names"] = [one.encode() for one in names]
            for own, values in zip(names, (kernel, bias), strict=True):
                group.create_dataset(own, data=values.astype(np.float32))

        for number, name in enumerate(blocks):
            kernel = convolutions[f"kernel{number}"].astype(np.float32).transpose(2, 3, 1, 0)
            add(name, kernel[:, :, ::-1] if number == 0 else kernel, convolutions[f"bias{number}"])
        # Of a scale that gives features as large as the real ones.
        for name, size, count in (("fc1", 25088, 4096), ("fc2", 4096, 4096), ("predictions", 4096, 1000)):
            kernel = rng.standard_normal((size, count), np.float32) * np.float32(0.4 / size**0.5)
            add(name, kernel, rng.normal(0, 0.1, count))
        file.attrs["layer_names"] = [name.encode() for name in (*blocks, "fc1", "fc2", "predictions")]


if __name__ == "__main__":
    {"network": network, "fit": fit, "train": train, "others": others, "vgg16": vgg16}[sys.argv[1]](Path(sys.argv[2]))
