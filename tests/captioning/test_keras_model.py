"""The tutorial's saved model is read as data, in every form; any other model is refused, and the line says why."""

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from keras_files import WORDS, Change, Form, saved_model, tokenizer_json, write
from numpy.typing import NDArray

from capexp.captioning.keras_model import KerasModel, read_keras_model
from capexp.captioning.model import build_decoder
from capexp.data.inert_pickle import TokenizerRecord, read_tokenizer
from capexp.data.vocabulary import BOS, EOS, PAD
from capexp.errors import InputError

FORMS: tuple[Form, ...] = ("Keras 2", "Keras 3", "keras")


def model_of(tmp_path: Path, content: bytes) -> KerasModel:
    return read_keras_model(write(tmp_path, content)[0])


def refusal(tmp_path: Path, content: bytes) -> str:
    with pytest.raises(InputError) as fault:
        model_of(tmp_path, content)
    assert "\n" not in str(fault.value)
    assert str(fault.value).startswith(f"{tmp_path / 'model.h5'}: ")
    return str(fault.value)


@pytest.mark.parametrize("form", FORMS)
def test_all_forms_hold_the_same(tmp_path: Path, form: Form) -> None:
    model = model_of(tmp_path, saved_model(form))
    assert (model.features, model.classes, model.maximum_length) == (4096, 7, 7)
    assert (model.config.embedding_size, model.config.lstm_units, model.config.dropout) == (3, 4, 0.4)
    wanted = model_of(tmp_path, saved_model("Keras 3")).weights
    assert all(np.array_equal(value, model.weights[name]) for name, value in wanted.items())


