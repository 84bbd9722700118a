"""VGG16's features: equal to a plain torchvision forward, of the recorded weights, and of nothing unsafe."""

import os
import pickle
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import ValidationError
from torch import Tensor, nn

from capexp.data.photo_transform import MIRROR, PHOTO, PhotoTransform, crop_view
from capexp.data.vgg16 import EncoderIdentity, encoder_at_hand, identify, load_encoder
from capexp.data.vgg16_weights import NETS
from capexp.errors import InputError
from capexp.settings import FeaturesConfig, PhotoResize, Pool, Precision

OXFORD_MEAN = (123.68, 116.779, 103.939)
CPU = torch.device("cpu")


@cache
def two_photos(folder: Path, size: int = 224) -> list[NDArray[np.uint8]]:
    """Two of the embedded photos as VGG16 takes them, (size, size, 3)."""
    images = [Image.open(path).convert("RGB") for path in sorted(folder.glob("*/*.jpg"))[:2]]
    return [np.asarray(image.resize((size, size), Image.Resampling.BILINEAR)) for image in images]


@cache
def plain_grid(weights: Path, folder: Path, size: int = 224) -> Tensor:
    """conv5_3 after ReLU of the two photos, (2, 512, side, side), by torchvision's layers alone, in float32."""
    import torchvision

    vgg = torchvision.models.vgg
    net: nn.Sequential = vgg.make_layers(vgg.cfgs["D"])
    state = torch.load(weights, weights_only=True)
    net.load_state_dict({name.removeprefix("features."): value.float() for name, value in state.items()})
    photos = torch.from_numpy(np.stack(two_photos(folder, size))).float()  # (2, size, size, 3)
    with torch.inference_mode():
        grid: Tensor = net[:30]((photos - torch.tensor(OXFORD_MEAN)).permute(0, 3, 1, 2))
    return grid


def pooled(grid: Tensor, pool: Pool) -> Tensor:
    """A grid (B, 512, side, side) as features (B, P, 512), the long way round."""
    cells = grid.permute(0, 2, 3, 1)  # (B, side, side, 512)
    if pool in ("max2", "max3"):
        across = int(pool[-1])
        left = cells.shape[1] // across
        cells = cells.reshape(-1, left, across, left, across, 512).amax((2, 4))
    flat = cells.reshape(len(grid), -1, 512)
    return flat.mean(1, keepdim=True) if pool == "mean" else flat


def encoded(
    weights: str, pool: Pool, precision: Precision, photos: list[NDArray[np.uint8]], size: int = 224
) -> NDArray[np.float16]:
    config = FeaturesConfig(layer="conv5_3", pool=pool, size=size, weights=weights)
    return load_encoder(config).prepare(CPU, precision).encode(photos)


def test_published_weights_have_the_file_names_that_torchvision_gives_them() -> None:
    import torchvision

    for name in ("IMAGENET1K_V1", "IMAGENET1K_FEATURES"):
        assert NETS[name].file == Path(torchvision.models.VGG16_Weights[name].url).name


@pytest.mark.parametrize(
    ("pool", "size", "positions"),
    [
        ("max2", 224, 49),
        ("none", 96, 36),
        *(
            pytest.param(*values, marks=pytest.mark.slow)
            for values in (("mean", 224, 1), ("none", 224, 196), ("max3", 336, 49), ("mean", 336, 1))
        ),
    ],
)
def test_features_equal_a_plain_torchvision_forward(
    vgg16: Path, scenes: Path, pool: Pool, size: int, positions: int
) -> None:
    features = encoded(str(vgg16), pool, "float32", two_photos(scenes, size), size)
    assert features.dtype == np.float16 and features.shape == (2, positions, 512)
    assert FeaturesConfig(layer="conv5_3", pool=pool, size=size).shape == (positions, 512)
    expected = pooled(plain_grid(vgg16, scenes, size), pool)
    # float16 rounds by up to 2^-11; the rest allows for sums in another order.
    torch.testing.assert_close(torch.from_numpy(features).float(), expected, rtol=2**-10, atol=2e-3)
    assert float(expected.max()) > 10


@pytest.mark.slow
def test_bfloat16_stays_within_three_percent(vgg16: Path, scenes: Path) -> None:
    features = torch.from_numpy(encoded(str(vgg16), "mean", "bfloat16", two_photos(scenes))).float()
    expected = pooled(plain_grid(vgg16, scenes), "mean")
    error = float((features - expected).norm() / expected.norm())
    assert 0 < error < 0.03


def test_features_of_mirrored_photos_are_those_of_photos_turned_round(vgg16: Path, scenes: Path) -> None:
    photos = two_photos(scenes)
    encoder = load_encoder(FeaturesConfig(layer="conv5_3", weights=str(vgg16))).prepare(CPU, "float32").of_view(MIRROR)
    turned = [encoder.identity.photo_transform(Image.fromarray(photo)) for photo in photos]
    np.testing.assert_array_equal(turned, [photo[:, ::-1] for photo in photos])
    np.testing.assert_array_equal(encoder.encode(turned), encoded(str(vgg16), "none", "float32", turned))


