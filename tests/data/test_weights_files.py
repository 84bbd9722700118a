"""Files of VGG16's weights in every form that people have: the same net is the same encoder; the rest is one line."""

import hashlib
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from capexp.data import vgg16_weights
from capexp.data.vgg16 import encoder_at_hand, identify, load_encoder
from capexp.data.vgg16_weights import NETS, published_file
from capexp.errors import InputError
from capexp.settings import FeaturesConfig, Layer, NetSetting

State = dict[str, Tensor]
Arrays = Mapping[str, tuple[Tensor, Tensor]]
"""Keras's kernel and bias of each layer, by its name: (height, width, in, out), (in, out) if dense, and (out,)."""

BLOCKS = [f"block{block}_conv{i}" for block, count in enumerate((2, 2, 3, 3, 3), 1) for i in range(1, count + 1)]
MODULES = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)  # torchvision's numbers of the convolutions
CAFFE, TORCHVISION = NETS["KERAS"], NETS["IMAGENET1K_V1"]
KNOWN = "c49d5d31a6c9b637"  # the key of the Caffe net's conv5_3, averaged


def read_state(path: Path) -> State:
    state: State = torch.load(path, weights_only=True)
    return state


def as_keras(state: State) -> dict[str, tuple[Tensor, Tensor]]:
    """Convolutions by torchvision's names, in RGB order, as Keras has them: in BGR order."""
    arrays = {
        block: (state[f"features.{module}.weight"].permute(2, 3, 1, 0), state[f"features.{module}.bias"])
        for block, module in zip(BLOCKS, MODULES, strict=True)
    }
    kernel, bias = arrays["block1_conv1"]
    return arrays | {"block1_conv1": (kernel.flip(2), bias)}


def dense_layers() -> dict[str, tuple[Tensor, Tensor]]:
    """Random fully connected layers of Keras, of values that float16 holds."""
    generator = torch.Generator().manual_seed(7)

    def draw(*shape: int, scale: float) -> Tensor:
        return torch.empty(shape).normal_(0, scale, generator=generator).half()

    return {
        "fc1": (draw(25088, 4096, scale=0.01), draw(4096, scale=0.1)),
        "fc2": (draw(4096, 4096, scale=0.02), draw(4096, scale=0.1)),
    }


KERAS_FORMS: dict[str, Callable[[str, int], tuple[str, str]]] = {
    "published": lambda layer, _: (f"{layer}/{layer}_W_1:0", f"{layer}/{layer}_b_1:0"),
    "Keras 2": lambda layer, _: (f"{layer}/{layer}/kernel:0", f"{layer}/{layer}/bias:0"),
    "Keras 3 in the old form": lambda layer, _: (f"{layer}/{layer}/kernel", f"{layer}/{layer}/bias"),
    "a whole model": lambda layer, _: (
        f"model_weights/{layer}/{layer}/kernel",
        f"model_weights/{layer}/{layer}/bias",
    ),
    "Keras 3": lambda layer, i: (
        f"layers/{numbered(layer, i)}/vars/0",
        f"layers/{numbered(layer, i)}/vars/1",
    ),
}  # the paths of kernel and bias, from a layer's name and its number


def numbered(layer: str, i: int) -> str:
    """The name of a layer by its class, as Keras 3 numbers them."""
    kind, number = ("conv2d", i) if i < 13 else ("dense", i - 13)
    return f"{kind}_{number}" if number else kind


def write_keras(path: Path, arrays: Arrays, form: str = "published", kind: str = "f4", **options: Any) -> Path:
    with h5py.File(path, "w") as file:
        file.attrs["layer_names"] = [layer.encode() for layer in arrays]
        for i, (layer, pair) in enumerate(arrays.items()):
            for name, values in zip(KERAS_FORMS[form](layer, i), pair, strict=True):
                chosen = options if values.dim() > 1 else {}
                file.create_dataset(name, data=values.numpy().astype(kind), **chosen)
    return path


def write_torch(path: Path, state: Mapping[str, Tensor]) -> Path:
    torch.save(OrderedDict(state), path)
    return path


