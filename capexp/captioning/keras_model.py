"""The Flickr8k tutorial's saved Keras model, read as data into a merge decoder and its vocabulary.

The network is the tutorial's, of any size: a photo's features pass a dense layer (ReLU), the words before the next one
pass an embedding and an LSTM, both are added, and two dense layers (ReLU, softmax) follow. Keras pads the words on the
left and masks the padding, so an LSTM that reads only the words gives the same. Neither Keras nor TensorFlow is needed.

Keras's classes are 0 (padding) and the tokenizer's words, ``startseq`` and ``endseq`` among them. Here they are PAD,
BOS, EOS and the words: the same classes in another order.

Shapes: F feature, E embedding, H hidden, V vocabulary, T words of the longest caption.
"""

import logging
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from pydantic_core import from_json
from torch import Tensor

from capexp.data.hdf5 import arrays, group_in, is_hdf5, opened, text_of, values_of
from capexp.data.inert_pickle import TokenizerRecord
from capexp.data.vocabulary import PAD, Vocabulary, tokenize
from capexp.errors import InputError
from capexp.settings import ModelConfig

if TYPE_CHECKING:
    from h5py import File, Group

log = logging.getLogger(__name__)

START, END = "startseq", "endseq"
"""The words with which the tutorial begins and ends each caption."""

_NEEDED = (
    "needed is the tutorial's network: Dense(relu) of the photo + LSTM(Embedding(mask_zero)) of the words, added, "
    "Dense(relu), Dense(softmax)"
)
_MOST_LAYERS = 40
_LONGEST = 1000  # words of a caption, as in the settings
_DEPTH = 4  # groups from a layer's group to its values, at most


@dataclass(frozen=True)
class KerasModel:
    """The tutorial's network as a saved model describes it, with its weights in Keras's layout."""

    path: Path
    features: int
    """Values of a photo's feature vector, F."""
    config: ModelConfig
    maximum_length: int
    """The longest sequence of words that the model reads, T; the tutorial generates at most so many words."""
    classes: int
    """V: padding and the words."""
    weights: Mapping[str, NDArray[np.float32]]
    """By layer and kind, such as ``lstm.kernel``."""

    def convert(self, tokenizer: TokenizerRecord) -> tuple[Vocabulary, dict[str, Tensor]]:
        """Return the vocabulary of the model's tokenizer, and the weights of a merge decoder with it."""
        vocabulary, classes = self.vocabulary(tokenizer)
        return vocabulary, self.decoder_state(classes)

    def require_features(self, positions: int, size: int) -> None:
        """Raise InputError unless the model reads ``positions`` vectors of ``size`` values for a photo."""
        if (positions, size) != (1, self.features):
            raise InputError(
                f"{self.path}: reads {self.features:,} values for a photo, the features have {positions} x {size:,}; "
                "give the features that it was trained on with --features.file"
            )

    def vocabulary(self, tokenizer: TokenizerRecord) -> tuple[Vocabulary, list[int]]:
        """Return the vocabulary of a tokenizer, and for each of its entries Keras's class."""
        words = {word: number for word, number in tokenizer.word_index.items() if number < self.classes}
        limited = tokenizer.num_words is not None and tokenizer.num_words == self.classes
        if sorted(words.values()) != [*range(1, self.classes)] or not (
            limited or len(words) == len(tokenizer.word_index)
        ):
            raise InputError(
                f"{self.path}: the model knows {self.classes - 1:,} words, the tokenizer "
                f"{len(tokenizer.word_index):,}; give the tokenizer that the model was trained with"
            )
        missing = [word for word in (START, END) if word not in words]
        if missing:
            raise InputError(
                f"the tokenizer has no word {missing[0]!r}, with which the tutorial begins or ends captions; give the "
                "tokenizer that the model was trained with"
            )
        unknown = tokenizer.oov_token if tokenizer.oov_token in words else None
        special = [START, END] + ([] if unknown is None else [unknown])
        kept = sorted(set(words) - set(special), key=words.__getitem__)
        strange = [word for word in kept if not word or word != "".join(word.split())]
        if strange or not kept:
            raise InputError(
                f"the tokenizer has {f'the word {strange[0]!r}, which has a blank' if strange else 'no words'}; "
                "give the tokenizer that the model was trained with"
            )
        uncleaned = [word for word in kept if tokenize(word, "tutorial", "words") != [word]]
        if uncleaned:
            log.warning(
                "%s of the tokenizer's words, such as %r, are none by the tutorial's cleaning: captions that hold them "
                "are evaluated without them",
                f"{len(uncleaned):,}",
                uncleaned[0],
            )
        vocabulary = Vocabulary(tuple(kept), "tutorial", "drop" if unknown is None else "token", "words")
        return vocabulary, [PAD, *(words[word] for word in special), *(words[word] for word in kept)]

    def decoder_state(self, classes: Sequence[int]) -> dict[str, Tensor]:
        """Return the weights of a merge decoder; ``classes`` are Keras's, by the entries of the vocabulary."""
        order = torch.tensor(classes)
        weights = {name: torch.from_numpy(value) for name, value in self.weights.items()}
        embedding = weights["embedding.embeddings"][order]  # (V, E)
        embedding[PAD] = 0  # it is never read
        bias = weights["lstm.bias"]
        return {
            "photo.weight": weights["photo.kernel"].t().contiguous(),  # (H, F)
            "photo.bias": weights["photo.bias"],
            "embedding.weight": embedding,
            # Keras's gates are input, forget, cell, output, as torch's are; it has one bias where torch has two.
            "lstm.weight_ih_l0": weights["lstm.kernel"].t().contiguous(),  # (4H, E)
            "lstm.weight_hh_l0": weights["lstm.recurrent_kernel"].t().contiguous(),  # (4H, H)
            "lstm.bias_ih_l0": bias,
            "lstm.bias_hh_l0": torch.zeros_like(bias),
            "dense.weight": weights["dense.kernel"].t().contiguous(),  # (H, H)
            "dense.bias": weights["dense.bias"],
            "vocabulary.weight": weights["output.kernel"].t()[order].contiguous(),  # (V, H)
            "vocabulary.bias": weights["output.bias"][order],
        }