def test_weights_digest_is_the_recorded_one_so_both_names_are_one_encoder(vgg16: Path) -> None:
    by_path = identify(FeaturesConfig(layer="conv5_3", pool="mean", weights=str(vgg16)))
    by_name = identify(FeaturesConfig(layer="conv5_3", pool="mean", weights="IMAGENET1K_FEATURES"))
    assert by_path.weights_digest == NETS["IMAGENET1K_FEATURES"].digests["conv5_3"]
    assert by_path.key() == by_name.key()


def test_float32_file_of_the_same_net_is_the_same_encoder(vgg16: Path, tmp_path: Path) -> None:
    state = {name: value.float() for name, value in torch.load(vgg16, weights_only=True).items()}
    torch.save(state, tmp_path / "float32.pth")
    state["features.28.bias"][0] += 1
    torch.save(state, tmp_path / "changed.pth")
    digests = [
        identify(FeaturesConfig(layer="conv5_3", weights=str(path))).weights_digest
        for path in (vgg16, tmp_path / "float32.pth", tmp_path / "changed.pth")
    ]
    assert digests[0] == digests[1] != digests[2]


def test_key_depends_on_all_that_decides_features_and_not_on_where_the_weights_lie() -> None:
    made = EncoderIdentity("conv5_3", "mean", OXFORD_MEAN, (1.0, 1.0, 1.0), "0" * 64, "a.pth")
    others = (
        replace(made, layer="fc2", pool="none"),
        replace(made, pool="max2"),
        replace(made, mean=(0.0, 0.0, 0.0)),
        replace(made, std=(2.0, 1.0, 1.0)),
        replace(made, weights_digest="1" * 64),
        replace(made, size=336),
        made.of_view(MIRROR),
        made.of_view(crop_view(1)),
        made.of_view(crop_view(2)),
        replace(made, transform="squash-nearest"),
        replace(made, transform="squash-nearest").of_view(MIRROR),
    )
    assert made.key() == replace(made, weights="b.pth").key()
    assert len({made.key(), *(other.key() for other in others)}) == 12


def test_keys_of_encoders_from_before_there_was_a_choice_of_resizing_are_the_same() -> None:
    """Caches and bundles that exist are found by these."""
    identity = identify(FeaturesConfig(layer="conv5_3", pool="mean", weights="IMAGENET1K_FEATURES"))
    assert (identity.key(), identity.of_view(MIRROR).key()) == ("c49d5d31a6c9b637", "5040383a03572e90")
    assert identity.of_view(crop_view(1)).key() == "59e26e077499050f"


@pytest.mark.parametrize("resize", ["bilinear", "nearest"])
def test_the_encoder_of_a_view_resizes_as_the_other(resize: PhotoResize) -> None:
    identity = identify(FeaturesConfig(layer="conv5_3", weights="IMAGENET1K_FEATURES", resize=resize))
    assert identity.photo_transform == PhotoTransform(224, resize)
    for view in (MIRROR, crop_view(1), crop_view(99)):
        other = identity.of_view(view)
        assert (other.view, other.photo_transform) == (view, PhotoTransform(224, resize, view))
        assert other.of_view(view) == other
        assert other.of_view(PHOTO) == identity


@pytest.mark.parametrize("transform", ["", "squash", "squash-nearest-crop0", "squash-nearest-turned", "crop1"])
def test_an_unknown_transform_is_refused(transform: str) -> None:
    with pytest.raises(ValueError, match=f"transform '{transform}' is unknown"):
        EncoderIdentity("conv5_3", "mean", OXFORD_MEAN, (1.0, 1.0, 1.0), "0" * 64, "a.pth", transform=transform)


def refusal(weights: str | Path) -> str:
    """The one line that refuses weights."""
    with pytest.raises(InputError) as caught:
        load_encoder(FeaturesConfig(layer="conv5_3", weights=str(weights)))
    (line,) = str(caught.value).splitlines()
    assert str(weights) in line
    return line


def test_missing_file_is_refused_with_the_names_there_are(tmp_path: Path) -> None:
    line = refusal(tmp_path / "missing.pth")
    assert "no such file" in line and all(name in line for name in NETS)


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.5, 0.9999])
def test_truncated_copy_is_refused(vgg16: Path, tmp_path: Path, kept: float) -> None:
    content = vgg16.read_bytes()
    (tmp_path / "cut.pth").write_bytes(content[: int(kept * len(content))])
    assert "damaged, or holds more than tensors" in refusal(tmp_path / "cut.pth")


def test_text_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.pth").write_text("<html>404</html>\n" * 50)
    assert "damaged, or holds more than tensors" in refusal(tmp_path / "text.pth")


