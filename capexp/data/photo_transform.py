"""From a photo to the square of pixels that an encoder reads: the whole photo, its mirror image, or a random crop."""

import math
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps

if TYPE_CHECKING:  # a process that decodes photos has no use for pydantic
    from capexp.settings import PhotoResize

PHOTO, MIRROR = "", "mirror"
"""Views of a photo: itself, and its mirror image (left to right)."""
# Cached features are found by the names of views: crops that are made in another way must have other names.
_CROP = "crop"  # begins the names of the views that are random crops
_CROP_AREA = (0.6, 1.0)  # of the photo's area
_CROP_LOG_RATIO = math.log(4 / 3)  # the largest logarithm of the crop's aspect ratio divided by the photo's
_COLOUR_CHANGE = 0.2  # the largest change of brightness, contrast and colour


@dataclass(frozen=True)
class PhotoTransform:
    """How a photo becomes the square of pixels that an encoder reads."""

    size: int
    """The side of the square."""
    resize: "PhotoResize" = "bilinear"
    """``bilinear`` is antialiased; ``nearest`` is exactly what Keras's ``load_img`` does."""
    view: str = PHOTO
    """The whole photo (``PHOTO``), its mirror image (``MIRROR``), or one of its random crops (:func:`crop_view`)."""

    def __call__(self, image: Image.Image) -> NDArray[np.uint8]:
        """Return the pixels ``(size, size, 3)``; the aspect ratio is not kept."""
        if self.view == PHOTO:
            return np.asarray(self._squash(image))
        if self.view == MIRROR:
            return np.asarray(self._squash(image))[:, ::-1]
        return np.asarray(self._crop(image, int(self.view.removeprefix(_CROP))))

    def _squash(self, image: Image.Image, box: tuple[float, float, float, float] | None = None) -> Image.Image:
        """Squash the image, or the part of it in a box (left, top, right, bottom), to the square."""
        if box is None and image.size == (self.size, self.size):
            return image
        method = Image.Resampling.NEAREST if self.resize == "nearest" else Image.Resampling.BILINEAR
        return image.resize((self.size, self.size), method, box)

    def _crop(self, image: Image.Image, number: int) -> Image.Image:
        """Return a random crop, with changes to its colours; it depends on the number and on the pixels alone."""
        random = np.random.default_rng([number, zlib.crc32(image.tobytes())])
        area, log_ratio = random.uniform(*_CROP_AREA), random.uniform(-_CROP_LOG_RATIO, _CROP_LOG_RATIO)
        width = image.width * min(1, math.sqrt(area * math.exp(log_ratio)))
        height = image.height * min(1, math.sqrt(area / math.exp(log_ratio)))
        left, top = random.uniform(0, image.width - width), random.uniform(0, image.height - height)
        right, bottom = min(left + width, image.width), min(top + height, image.height)
        crop = self._squash(image, (left, top, right, bottom))
        if random.random() < 0.5:
            crop = ImageOps.mirror(crop)
        for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
            crop = enhance(crop).enhance(random.uniform(1 - _COLOUR_CHANGE, 1 + _COLOUR_CHANGE))
        return crop


def crop_view(number: int) -> str:
    """Return the view that is a photo's random crop of this number."""
    return f"{_CROP}{number}"
