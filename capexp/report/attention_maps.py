"""Attention maps of a caption: per word a copy of the photo, bright where the attention was; also all in one PNG."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from capexp.captioning.captioner import Captioner
from capexp.data.photos import read_photo
from capexp.errors import InputError
from capexp.files import writing

_COLUMNS, _SIDE = 5, 360  # panels per row; the longer side of a panel in pixels


def require_attention(captioner: Captioner) -> None:
    """Raise InputError if a captioner has no attention decoder, or if its features are not a grid."""
    if not captioner.has_maps:
        raise InputError(
            f"--maps: the captioner looks at the photo as a whole ({captioner.encoder_identity}); give one with "
            "model.decoder = 'attention' on a grid"
        )


def attention_of(captioner: Captioner, photo: Path | bytes, caption: str) -> NDArray[np.float32]:
    """Return the attention weights over the grid, ``(T, side, side)``, for each word of a photo's caption."""
    encoder = captioner.encoder_identity
    pixels = encoder.photo_transform(read_photo(photo))
    (maps,) = captioner.attention_maps(captioner.use_encoder().encode([pixels]), [caption])
    return maps


def overlay_attention(
    photo: Path | bytes, words: Sequence[str], maps: NDArray[np.float32]
) -> list[tuple[str, NDArray[np.uint8]]]:
    """Return for each word of a caption a small copy of the photo, bright where the attention was.

    Each map is scaled by its maximum, where the photo keeps its full brightness.
    """
    image = read_photo(photo)
    image.thumbnail((_SIDE, _SIDE))
    pixels = np.asarray(image, np.float32)
    overlays = []
    for word, weights in zip(words, maps, strict=True):
        brightness = Image.fromarray(weights / weights.max()).resize(image.size, Image.Resampling.BICUBIC)
        overlay = pixels * (0.15 + 0.85 * np.clip(np.asarray(brightness), 0, 1)[:, :, None])
        overlays.append((word, overlay.astype(np.uint8)))
    return overlays


def draw_maps(photo: Path, words: Sequence[str], maps: NDArray[np.float32], path: Path) -> Path:
    """Write a PNG of the photo and, for each word, the photo bright where the attention was; return ``path``."""
    from matplotlib.figure import Figure

    image = read_photo(photo)
    image.thumbnail((_SIDE, _SIDE))
    panels = [("", np.asarray(image)), *overlay_attention(photo, words, maps)]
    rows = -(-len(panels) // _COLUMNS)
    aspect = image.height / image.width
    figure = Figure(figsize=(2.2 * _COLUMNS, (2.2 * aspect + 0.35) * rows + 0.4), layout="constrained")
    figure.suptitle(" ".join(words))
    for position, axes in enumerate(figure.subplots(rows, _COLUMNS, squeeze=False).flat):
        axes.axis("off")
        if position < len(panels):
            word, pixels = panels[position]
            axes.imshow(pixels)
            axes.set_title(word, fontsize=11)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110)
    return path