def in_bgr(state: State) -> State:
    return state | {"features.0.weight": state["features.0.weight"].flip(1)}


def renamed(state: State) -> State:
    """The same tensors by names of one's own, in the same order."""
    return {f"net.part{i // 2}.{'wb'[i % 2]}": value for i, value in enumerate(state.values())}


def small_dense(first: int) -> State:
    """Fully connected layers that are too small to be VGG16's, numbered from one; conv5_3 does not read them."""
    return {f"classifier.{first}.weight": torch.zeros(3, 2), f"classifier.{first}.bias": torch.zeros(3)}


def config(path: Path, layer: Layer = "conv5_3", net: NetSetting = "auto") -> FeaturesConfig:
    return FeaturesConfig(layer=layer, pool="mean" if layer == "conv5_3" else "none", weights=str(path), net=net)


def refusal(path: Path, layer: Layer = "conv5_3", net: NetSetting = "auto") -> str:
    with pytest.raises(InputError) as caught:
        load_encoder(config(path, layer, net))
    (line,) = str(caught.value).splitlines()
    assert str(path) in line
    return line


# The same net is the same encoder.


@pytest.mark.parametrize("form", KERAS_FORMS)
def test_keras_convolutions_of_the_caffe_net_are_the_known_encoder(vgg16: Path, tmp_path: Path, form: str) -> None:
    path = write_keras(tmp_path / "renamed.bin", as_keras(read_state(vgg16)), form)
    identity = identify(config(path))
    assert identity.key() == KNOWN
    assert identity.weights_digest == NETS["IMAGENET1K_FEATURES"].digests["conv5_3"]


TORCH_FORMS: dict[str, Callable[[State], State]] = {
    "convolutions": lambda state: state,
    "convolutions in BGR": in_bgr,
    "the Caffe net": lambda state: in_bgr(state) | small_dense(1),
    "the Caffe net, numbered as torchvision's": lambda state: in_bgr(state) | small_dense(0),
    "the Caffe net, renamed": lambda state: renamed(in_bgr(state) | small_dense(1)),
    "in RGB, renamed": lambda state: renamed(state | small_dense(1)),
    "renamed, after other values": lambda state: {"mean": torch.zeros(3)} | renamed(state),
    "in float32": lambda state: {name: value.float() for name, value in state.items()} | small_dense(1),
}


@pytest.mark.parametrize("form", TORCH_FORMS)
def test_pytorch_files_of_the_caffe_net_are_the_known_encoder(vgg16: Path, tmp_path: Path, form: str) -> None:
    path = write_torch(tmp_path / "renamed.bin", TORCH_FORMS[form](read_state(vgg16)))
    assert identify(config(path)).key() == KNOWN


def plain_fc2(arrays: Arrays, photos: list[NDArray[np.uint8]]) -> Tensor:
    """fc2 as Keras computes it from photos in RGB, (B, 4096): in BGR, and with the grid's channels last."""
    mean = torch.tensor((103.939, 116.779, 123.68))
    x = (torch.from_numpy(np.stack(photos)).flip(3).float() - mean).permute(0, 3, 1, 2)
    for block in range(1, 6):
        for layer in (name for name in BLOCKS if name.startswith(f"block{block}_")):
            kernel, bias = arrays[layer]
            x = nn.functional.conv2d(x, kernel.float().permute(3, 2, 0, 1), bias.float(), padding=1).relu()
        x = nn.functional.max_pool2d(x, 2)
    x = x.permute(0, 2, 3, 1).flatten(1)  # (B, 25088), channels last
    for layer in ("fc1", "fc2"):
        kernel, bias = arrays[layer]
        x = (x @ kernel.float() + bias.float()).relu()
    return x