def read_keras_model(path: Path) -> KerasModel:
    """Read a model that Keras 2 or 3 has saved, as ``.h5`` or as ``.keras``."""
    if not path.is_file():
        raise InputError(f"{path}: no such model; give the file that Keras has saved (.h5 or .keras)")
    if zipfile.is_zipfile(path) and not is_hdf5(path):
        config, content = _read_archive(path)
        with opened(path, content) as file:
            return _Network(path, config, _by_class(config)).read(file, "layers")
    if not is_hdf5(path):
        raise InputError(f"{path}: neither HDF5 nor a .keras archive; give the file that Keras has saved")
    with opened(path) as file:
        text = text_of(file, "model_config")
        if text is None:
            raise InputError(f"{path}: weights without their network (model_config); save the model with model.save")
        config = _parse(path, text)
        return _Network(path, config, {name: name for name in _layers(path, config)}).read(file, "model_weights")


def _read_archive(path: Path) -> tuple[Any, bytes]:
    """Return the config and the file of weights in a ``.keras`` archive."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = {entry.filename: entry for entry in archive.infolist()}
            wanted = [entries[name] for name in ("config.json", "model.weights.h5")]
            if any(entry.file_size > path.stat().st_size for entry in wanted):  # Keras does not compress them
                raise InputError(f"{path}: an archive that would swell; save the model again")
            config, content = (archive.read(entry) for entry in wanted)
    except KeyError as error:
        raise InputError(f"{path}: an archive without {error.args[0]}; give the file that Keras has saved") from None
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, OSError, EOFError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: a damaged archive ({type(error).__name__}); get the file again") from None
    return _parse(path, config), content


def _parse(path: Path, text: str | bytes) -> Any:
    try:
        return from_json(text)
    except ValueError as error:
        raise InputError(f"{path}: the network's description is invalid JSON ({error}); get the file again") from None


@dataclass(frozen=True)
class _Layer:
    name: str
    kind: str
    config: Mapping[str, Any]
    inputs: tuple[str, ...]
    """The names of the layers whose outputs it reads."""


def _layers(path: Path, model: Any) -> dict[str, _Layer]:
    """Return the layers of a functional model, by name and in order."""
    config = model.get("config") if isinstance(model, dict) else None
    listed = config.get("layers") if isinstance(config, dict) else None
    if not isinstance(listed, list) or not isinstance(config, dict) or "output_layers" not in config:
        kind = model.get("class_name") if isinstance(model, dict) else None
        raise _other(path, f"a model of the kind {str(kind)[:40]}")
    layers: dict[str, _Layer] = {}
    for entry in listed:
        try:
            name, kind, own = entry["config"]["name"], entry["class_name"], entry["config"]
            inputs = tuple(_sources(entry.get("inbound_nodes", [])))
        except (AttributeError, KeyError, TypeError):
            raise InputError(f"{path}: a layer is not described as Keras does it; save the model again") from None
        if not isinstance(name, str) or not isinstance(kind, str) or name in layers:
            raise InputError(f"{path}: a layer is not described as Keras does it; save the model again")
        layers[name] = _Layer(name, kind, own, inputs)
        if len(layers) > _MOST_LAYERS:
            raise _other(path, f"{len(listed)} layers")
    return layers


def _sources(nodes: Any) -> Iterator[str]:
    """Yield the names of the layers that a layer's inputs come from; masks are no inputs."""
    if isinstance(nodes, dict) and "keras_history" in nodes.get("config", {}):  # Keras 3
        yield str(nodes["config"]["keras_history"][0])
    elif isinstance(nodes, dict):
        yield from _sources(nodes.get("args", []))
    elif isinstance(nodes, list) and len(nodes) in (3, 4) and isinstance(nodes[0], str):  # Keras 2: name, node, tensor
        yield nodes[0]
    elif isinstance(nodes, list):
        for node in nodes:
            yield from _sources(node)