def keras_probabilities(model: KerasModel, photo: NDArray[np.float32], numbers: list[int]) -> NDArray[np.float32]:
    """The next word's probabilities, by the formulas of Keras's layers."""

    def sigmoid(x: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.asarray(1 / (1 + np.exp(-x)), np.float32)

    w = model.weights
    h = c = np.zeros(4, np.float32)
    for number in numbers:
        z = w["embedding.embeddings"][number] @ w["lstm.kernel"] + h @ w["lstm.recurrent_kernel"] + w["lstm.bias"]
        i, f, g, o = np.split(z, 4)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
    seen = np.maximum(photo @ w["photo.kernel"] + w["photo.bias"], 0)
    merged = np.maximum((seen + h) @ w["dense.kernel"] + w["dense.bias"], 0)
    logits = merged @ w["output.kernel"] + w["output.bias"]
    exponentials = np.exp(logits - logits.max())
    return np.asarray(exponentials / exponentials.sum(), np.float32)


@pytest.mark.parametrize("oov", [None, "dog"])
def test_the_decoder_gives_keras_probabilities(tmp_path: Path, oov: str | None) -> None:
    paths = write(tmp_path, saved_model(), tokenizer_json(oov_token=oov))
    model, tokenizer = read_keras_model(paths[0]), read_tokenizer(paths[1])
    vocabulary, classes = model.vocabulary(tokenizer)
    assert classes[PAD] == 0 and classes[BOS] == 1 and classes[EOS] == 2
    assert sorted(classes) == list(range(7))
    assert vocabulary.unknown == ("drop" if oov is None else "token")
    assert [WORDS[number - 1] for number in classes[vocabulary.first_word :]] == list(vocabulary.words)
    decoder = build_decoder(model.config, (1, 4096), len(vocabulary))
    decoder.load_state_dict(model.convert(tokenizer)[1])
    photo = np.random.default_rng(4).random((1, 1, 4096), np.float32) / 100
    words = torch.tensor([BOS, 4, 5, 4])
    with torch.inference_mode():
        ours = decoder.eval().logits(torch.from_numpy(photo), None, words, [1] * 4).softmax(1).numpy()
    for end in range(1, 5):
        theirs = keras_probabilities(model, photo[0, 0], [classes[word] for word in words[:end]])
        assert np.allclose(ours[end - 1], theirs[classes], atol=1e-5)


def setting(layer: str, **values: object) -> Change:
    return lambda layers, weights: layers[layer].update(values)


def without(layer: str) -> Change:
    """The layer is left out; what has read it reads what it has read."""

    def change(layers: dict[str, Any], weights: dict[str, Any]) -> None:
        gone = layers.pop(layer)
        for other in layers.values():
            other["from"] = [source for name in other["from"] for source in (gone["from"] if name == layer else [name])]

    return change


def reshaped(name: str, *shape: int) -> Change:
    return lambda layers, weights: weights.update({name: np.ones(shape, np.float32)})


OTHERS: dict[str, tuple[Change, str]] = {
    "concatenated": (setting("added", kind="Concatenate"), "'added' is Concatenate where a layer of the kind Add"),
    "three added": (lambda layers, _: layers["added"]["from"].append("photo_in"), "with 3 inputs"),
    "a GRU": (setting("lstm", kind="GRU"), "where a layer of the kind"),
    "hard gates": (setting("lstm", recurrent_activation="hard_sigmoid"), "recurrent_activation = hard_sigmoid, not"),
    "backwards": (setting("lstm", go_backwards=True), "with go_backwards = True"),
    "no mask": (setting("embedding", mask_zero=False), "with mask_zero = False, not True"),
    "tanh": (setting("hidden", activation="tanh"), "'hidden' is Dense with activation = tanh, not relu"),
    "an activation of one's own": (setting("photo", activation={"class_name": "f"}), "with activation = {'class_name'"),
    "no softmax": (setting("output", activation="linear"), "with activation = linear, not softmax"),
    "no bias": (setting("photo", use_bias=False), "with use_bias = False"),
    "normalised": (setting("photo_drop", kind="BatchNormalization"), "'photo_drop' is BatchNormalization where"),
    "no hidden layer": (without("hidden"), "'added' is Add where a layer of the kind Dense should be"),
    "other widths": (setting("photo", units=5), "'photo' is Dense of 5 units, where the LSTM has 4"),
    "other words": (setting("embedding", input_dim=9), "of 9 words, where the softmax has 7"),
    "pictures": (setting("photo_in", shape=[224, 224, 3]), "'photo_in' is InputLayer of shape"),
    "any length": (setting("words_in", shape=None), "'words_in' is InputLayer of shape [None, None]"),
    "too wide": (lambda layers, _: [layers[name].update(units=10**6) for name in ("photo", "hidden", "lstm")],
                 "lstm_units 1000000: input should be less than"),
    "a width that is no number": (setting("lstm", units="4"), "'lstm' is LSTM with units = 4"),
    "truth for a width": (setting("lstm", units=True), "with units = True"),
    "a circle": (setting("photo_drop", **{"from": ["photo_drop"]}), "a circle of layers"),
    "an unknown source": (setting("lstm", **{"from": ["nothing"]}), "no layer 'nothing'"),
    "dropout before the sum": (
        lambda layers, _: layers["added"].update({"from": ["words_drop", "photo"]}), "where a layer of the kind"
    ),
    "a kernel of another shape": (reshaped("lstm/kernel", 3, 15), "the kernel of layer 'lstm' is missing or has"),
    "a kernel missing": (lambda _, weights: weights.pop("hidden/kernel"), "the kernel of layer 'hidden' is missing"),
    "a layer's weights missing": (
        lambda _, weights: [weights.pop(f"photo/{kind}") for kind in ("kernel", "bias")], "layer 'photo' is missing"
    ),
    "values that are not finite": (
        lambda _, weights: weights["output/bias"].fill(np.nan), "the bias of layer 'output' is not finite"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("form", FORMS)
def test_other_networks_are_refused(tmp_path: Path, name: str, form: Form) -> None:
    change, says = OTHERS[name]
    said = refusal(tmp_path, saved_model(form, change=change))
    assert says in said
    if not name.startswith(("a kernel", "a layer's", "values")):
        assert "another architecture" in said and "needed is the tutorial's network" in said


def test_files_that_are_no_models_are_refused(tmp_path: Path) -> None:
    assert "neither HDF5 nor a .keras archive" in refusal(tmp_path, b"words")
    good, archive = saved_model(), saved_model("keras")
    for end in (0, 100, 3000, -300):
        refusal(tmp_path, good[:end])
        refusal(tmp_path, archive[:end])
    assert "invalid JSON" in refusal(
        tmp_path, good.replace(b'"class_name": "Functional"', b'"class_name": Functional "')
    )
    assert "a model of the kind Sequential" in refusal(
        tmp_path, good.replace(b'"Functional", "config": {"layers"', b'"Sequential", "config": {"stages"')
    )
    path = tmp_path / "model.h5"
    with h5py.File(path, "w") as file:
        file["x"] = np.ones(3)
    assert "weights without their network" in refusal(tmp_path, path.read_bytes())
    path.unlink()
    with pytest.raises(InputError, match="no such model"):
        read_keras_model(path)


def test_a_model_that_leads_elsewhere_is_refused(tmp_path: Path) -> None:
    path, _ = write(tmp_path, saved_model())
    other = tmp_path / "other.h5"
    other.write_bytes(path.read_bytes())
    for link in (h5py.ExternalLink(str(other), "/model_weights/lstm"), h5py.SoftLink("/model_weights/hidden")):
        with h5py.File(path, "r+") as file:
            del file["model_weights/lstm"]
            file["model_weights/lstm"] = link
        assert "layer 'lstm' is missing" in refusal(tmp_path, path.read_bytes())


def test_a_model_that_swells_is_refused(tmp_path: Path) -> None:
    path, _ = write(tmp_path, saved_model())
    for options in ({"compression": "gzip"}, {"chunks": (1000, 1000)}):
        with h5py.File(path, "r+") as file:
            del file["model_weights/photo/photo/kernel"]
            group = file["model_weights/photo/photo"]
            group.create_dataset("kernel", (10**4, 10**4), "f4", **options)
        refusal(tmp_path, path.read_bytes())

    def change(layers: dict[str, Any], weights: dict[str, Any]) -> None:
        layers["photo_in"]["shape"] = 2**31 - 1

    assert "another shape than (2147483647, 4)" in refusal(tmp_path, saved_model(change=change))
    with h5py.File(path, "w") as file:  # an array of that shape, never written
        file["model_weights/photo/photo/bias"] = np.ones(4, np.float32)
        file["model_weights/photo/photo"].create_dataset("kernel", (2**31 - 1, 4), "f4")
        with h5py.File(tmp_path / "other.h5", "w") as source:
            source.attrs["x"] = 1
        config = saved_model(change=change)
        start = config.index(b'{"class_name": "Functional"')
        text, _ = json.JSONDecoder().raw_decode(config[start:].decode("latin-1"))
        file.attrs["model_config"] = json.dumps(text)
    assert "not all values of /model_weights/photo/photo/kernel are there" in refusal(tmp_path, path.read_bytes())


@pytest.mark.parametrize(
    ("tokenizer", "says"),
    [
        (tokenizer_json(WORDS[:-1]), "the model knows 6 words, the tokenizer 5"),
        (tokenizer_json((*WORDS, "cat")), "the model knows 6 words, the tokenizer 7"),
        (tokenizer_json(("start", *WORDS[1:])), "no word 'startseq'"),
        (tokenizer_json((*WORDS[:-1], "the dog")), "the word 'the dog', which has a blank"),
        (tokenizer_json((*WORDS[:-1], "")), "the word '', which has a blank"),
    ],
)
def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path, tokenizer: str, says: str) -> None:
    paths = write(tmp_path, saved_model(), tokenizer)
    with pytest.raises(InputError, match="tokenizer that the model was trained with") as fault:
        read_keras_model(paths[0]).convert(read_tokenizer(paths[1]))
    assert says in str(fault.value)


def test_a_tokenizer_with_num_words_may_know_more(tmp_path: Path) -> None:
    model = model_of(tmp_path, saved_model())
    index = {word: number for number, word in enumerate((*WORDS, "cat", "cow"), start=1)}
    assert model.vocabulary(TokenizerRecord(index, 7, None))[0].words == WORDS[2:]
    with pytest.raises(InputError, match="the model knows 6 words, the tokenizer 8"):
        model.vocabulary(TokenizerRecord(index, None, None))


def test_words_that_cleaning_drops_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = model_of(tmp_path, saved_model())
    index = {word: number for number, word in enumerate((*WORDS[:-1], "a"), start=1)}
    assert "a" in model.vocabulary(TokenizerRecord(index, None, None))[0].words
    assert "1 of the tokenizer's words, such as 'a', are none by the tutorial's cleaning" in caplog.text