@pytest.fixture
def keras_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home of Keras, and nothing may be fetched."""
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
    monkeypatch.setenv("CAPEXP_OFFLINE", "1")
    (tmp_path / "keras" / "models").mkdir(parents=True)
    return tmp_path / "keras"


@pytest.mark.slow
def test_fc2_of_the_caffe_net_is_the_same_from_every_form_and_equals_keras(
    vgg16: Path, scenes: Path, tmp_path: Path, keras_home: Path
) -> None:
    state = read_state(vgg16)
    arrays = as_keras(state) | dense_layers()
    photos = [np.asarray(Image.open(path).convert("RGB").resize((224, 224))) for path in scenes.glob("*/*01.jpg")][:2]
    expected = plain_fc2(arrays, photos)
    # Keras's own file, where Keras keeps it.
    by_name = FeaturesConfig(layer="fc2", weights="KERAS")
    write_keras(keras_home / "models" / CAFFE.file, arrays)
    encoder = load_encoder(by_name).prepare(torch.device("cpu"), "float32")
    identity = encoder.identity
    assert (identity.mean, identity.std) == (CAFFE.mean, CAFFE.std)
    features = torch.from_numpy(encoder.encode(photos))
    assert float(expected.max()) > 1
    torch.testing.assert_close(features[:, 0].float(), expected, rtol=2**-9, atol=float(expected.max()) / 1000)
    del encoder
    assert identify(FeaturesConfig(layer="conv5_3", pool="mean", weights="KERAS")).key() == KNOWN
    (keras_home / "models" / CAFFE.file).unlink()
    # Keras's other forms, under any path.
    for form in list(KERAS_FORMS)[1:]:
        path = write_keras(tmp_path / "weights", arrays, form, "f2")
        assert identify(config(path, "fc2")).key() == identity.key(), form
    # PyTorch's, with all the names that people give them.
    fc1, fc2 = arrays["fc1"], arrays["fc2"]
    dense = [
        *(fc1[0].view(7, 7, 512, 4096).permute(3, 2, 0, 1).flatten(1).contiguous(), fc1[1]),
        *(fc2[0].T.contiguous(), fc2[1]),
        *(torch.zeros(1000, 4096, dtype=torch.half), torch.zeros(1000, dtype=torch.half)),
    ]
    del arrays
    for names in ("146", ("fc6", "fc7", "fc8")):
        layers = [name if len(name) > 1 else f"classifier.{name}" for name in names]
        parameters = [f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")]
        whole = in_bgr(state) | dict(zip(parameters, dense, strict=True))
        assert identify(config(write_torch(tmp_path / "weights", whole), "fc2")).key() == identity.key(), names
    assert identify(config(write_torch(tmp_path / "weights", renamed(whole)), "fc2")).key() == identity.key()


# Which net an unknown file holds must be said.

UNKNOWN: dict[str, Callable[[Path, State], Path]] = {
    "Keras's form": lambda path, state: write_keras(path, as_keras(state)),
    "with fully connected layers": lambda path, state: write_torch(path, state | small_dense(0)),
    "the Caffe net's names": lambda path, state: write_torch(path, in_bgr(state) | small_dense(1)),
    "other names": lambda path, state: write_torch(path, renamed(state)),
}


@pytest.mark.parametrize("form", UNKNOWN)
def test_an_unknown_net_is_refused_until_it_is_named(random_vgg16: Path, tmp_path: Path, form: str) -> None:
    state = read_state(random_vgg16)
    path = UNKNOWN[form](tmp_path / "weights", state)
    line = refusal(path)
    assert "an unknown net" in line and "set features.net = 'caffe'" in line and "'torchvision'" in line
    encoder = load_encoder(config(path, net="caffe"))
    assert (encoder.identity.mean, encoder.identity.std) == (CAFFE.mean, CAFFE.std)
    assert torch.equal(encoder.weights()["convolutions.0.weight"], state["features.0.weight"]), "in RGB order"
    assert encoder.identity.key() == identify(config(random_vgg16)).key()


def test_a_net_named_torchvision_has_its_preprocessing_and_reads_rgb(random_vgg16: Path, tmp_path: Path) -> None:
    state = read_state(random_vgg16)
    path = write_torch(tmp_path / "whole.pth", state | small_dense(0))
    encoder = load_encoder(config(path, net="torchvision"))
    assert (encoder.identity.mean, encoder.identity.std) == (TORCHVISION.mean, TORCHVISION.std)
    ported = write_keras(tmp_path / "ported.h5", as_keras(in_bgr(state)))
    assert identify(config(ported, net="torchvision")).key() == encoder.identity.key()


def test_convolutions_alone_are_those_of_the_caffe_net_as_before(random_vgg16: Path, tmp_path: Path) -> None:
    identity = identify(config(random_vgg16))
    assert (identity.mean, identity.std) == (CAFFE.mean, CAFFE.std)
    state = read_state(random_vgg16)
    # Torchvision's file of them has fully connected layers of NaN.
    nan = {name: torch.full_like(value, torch.nan) for name, value in small_dense(0).items()}
    path = write_torch(tmp_path / "features.pth", state | nan)
    assert identify(config(path)).key() == identity.key()
    assert "holds no fully connected layers" in refusal(path, "fc2")


def test_a_published_file_is_recognised_by_its_bytes(
    random_vgg16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = read_state(random_vgg16)
    path = write_torch(tmp_path / "any-name.bin", state | small_dense(0))
    prefix = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    monkeypatch.setitem(vgg16_weights._PUBLISHED, prefix, "torchvision")
    assert identify(config(path)).std == TORCHVISION.std
    keras = write_keras(tmp_path / "any-name.h5", as_keras(state))
    monkeypatch.setitem(vgg16_weights._PUBLISHED, hashlib.md5(keras.read_bytes()).hexdigest(), "caffe")
    assert identify(config(keras)).key() == identify(config(random_vgg16)).key()


def test_a_net_that_the_weights_are_not_is_refused(vgg16: Path, tmp_path: Path) -> None:
    line = refusal(vgg16, net="torchvision")
    assert "the Caffe net, where features.net is 'torchvision'; leave features.net out" in line
    assert identify(config(vgg16, net="caffe")).key() == KNOWN
    for name, net in (("KERAS", "torchvision"), ("IMAGENET1K_FEATURES", "torchvision"), ("IMAGENET1K_V1", "caffe")):
        with pytest.raises(InputError, match=rf"features\.net = '{net}': {name} is the"):
            identify(FeaturesConfig.model_validate({"layer": "conv5_3", "weights": name, "net": net}))


# What is no such file is refused in one line.


def zeros() -> dict[str, tuple[Tensor, Tensor]]:
    """Convolutions of zeros, as Keras has them."""
    return as_keras({f"features.{name}": value for name, value in zeros_of("D").items()})


def zeros_of(letter: str, batch_norm: bool = False) -> State:
    """The state of the convolutions of one of VGG's nets, by its letter in the paper, all zeros."""
    import torchvision

    with torch.device("meta"):
        layers: nn.Sequential = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs[letter], batch_norm)
    return {name: torch.zeros(value.shape) for name, value in layers.state_dict().items()}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file in Keras's form that is read, of zeros in float16."""
    path = write_keras(tmp_path_factory.mktemp("good") / "good.h5", zeros(), kind="f2")
    load_encoder(config(path, net="caffe"))
    return path