def _by_class(model: Any) -> dict[str, str]:
    """Return the group of each layer in Keras 3's own form of weights: its class in snake case, numbered."""
    counts: dict[str, int] = {}
    groups = {}
    entries = model["config"]["layers"] if _is_listed(model) else []
    for entry in entries:
        name = {"Embedding": "embedding", "LSTM": "lstm", "Dense": "dense"}.get(str(entry.get("class_name")), "")
        count = counts[name] = counts.get(name, -1) + 1
        groups[str(entry.get("config", {}).get("name"))] = f"{name}_{count}" if count else name
    return groups


def _is_listed(model: Any) -> bool:
    layers = model.get("config", {}).get("layers") if isinstance(model, dict) else None
    return isinstance(layers, list) and all(isinstance(entry, dict) for entry in layers)


def _other(path: Path, found: str) -> InputError:
    return InputError(f"{path}: another architecture: {found}; {_NEEDED}")


class _Network:
    """The layers of a saved model, checked against the tutorial's, and the groups that hold their weights."""

    def __init__(self, path: Path, model: Any, groups: Mapping[str, str]) -> None:
        self._path, self._layers, self._groups = path, _layers(path, model), groups
        output, rates_before_output = self._follow(self._only([*_sources(model["config"]["output_layers"])], "outputs"))
        self._require(output, "Dense", activation="softmax", use_bias=True)
        hidden, output_rates = self._before(output)
        self._require(hidden, "Dense", activation="relu", use_bias=True)
        added, _ = self._before(hidden)
        self._require(added, "Add")
        if len(added.inputs) != 2:
            raise self._unfit(added, f"with {len(added.inputs)} inputs")
        # The photo's branch and the words'.
        branches = [self._follow(name) for name in added.inputs]
        branches.sort(key=lambda branch: branch[0].kind == "LSTM")
        (photo, after_photo), (lstm, after_lstm) = branches
        self._require(photo, "Dense", activation="relu", use_bias=True)
        self._require(
            lstm, "LSTM", activation="tanh", recurrent_activation="sigmoid", use_bias=True, return_sequences=False,
            go_backwards=False, stateful=False,
        )  # fmt: skip
        pixels, photo_rates = self._before(photo)
        embedding, word_rates = self._before(lstm)
        self._require(embedding, "Embedding", mask_zero=True)
        words, _ = self._before(embedding)
        if rates_before_output or after_photo or after_lstm:
            raise _other(path, "a dropout after the photo's dense layer, the LSTM or the softmax")
        self._named = {"output": output, "dense": hidden, "photo": photo, "lstm": lstm, "embedding": embedding}
        # Their sizes.
        units = self._whole(lstm, "units")
        for layer in (photo, hidden):
            if self._whole(layer, "units") != units:
                raise self._unfit(layer, f"of {layer.config['units']} units, where the LSTM has {units}")
        self._features, self._classes = self._length(pixels), self._whole(output, "units")
        self._words = min(self._length(words), _LONGEST)
        if self._whole(embedding, "input_dim") != self._classes:
            raise self._unfit(
                embedding, f"of {embedding.config['input_dim']} words, where the softmax has {self._classes}"
            )
        try:
            self._config = ModelConfig(
                embedding_size=self._whole(embedding, "output_dim"),
                lstm_units=units,
                dropout=max([0.0, *photo_rates, *word_rates]),
                output_dropout=max([0.0, *output_rates]),
            )
        except ValidationError as error:
            first = error.errors()[0]
            raise _other(path, f"{first['loc'][0]} {first['input']}: {first['msg'].lower()}") from None

    def read(self, file: "File", parent: str) -> KerasModel:
        """Read the weights of all layers from the group ``parent`` of a file."""
        units, embedding_size = self._config.lstm_units, self._config.embedding_size
        shapes: dict[str, dict[str, tuple[int, ...]]] = {
            "photo": {"kernel": (self._features, units), "bias": (units,)},
            "embedding": {"embeddings": (self._classes, embedding_size)},
            "lstm": {
                "kernel": (embedding_size, 4 * units),
                "recurrent_kernel": (units, 4 * units),
                "bias": (4 * units,),
            },
            "dense": {"kernel": (units, units), "bias": (units,)},
            "output": {"kernel": (units, self._classes), "bias": (self._classes,)},
        }
        layers = group_in(file, parent)
        if layers is None:
            raise InputError(f"{self._path}: holds no weights ({parent}); save the model with model.save")
        weights = {}
        for name, of_layer in shapes.items():
            group = group_in(layers, self._groups[self._named[name].name])
            for kind, value in self._values(group, name, of_layer).items():
                weights[f"{name}.{kind}"] = value
        return KerasModel(self._path, self._features, self._config, self._words, self._classes, weights)

    def _values(
        self, group: "Group | None", name: str, shapes: Mapping[str, tuple[int, ...]]
    ) -> dict[str, NDArray[np.float32]]:
        """Return the weights of a layer by kind. In their names Keras 3 numbers the kinds in its own form of files."""
        found = {} if group is None else {
            str(one.name).rpartition("/")[2].partition(":")[0]: one for one in arrays(self._path, group, _DEPTH)
        }  # fmt: skip
        values = {}
        for number, (kind, shape) in enumerate(shapes.items()):
            dataset = found.get(kind, found.get(str(number)))
            if dataset is None or dataset.shape != shape:
                raise InputError(
                    f"{self._path}: the {kind} of layer {self._named[name].name!r} is missing or has another shape "
                    f"than {shape}; save the model again"
                )
            values[kind] = values_of(self._path, dataset)
            if not np.isfinite(values[kind]).all():
                raise InputError(f"{self._path}: the {kind} of layer {self._named[name].name!r} is not finite")
        return values

    def _follow(self, name: str) -> tuple[_Layer, list[float]]:
        """Return the layer of this name, or the one before it that is no dropout, and the dropouts' rates."""
        rates: list[float] = []
        for _ in range(_MOST_LAYERS):
            layer = self._layers.get(name)
            if layer is None:
                raise _other(self._path, f"no layer {name[:40]!r}")
            if layer.kind != "Dropout":
                return layer, rates
            rate = layer.config.get("rate")
            if not isinstance(rate, float | int) or not 0 <= rate < 1:
                raise self._unfit(layer, "without a rate")
            rates.append(float(rate))
            name = self._only(layer.inputs, "inputs of a dropout")
        raise _other(self._path, "a circle of layers")

    def _before(self, layer: _Layer) -> tuple[_Layer, list[float]]:
        return self._follow(self._only(layer.inputs, f"inputs of {layer.name!r}"))

    def _only(self, names: Sequence[str], what: str) -> str:
        if len(names) != 1:
            raise _other(self._path, f"{len(names)} {what}")
        return names[0]

    def _require(self, layer: _Layer, kind: str, **config: object) -> None:
        if layer.kind != kind:
            raise self._unfit(layer, f"where a layer of the kind {kind} should be")
        for name, wanted in config.items():
            value = layer.config.get(name, wanted)
            if value != wanted:
                raise self._unfit(layer, f"with {name} = {str(value)[:40]}, not {wanted}")

    def _whole(self, layer: _Layer, name: str) -> int:
        value = layer.config.get(name)
        if type(value) is not int or not 1 <= value < 2**31:
            raise self._unfit(layer, f"with {name} = {str(value)[:40]}")
        return value

    def _length(self, layer: _Layer) -> int:
        """Return the length of an input's vectors."""
        self._require(layer, "InputLayer")
        shape = layer.config.get("batch_shape", layer.config.get("batch_input_shape"))
        if not isinstance(shape, list) or len(shape) != 2 or type(shape[1]) is not int or not 1 <= shape[1] < 2**31:
            raise self._unfit(layer, f"of shape {str(shape)[:40]}")
        return shape[1]

    def _unfit(self, layer: _Layer, what: str) -> InputError:
        return _other(self._path, f"layer {layer.name[:40]!r} is {layer.kind[:40]} {what}")
