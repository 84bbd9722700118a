"""Sources: what is computed of each split, and from which views of its photos."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from capexp.data.captions import Split
from capexp.data.photo_transform import MIRROR, PHOTO, crop_view
from capexp.data.photos import read_photo
from capexp.data.sources import open_source
from capexp.data.vgg16 import Encoder, load_encoder
from capexp.experiment import find_experiment, load_experiment
from capexp.settings import FeaturesConfig, SplitName


def drawn(folder: Path, name: SplitName, count: int) -> Split:
    folder.mkdir(exist_ok=True)
    names = tuple(f"{name}{number}.png" for number in range(count))
    for number, photo in enumerate(names):
        pixels = np.random.default_rng([len(name), number]).integers(0, 256, (5, 7, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((70, 50)).save(folder / photo)
    return Split(name, folder, names, (("a dog",),) * count)


def test_train_photos_have_features_of_all_views_and_dev_photos_of_themselves(
    random_vgg16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    features = {"weights": str(random_vgg16), "cache": str(tmp_path / "cache"), "size": 96, "precision": "float32"}
    features |= {"mirror": True, "crops": 2}
    overrides = {f"features.{name}": value for name, value in features.items()}
    source = open_source(load_experiment(find_experiment("scenes"), overrides | {"training.device": "cpu"}))
    splits = [drawn(tmp_path / "photos", "train", 3), drawn(tmp_path / "photos", "dev", 2)]
    assert source.count_uncached(splits) == 5
    loaded: list[Encoder] = []

    def load(config: FeaturesConfig) -> Encoder:
        loaded.append(load_encoder(config))
        return loaded[-1]

    monkeypatch.setattr("capexp.data.sources.load_encoder", load)
    computed = source.compute(splits)
    assert source.count_uncached(splits) == 0
    assert len(loaded) == 1, "all views have one network"
    assert (computed["train"].views, computed["dev"].views) == (4, 1)
    for i, view in enumerate((PHOTO, MIRROR, crop_view(1), crop_view(2))):
        encoder = loaded[0].of_view(view)
        photos = [encoder.identity.photo_transform(read_photo(path)) for path in splits[0].paths()]
        found = computed["train"].gather(np.arange(3) + 3 * i).astype("f4")
        # Alone or in a batch, the network may add in another order.
        np.testing.assert_allclose(found, encoder.encode(photos).astype("f4"), rtol=2e-2, atol=2e-2)
    every = computed["train"].gather(np.arange(12)).reshape(12, -1)
    assert len(np.unique(every, axis=0)) == 12
    again = source.compute(splits)
    np.testing.assert_array_equal(again["train"].gather(np.arange(12)).reshape(12, -1), every)
    assert len(loaded) == 1, "all is cached"