def changed(good: Path, path: Path, change: Callable[[h5py.File], object]) -> Path:
    """A copy of a good file, changed."""
    path.write_bytes(good.read_bytes())
    with h5py.File(path, "r+") as file:
        change(file)
    return path


KERNEL = "block1_conv1/block1_conv1_W_1:0"


def replaced(**options: Any) -> Callable[[h5py.File], object]:
    def change(file: h5py.File) -> None:
        del file[KERNEL]
        file.create_dataset(KERNEL, **options)

    return change


def linked(link: object) -> Callable[[h5py.File], object]:
    def change(file: h5py.File) -> None:
        del file[KERNEL]
        file[KERNEL] = link

    return change


def linked_group(link: object) -> Callable[[h5py.File], object]:
    def change(file: h5py.File) -> None:
        del file["block1_conv1"]
        file["block1_conv1"] = link

    return change


def virtual(file: h5py.File) -> None:
    layout = h5py.VirtualLayout((3, 3, 3, 64), "f4")
    layout[:] = h5py.VirtualSource("other.h5", "x", (3, 3, 3, 64))
    del file[KERNEL]
    file.create_virtual_dataset(KERNEL, layout)


def circular(file: h5py.File) -> None:
    group = file["block1_conv1"]
    for i in range(100):
        group[f"again{i:03d}"] = group  # before the kernel's name


