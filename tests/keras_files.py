"""Small files as Keras 2 and 3 save the tutorial's model and its tokenizer, made without Keras."""

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np
from numpy.typing import NDArray

Form = Literal["Keras 2", "Keras 3", "keras"]
WORDS = ("startseq", "endseq", "dog", "runs", "black", "the")
Config = dict[str, Any]
Change = Callable[[dict[str, Config], dict[str, NDArray[np.float32]]], object]


def tokenizer_json(words: tuple[str, ...] = WORDS, **fields: object) -> str:
    index = {word: number for number, word in enumerate(words, start=1)}
    config = {"num_words": None, "oov_token": None, "word_index": json.dumps(index), **fields}
    return json.dumps({"class_name": "Tokenizer", "config": config})


def saved_model(
    form: Form = "Keras 3",
    features: int = 4096,
    units: int = 4,
    embedding: int = 3,
    length: int = 7,
    change: Change = lambda layers, weights: None,
) -> bytes:
    """The file of a model; ``change`` may alter its layers and weights before."""
    classes = len(WORDS) + 1
    layers: dict[str, Config] = {
        "photo_in": {"kind": "InputLayer", "shape": features, "from": []},
        "words_in": {"kind": "InputLayer", "shape": length, "from": []},
        "photo_drop": {"kind": "Dropout", "rate": 0.4, "from": ["photo_in"]},
        "embedding": {"kind": "Embedding", "input_dim": classes, "output_dim": embedding, "mask_zero": True,
                      "from": ["words_in"]},
        "words_drop": {"kind": "Dropout", "rate": 0.3, "from": ["embedding"]},
        "photo": {"kind": "Dense", "units": units, "activation": "relu", "use_bias": True, "from": ["photo_drop"]},
        "lstm": {"kind": "LSTM", "units": units, "activation": "tanh", "recurrent_activation": "sigmoid",
                 "use_bias": True, "return_sequences": False, "go_backwards": False, "stateful": False,
                 "from": ["words_drop"]},
        "added": {"kind": "Add", "from": ["photo", "lstm"]},
        "hidden": {"kind": "Dense", "units": units, "activation": "relu", "use_bias": True, "from": ["added"]},
        "output": {"kind": "Dense", "units": classes, "activation": "softmax", "use_bias": True, "from": ["hidden"]},
    }  # fmt: skip
    shapes = {
        "embedding/embeddings": (classes, embedding),
        "photo/kernel": (features, units), "photo/bias": (units,),
        "lstm/kernel": (embedding, 4 * units), "lstm/recurrent_kernel": (units, 4 * units), "lstm/bias": (4 * units,),
        "hidden/kernel": (units, units), "hidden/bias": (units,),
        "output/kernel": (units, classes), "output/bias": (classes,),
    }  # fmt: skip
    rng = np.random.default_rng(2)
    weights = {name: rng.normal(0, 1, shape).astype(np.float32) for name, shape in shapes.items()}
    change(layers, weights)
    config = json.dumps(_config(form, layers))
    content = io.BytesIO()
    with h5py.File(content, "w") as file:
        if form != "keras":
            file.attrs["model_config"] = config if form == "Keras 3" else config.encode()
        for name, values in weights.items():
            file.create_dataset(_place(form, layers, name), data=values)
    if form != "keras":
        return content.getvalue()
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as files:
        files.writestr("metadata.json", "{}")
        files.writestr("config.json", config)
        files.writestr("model.weights.h5", content.getvalue())
    return archive.getvalue()


def _place(form: Form, layers: dict[str, Config], name: str) -> str:
    layer, kind = name.split("/")
    if form == "Keras 2":
        return f"model_weights/{layer}/{layer}/{'lstm_cell/' if layer == 'lstm' else ''}{kind}:0"
    if form == "Keras 3":
        return f"model_weights/{layer}/{layer}/{'lstm_cell/' if layer == 'lstm' else ''}{kind}"
    dense = [one for one, config in layers.items() if config["kind"] == "Dense"]
    number = dense.index(layer) if layer in dense else 0
    group = layer if layer not in dense else "dense" + (f"_{number}" if number else "")
    kinds = ("kernel", "recurrent_kernel", "bias") if layer == "lstm" else ("kernel", "bias")
    return f"layers/{group}/{'cell/' if layer == 'lstm' else ''}vars/{kinds.index(kind) if kind in kinds else 0}"


def _config(form: Form, layers: dict[str, Config]) -> Config:
    listed = []
    for name, own in layers.items():
        config = {key: value for key, value in own.items() if key not in ("kind", "from", "shape")} | {"name": name}
        if "shape" in own:
            config["batch_input_shape" if form == "Keras 2" else "batch_shape"] = [None, own["shape"]]
        nodes: list[Any] = []
        if own["from"] and form == "Keras 2":
            nodes = [[[source, 0, 0, {}] for source in own["from"]]]
        elif own["from"]:
            tensors = [
                {"class_name": "__keras_tensor__", "config": {"shape": [None], "keras_history": [source, 0, 0]}}
                for source in own["from"]
            ]
            mask = {"class_name": "__keras_tensor__", "config": {"keras_history": ["not_equal", 0, 0]}}
            arguments = [tensors] if len(tensors) > 1 else tensors
            nodes = [{"args": arguments, "kwargs": {"mask": mask} if own["kind"] == "LSTM" else {}}]
        listed.append({"class_name": own["kind"], "config": config, "name": name, "inbound_nodes": nodes})
    outputs: list[Any] = ["output", 0, 0]
    kind = "Model" if form == "Keras 2" else "Functional"
    return {
        "class_name": kind,
        "config": {"layers": listed, "output_layers": [outputs] if form == "Keras 2" else outputs},
    }


def write(folder: Path, content: bytes, tokenizer: str | None = None) -> tuple[Path, Path]:
    """Write model and tokenizer; return their paths."""
    model, words = folder / "model.h5", folder / "tokenizer.json"
    model.write_bytes(content)
    words.write_text(tokenizer_json() if tokenizer is None else tokenizer)
    return model, words
