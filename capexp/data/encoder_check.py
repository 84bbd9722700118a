"""Check that an encoder is the one with which the features of a file were computed.

The features that it gives to photos at hand are compared with those in the file.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Final

import numpy as np
from numpy.typing import NDArray

from capexp.data.captions import PhotoFiles, Split
from capexp.data.features import Features
from capexp.data.photos import read_photo
from capexp.data.vgg16 import Encoder
from capexp.errors import InputError

_COSINE: Final = 0.999  # at least; bfloat16 and other JPEG decoders leave 0.9995
_RATIO: Final = 0.02  # by which lengths may differ: normalised or scaled features are others


@dataclass(frozen=True)
class Reference:
    """The features of some photos, as a file has them, to check an encoder on those that are at hand."""

    MOST: ClassVar = 16
    """Photos that are compared, at most."""

    folder: Path
    """The folder of the photos."""
    features: Mapping[str, NDArray[np.float16]]
    """By the photo's name, (P, F)."""

    @classmethod
    def of(cls, split: Split, features: Features) -> "Reference":
        """Return the features of some photos of a split, if possible of photos that are at hand."""
        at_hand = [position for position, path in enumerate(split.paths()) if path.is_file()]
        positions = at_hand or list(range(len(split.photos)))
        chosen = positions[:: -(-len(positions) // cls.MOST)]
        return cls(
            split.folder.absolute(),
            {split.photos[position]: features.gather(np.array([position]))[0] for position in chosen},
        )

    def check(self, encoder: Encoder, folder: Path | None = None) -> int:
        """Refuse an encoder that gives other features to a photo at hand; return how many photos were at hand.

        The photos are searched in ``folder``, by default in the folder in which they were at the training.
        """
        (shape,) = {values.shape for values in self.features.values()}
        if encoder.identity.shape != shape:
            raise InputError(
                f"features.weights: {encoder.identity} gives {encoder.identity.shape} features a photo, the file of "
                f"features.file has {shape}; set features.layer, pool and size as they were, or features.weights = "
                "'unknown'"
            )
        files = PhotoFiles(self.folder if folder is None else folder)
        found = {name: files.path(name) for name in self.features}
        paths = {name: path for name, path in found.items() if path is not None}
        checked = 0
        for name, path in paths.items():
            try:
                photo = read_photo(path)
            except InputError:  # a damaged photo checks nothing
                continue
            checked += 1
            (computed,) = encoder.encode([encoder.identity.photo_transform(photo)])
            cosine, ratio = compare_features(computed, self.features[name])
            if cosine < _COSINE:
                fault = f"whose cosine with those of features.file is {cosine:.4f}, below {_COSINE}"
            elif abs(ratio - 1) > _RATIO:
                fault = f"that are {ratio:.3g} times as long as those of features.file"
            else:
                continue
            raise InputError(
                f"features.weights: {encoder.identity} gives {path} features {fault}: these were computed otherwise; "
                "set features.weights and features.resize as they were then, or features.weights = 'unknown'"
            )
        return checked


def compare_features(computed: NDArray[np.float16], given: NDArray[np.float16]) -> tuple[float, float]:
    """Return the cosine of two photos' features, and the ratio of their lengths; both are 1 for equal features."""
    a, b = (values.astype(np.float64).ravel() for values in (computed, given))
    lengths = float(np.linalg.norm(a)), float(np.linalg.norm(b))
    if min(lengths) == 0:
        return float(max(lengths) == 0), 1.0
    return float(a @ b) / (lengths[0] * lengths[1]), lengths[0] / lengths[1]
