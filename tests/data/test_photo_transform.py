"""From photos to pixels: the whole photo as Pillow or Keras squashes it, and crops of all places and shapes."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from capexp.data.photo_transform import PhotoTransform, crop_view
from capexp.settings import PhotoResize


def noise(width: int, height: int) -> NDArray[np.uint8]:
    return np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_squash_leaves_a_photo_of_the_size_untouched() -> None:
    pixels = noise(224, 224)
    assert np.array_equal(PhotoTransform(224)(Image.fromarray(pixels)), pixels)


@pytest.mark.parametrize(("width", "height"), [(500, 375), (375, 500), (60, 900), (32, 32)])
def test_squash_is_bilinear_and_antialiased_over_the_whole_photo(width: int, height: int) -> None:
    image = Image.fromarray(noise(width, height))
    squashed = PhotoTransform(224)(image)
    assert squashed.shape == (224, 224, 3) and squashed.dtype == np.uint8
    assert np.array_equal(squashed, np.asarray(image.resize((224, 224), Image.Resampling.BILINEAR)))
    pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None].double()  # (1, 3, height, width)
    exact = torch.nn.functional.interpolate(pixels, (224, 224), mode="bilinear", antialias=True)[0]
    assert np.abs(exact.permute(1, 2, 0).numpy() - squashed).max() <= 2  # Pillow rounds after each direction


@pytest.mark.parametrize(("width", "height"), [(500, 375), (375, 500), (60, 900), (32, 32), (224, 224)])
def test_squash_by_nearest_neighbour_is_pillows_own_as_in_keras(width: int, height: int) -> None:
    image = Image.fromarray(noise(width, height))
    squashed = PhotoTransform(224, "nearest")(image)
    assert np.array_equal(squashed, np.asarray(image.resize((224, 224), Image.Resampling.NEAREST)))
    colours = {tuple(colour) for colour in np.asarray(image).reshape(-1, 3)}
    assert {tuple(colour) for colour in squashed.reshape(-1, 3)} <= colours, "no colour is mixed"


def gradients(size: tuple[int, int], shade: int = 0) -> Image.Image:
    """A picture whose red says how far to the right a pixel is, whose green how far down, and whose blue is a shade."""
    width, height = size
    across = np.broadcast_to(np.linspace(64, 191, width), (height, width))
    down = np.broadcast_to(np.linspace(64, 191, height)[:, None], (height, width))
    return Image.fromarray(np.stack([across, down, np.full_like(down, shade)], 2).round().astype(np.uint8))


@pytest.mark.parametrize("size", [(500, 375), (224, 224)])
def test_crops_are_windows_of_the_photo_of_all_places_and_shapes(
    size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("capexp.data.photo_transform._COLOUR_CHANGE", 0.0)
    image = gradients(size)
    windows = []
    for number in range(1, 100):
        pixels = PhotoTransform(224, view=crop_view(number))(image).astype(float)
        across, down = ((pixels[..., channel] - 64) / 127 for channel in (0, 1))  # 0..1 in the photo
        assert np.ptp(across, 0).max() < 0.02 and np.ptp(down, 1).max() < 0.02, "straight"
        is_mirrored = across[0, 0] > across[0, -1]
        left, right = sorted((across[0, 0], across[0, -1]))
        top, bottom = down[0, 0], down[-1, 0]
        assert top < bottom
        windows.append((right - left, bottom - top, left, top, is_mirrored))
    widths, heights, lefts, tops, mirrored = (np.array(values) for values in zip(*windows, strict=True))
    areas, ratios = widths * heights, widths / heights
    assert 0.57 < areas.min() < 0.65 and 0.9 < areas.max() < 1.01
    assert 0.72 < ratios.min() < 0.85 and 1.2 < ratios.max() < 1.36
    assert lefts.max() > 0.1 and tops.max() > 0.1 and min(lefts.min(), tops.min()) < 0.02
    assert 30 < mirrored.sum() < 70


def test_a_crop_depends_on_its_number_and_on_the_photo_alone() -> None:
    image = gradients((300, 200))
    pixels = [PhotoTransform(96, view=crop_view(number))(image) for number in (1, 1, 2)]
    assert np.array_equal(pixels[0], pixels[1])
    assert not np.array_equal(pixels[0], pixels[2])
    other = PhotoTransform(96, view=crop_view(1))(gradients((300, 200), shade=9))
    assert np.abs(pixels[0][..., :2].astype(int) - other[..., :2]).max() > 20, "another window"


@pytest.mark.parametrize(("size", "view"), [((1, 1), 1), ((1, 500), 2), ((3, 2), 3), ((500, 1), 4)])
@pytest.mark.parametrize("resize", ["bilinear", "nearest"])
def test_photos_of_any_size_have_crops(size: tuple[int, int], view: int, resize: PhotoResize) -> None:
    pixels = PhotoTransform(96, resize, crop_view(view))(gradients(size))
    assert pixels.shape == (96, 96, 3)
    assert 30 < pixels[..., 0].min() <= pixels[..., 0].max() < 240


def test_crops_are_made_as_before() -> None:
    """Cached features of crops are found by the crops' numbers."""
    image = gradients((40, 30))
    found = [PhotoTransform(2, view=crop_view(number))(image).tolist() for number in (1, 2)]
    assert found == [
        [[[116, 86, 30], [84, 84, 28]], [[119, 119, 34], [88, 117, 32]]],
        [[[92, 90, 4], [138, 91, 5]], [[93, 140, 6], [140, 141, 6]]],
    ]


def test_an_unknown_view_is_no_photo() -> None:
    with pytest.raises(ValueError, match="mirorr"):
        PhotoTransform(96, view="mirorr")(gradients((40, 30)))


def test_colours_of_crops_change_a_little() -> None:
    grey = Image.new("RGB", (64, 64), (120, 120, 120))
    levels = [int(PhotoTransform(32, view=crop_view(number))(grey).max()) for number in range(1, 100)]
    assert 90 < min(levels) < 105 and 135 < max(levels) < 150
    red = Image.new("RGB", (64, 64), (150, 90, 90))
    spreads = [int(np.ptp(PhotoTransform(32, view=crop_view(number))(red)[0, 0])) for number in range(1, 100)]
    assert min(spreads) < 50 and max(spreads) > 70