SHAPE = (3, 3, 3, 64)
CHANGES: dict[str, tuple[Callable[[h5py.File], object], str]] = {
    "no kernel": (lambda file: file.pop(KERNEL), "block1_conv1's kernel is missing or has another shape"),
    "no layer": (lambda file: file.pop("block3_conv2"), "block3_conv2's kernel is missing"),
    "not Keras's": (lambda file: file.pop("block1_conv1"), "an HDF5 file without Keras's group block1_conv1"),
    "kernels of Theano": (replaced(shape=SHAPE[::-1], dtype="f4"), "has another shape"),
    "a huge claim": (replaced(shape=(2**20, 2**20, 3, 64), dtype="f4", chunks=(64, 64, 3, 64)), "has another shape"),
    "whole numbers": (replaced(data=np.zeros(SHAPE, "i4")), "block1_conv1's kernel is missing"),
    "text": (replaced(data=b"kernel"), "block1_conv1's kernel is missing"),
    "NaN": (replaced(data=np.full(SHAPE, np.nan, "f4")), "convolutions.0.weight holds values that are not finite"),
    "infinite in float16": (replaced(data=np.full(SHAPE, 1e9, "f4")), "are not finite"),
    "never written": (replaced(shape=SHAPE, dtype="f4"), f"not all values of /{KERNEL} are there"),
    "one chunk never written": (replaced(shape=SHAPE, dtype="f4", chunks=(3, 3, 3, 32)), "not all values of"),
    "compressed": (replaced(data=np.zeros(SHAPE, "f4"), compression="gzip"), "is compressed, virtual or in another"),
    "in another file": (replaced(shape=SHAPE, dtype="f4", external="other.bin"), "is compressed, virtual or in anot"),
    "virtual": (virtual, "is compressed, virtual or in another file"),
    "a soft link": (linked(h5py.SoftLink("/block1_conv2")), "block1_conv1's kernel is missing"),
    "an external link": (linked(h5py.ExternalLink("other.h5", "/x")), "block1_conv1's kernel is missing"),
    "an external group": (linked_group(h5py.ExternalLink("other.h5", "/")), "without Keras's group block1_conv1"),
    "a link to itself": (linked_group(h5py.SoftLink("block1_conv1")), "without Keras's group block1_conv1"),
    "circular": (circular, "block1_conv1's kernel is missing"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_keras_file_that_is_not_as_it_should_be_is_refused(
    good: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.bin").write_bytes(bytes(4 * 3 * 3 * 3 * 64))
    write_keras(tmp_path / "other.h5", zeros())
    change, says = CHANGES[name]
    assert says in refusal(changed(good, tmp_path / "weights.h5", change), net="caffe")


def test_chunks_and_other_floats_are_read(good: Path, tmp_path: Path) -> None:
    key = identify(config(good, net="caffe")).key()
    others: list[tuple[str, dict[str, Any]]] = [
        *(("f4", {"chunks": (3, 3, 3, 32)}), (">f8", {}), ("f2", {}), ("f4", {"maxshape": (None, 3, 3, 64)})),
    ]
    for kind, options in others:
        kernel = np.zeros(SHAPE, kind)
        path = changed(good, tmp_path / "weights.h5", replaced(data=kernel, **options))
        assert identify(config(path, net="caffe")).key() == key, options


@pytest.mark.parametrize("kept", [0.0001, 0.001, 0.5, 0.9999])
def test_a_keras_file_cut_short_is_refused(good: Path, tmp_path: Path, kept: float) -> None:
    content = good.read_bytes()
    (tmp_path / "cut.h5").write_bytes(content[: int(kept * len(content))])
    assert "a damaged HDF5 file" in refusal(tmp_path / "cut.h5")


def test_fc2_of_convolutions_alone_is_refused(good: Path, random_vgg16: Path) -> None:
    for path in (good, random_vgg16):
        line = refusal(path, "fc2", "caffe")
        assert "holds no fully connected layers" in line and "KERAS" in line and "conv5_3" in line


def test_fully_connected_layers_of_another_shape_are_refused(good: Path, random_vgg16: Path, tmp_path: Path) -> None:
    keras = changed(
        good, tmp_path / "small.h5", lambda file: file.create_dataset("fc1/fc1_W_1:0", data=np.zeros((4, 4)))
    )
    assert "fc1's kernel is missing or has another shape" in refusal(keras, "fc2", "caffe")
    torch_file = write_torch(tmp_path / "small.pth", read_state(random_vgg16) | small_dense(0))
    assert "dense.0.weight is missing or has another shape" in refusal(torch_file, "fc2", "caffe")


@pytest.mark.parametrize(("letter", "batch_norm"), [("A", False), ("B", False), ("E", False), ("D", True)])
@pytest.mark.parametrize("prefix", ["features.", "my."])
def test_another_net_is_refused_by_any_names(tmp_path: Path, letter: str, batch_norm: bool, prefix: str) -> None:
    state = {f"{prefix}{name}": value.half() for name, value in zeros_of(letter, batch_norm).items()}
    assert "not VGG16's weights" in refusal(write_torch(tmp_path / "other.pth", state), net="caffe")


def test_tensors_that_are_no_plain_ones_are_refused(random_vgg16: Path, tmp_path: Path) -> None:
    state = read_state(random_vgg16)
    kernel = state["features.0.weight"]
    sparse = kernel.to_sparse_coo()  # type: ignore[no-untyped-call]
    for other in (sparse, kernel.int(), kernel.to("meta"), kernel.to(torch.complex64)):
        path = write_torch(tmp_path / "other.pth", state | {"features.0.weight": other})
        assert "not VGG16's weights (convolutions.0.weight" in refusal(path)


def test_without_h5py_the_line_says_how_to_install_it(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "h5py", None)  # an import of it now fails
    with pytest.raises(ModuleNotFoundError) as caught:
        import h5py  # noqa: F401
    assert caught.value.name == "h5py"
    assert "pip install h5py" in refusal(good)


# Keras's own file is where Keras keeps it, or is fetched to there.


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that is served, at the address of Keras's file."""
    served = tmp_path / "served"
    served.mkdir()

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(served))) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{http.server_port}/{CAFFE.file}"
        digest = hashlib.md5(b"weights").hexdigest()
        net = vgg16_weights.Net(CAFFE.file, "caffe", {}, url, digest)
        monkeypatch.setitem(NETS, "KERAS", net)
        yield served
        http.shutdown()


def test_kerass_file_is_fetched_to_kerass_folder_once_its_digest_is_right(
    server: Path, keras_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keras = FeaturesConfig(layer="fc2", weights="KERAS")
    path = published_file("KERAS")
    assert path == keras_home / "models" / CAFFE.file
    with pytest.raises(InputError, match="CAPEXP_OFFLINE forbids fetching"):
        load_encoder(keras)
    monkeypatch.delenv("CAPEXP_OFFLINE")
    with pytest.raises(InputError, match=r"cannot be fetched \(HTTP Error 404.*put it at .*models"):
        load_encoder(keras)
    (server / CAFFE.file).write_bytes(b"altered")
    with pytest.raises(InputError, match=r"cannot be fetched \(MD5 .*, expected"):
        load_encoder(keras)
    assert not list(path.parent.iterdir()) and not encoder_at_hand(keras)
    (server / CAFFE.file).write_bytes(b"weights")
    with pytest.raises(InputError, match="damaged, or holds more than tensors"):  # fetched, and read
        load_encoder(keras)
    assert path.read_bytes() == b"weights" and encoder_at_hand(keras)
    assert list(path.parent.iterdir()) == [path]


def test_keras_keeps_its_file_in_the_home_folder_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KERAS_HOME", raising=False)
    monkeypatch.setenv("HOME", "/home/me")
    assert published_file("KERAS") == Path("/home/me/.keras/models/vgg16_weights_tf_dim_ordering_tf_kernels.h5")
