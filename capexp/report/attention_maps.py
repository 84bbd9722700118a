"""Where an attention captioner looked, word by word: the photo lit there, alone or as a PNG of all of them."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from capexp.captioning.captioner import Captioner
from capexp.data.photos import read_photo, squash
from capexp.errors import InputError
from capexp.files import writing

_COLUMNS, _SIDE = 5, 360  # panels in a row; a panel's longer side in pixels


def refuse_blind(captioner: Captioner) -> None:
    """Refuses a captioner that looks at no places.

    Raises:
        InputError: it has no attention decoder, or one on features without a grid.
    """
    if not captioner.decoder.has_attention:
        raise InputError(
            f"--maps: the captioner looks at the photo as a whole ({captioner.encoder_identity}); give one with "
            "model.decoder = 'attention' on a grid"
        )


def where_it_looked(captioner: Captioner, photo: Path | bytes, caption: str) -> NDArray[np.float32]:
    """How its attention was spread over the grid as it said each word of a caption: ``(T, side, side)``.

    Raises:
        InputError: the photo cannot be read, or the encoder's weights cannot be had.
    """
    pixels = squash(read_photo(photo), captioner.encoder_identity.size)
    (maps,) = captioner.attention_maps(captioner.use_encoder().encode([pixels]), [caption])
    return maps


def light_up(photo: Path | bytes, caption: str, maps: NDArray[np.float32]) -> list[tuple[str, NDArray[np.uint8]]]:
    """For each word the photo, small, lit where the attention was; the brightest place of each is full light.

    Raises:
        InputError: the photo cannot be read.
    """
    image = read_photo(photo)
    image.thumbnail((_SIDE, _SIDE))
    pixels = np.asarray(image, np.float32)
    lit = []
    for word, weights in zip(caption.split(), maps, strict=True):
        light = Image.fromarray(weights / weights.max()).resize(image.size, Image.Resampling.BICUBIC)
        shown = pixels * (0.15 + 0.85 * np.clip(np.asarray(light), 0, 1)[:, :, None])
        lit.append((word, shown.astype(np.uint8)))
    return lit


def draw_maps(photo: Path, caption: str, maps: NDArray[np.float32], path: Path) -> Path:
    """The photo, and for each word the photo lit where the attention was.

    Raises:
        InputError: the photo cannot be read, or the file cannot be written.
    """
    from matplotlib.figure import Figure

    image = read_photo(photo)
    image.thumbnail((_SIDE, _SIDE))
    panels = [("", np.asarray(image)), *light_up(photo, caption, maps)]
    rows = -(-len(panels) // _COLUMNS)
    high = image.height / image.width
    figure = Figure(figsize=(2.2 * _COLUMNS, (2.2 * high + 0.35) * rows + 0.4), layout="constrained")
    figure.suptitle(caption)
    for place, axes in enumerate(figure.subplots(rows, _COLUMNS, squeeze=False).flat):
        axes.axis("off")
        if place < len(panels):
            word, shown = panels[place]
            axes.imshow(shown)
            axes.set_title(word, fontsize=11)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110)
    return path