class Trap:
    """Unpickled, it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("kind", ["pickle", "torch"])
def test_code_in_a_pickle_is_refused_and_never_run(tmp_path: Path, kind: str) -> None:
    path, made = tmp_path / "trap.pth", tmp_path / "made"
    state = {"features.0.weight": Trap(made)}
    if kind == "torch":
        torch.save(state, path)
    else:
        path.write_bytes(pickle.dumps(state, protocol=2))
    assert "damaged, or holds more than tensors" in refusal(path)
    assert not made.exists()
    torch.load(path, weights_only=False) if kind == "torch" else pickle.loads(path.read_bytes())
    assert made.exists()  # the trap was armed


def test_something_else_than_a_table_of_tensors_is_refused(tmp_path: Path) -> None:
    for held in ([torch.zeros(3)], {"epoch": 3}, torch.zeros(3)):
        torch.save(held, tmp_path / "other.pth")
        assert "no table of tensors" in refusal(tmp_path / "other.pth")


def test_another_net_is_refused(tmp_path: Path) -> None:
    import torchvision

    torch.save(torchvision.models.squeezenet1_1(weights=None).state_dict(), tmp_path / "squeezenet.pth")
    assert "not VGG16's weights (convolutions.2.weight" in refusal(tmp_path / "squeezenet.pth")


def test_net_without_its_last_layer_is_refused(vgg16: Path, tmp_path: Path) -> None:
    state = torch.load(vgg16, weights_only=True)
    del state["features.28.bias"]
    torch.save(state, tmp_path / "short.pth")
    assert "convolutions.28.bias is missing" in refusal(tmp_path / "short.pth")


def test_weights_that_are_not_finite_are_refused(vgg16: Path, tmp_path: Path) -> None:
    state = torch.load(vgg16, weights_only=True)
    state["features.28.bias"][3] = torch.nan
    torch.save(state, tmp_path / "nan.pth")
    assert "convolutions.28.bias holds values that are not finite" in refusal(tmp_path / "nan.pth")


def test_the_fc2_of_named_weights_without_it_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"fc2.*fully connected.*'IMAGENET1K_FEATURES'.*use KERAS"):
        FeaturesConfig(layer="fc2", weights="IMAGENET1K_FEATURES")


@pytest.mark.parametrize("pool", ["max2", "mean"])
def test_pooling_fc2_is_refused(pool: Pool) -> None:
    with pytest.raises(ValidationError, match=f"features.pool = '{pool}': fc2 has no grid"):
        FeaturesConfig(layer="fc2", pool=pool)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Torch's folder of fetched weights, empty, and nothing may be fetched; what a test puts there is removed."""
    monkeypatch.setattr(torch.hub, "_hub_dir", None)  # set_dir's choice goes before TORCH_HOME
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("CAPEXP_OFFLINE", "1")
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    yield folder
    for path in folder.iterdir():
        path.unlink()


def test_weights_that_may_not_be_fetched_are_refused(hub: Path) -> None:
    assert not encoder_at_hand(FeaturesConfig(weights="IMAGENET1K_V1"))
    assert "CAPEXP_OFFLINE" in refusal("IMAGENET1K_V1")


def test_named_weights_of_another_digest_are_refused(hub: Path, vgg16: Path) -> None:
    state = torch.load(vgg16, weights_only=True)
    state["features.0.bias"][0] += 1
    torch.save(state, hub / "vgg16_features-amdegroot-88682ab5.pth")
    config = FeaturesConfig(layer="conv5_3", weights="IMAGENET1K_FEATURES")
    assert encoder_at_hand(config)
    line = refusal(config.weights)
    assert f"expected {NETS[config.weights].digests['conv5_3'][:12]}" in line and str(hub) in line


@pytest.mark.slow
def test_fc2_equals_a_plain_torchvision_forward(hub: Path, scenes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision

    monkeypatch.delitem(NETS["IMAGENET1K_V1"].digests, "fc2", raising=False)  # random weights have their own
    with torch.random.fork_rng():
        torch.manual_seed(5)
        net = torchvision.models.vgg16(weights=None).eval()
    for name, parameter in net.named_parameters():
        if name.endswith("bias"):
            nn.init.uniform_(parameter, -0.1, 0.1)
    torch.save(net.state_dict(), hub / "vgg16-397923af.pth")
    encoder = load_encoder(FeaturesConfig(layer="fc2", weights="IMAGENET1K_V1")).prepare(CPU, "float32")
    features = encoder.encode(two_photos(scenes))
    del encoder
    net.half().float()  # the encoder rounds its weights to float16
    photos = torch.from_numpy(np.stack(two_photos(scenes))).permute(0, 3, 1, 2).float() / 255
    normalize = torchvision.transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    with torch.inference_mode():
        expected = net.classifier[:5](net.avgpool(net.features(normalize(photos))).flatten(1))
    assert features.shape == (2, 1, 4096) and float(expected.max()) > 0.1
    torch.testing.assert_close(torch.from_numpy(features[:, 0]).float(), expected, rtol=2**-10, atol=1e-4)
