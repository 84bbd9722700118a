"""The embedded data is what its generator draws, and its task is real."""

from pathlib import Path
from random import Random

import draw
import numpy as np
import pytest

from capexp.data.cache import FeatureCache
from capexp.data.captions import SPLITS, read_splits
from capexp.data.photo_transform import PhotoTransform
from capexp.data.photos import digest_photos, read_photo
from capexp.data.vgg16 import identify, load_encoder
from capexp.data.vocabulary import tokenize
from capexp.experiment import find_experiment, load_experiment
from capexp.settings import FeaturesConfig

EXPERIMENT = load_experiment(find_experiment("scenes"), {})
EXAMPLES = list(draw.scenes())


def test_the_committed_captions_and_lists_are_those_the_generator_writes() -> None:
    splits = read_splits(EXPERIMENT.captions, SPLITS)
    for name, split in splits.items():
        drawn = {example.name: example.captions for example in EXAMPLES if example.split == name}
        assert dict(zip(split.photos, split.references, strict=True)) == drawn
    assert [len(splits[name].photos) for name in SPLITS] == [600, 100, 100]
    assert {len(texts) for split in splits.values() for texts in split.references} == {5}


@pytest.mark.parametrize("number", [0, 399, 799])
def test_the_generator_draws_the_committed_pictures(scenes: Path, number: int) -> None:
    """Not to the byte, which depends on Pillow's JPEG encoder, but to what an eye would see."""
    example = EXAMPLES[number]
    committed = np.asarray(read_photo(scenes / "Scenes_Dataset" / example.name), dtype=np.float64)
    drawn = np.asarray(draw.draw(example.scene, Random(f"{draw.SEED} {example.name}")), dtype=np.float64)
    assert np.abs(drawn - committed).mean() < 8  # of 255, what JPEG loses


def test_train_shows_no_reserved_composition_and_half_of_dev_and_test_do() -> None:
    shares = {
        name: np.mean([draw.is_held_out(example.scene) for example in EXAMPLES if example.split == name])
        for name in SPLITS
    }
    assert shares == {"train": 0, "dev": 0.5, "test": 0.5}


def test_no_scene_of_dev_or_test_stands_in_train() -> None:
    train = {example.scene for example in EXAMPLES if example.split == "train"}
    assert not [example.name for example in EXAMPLES if example.split != "train" and example.scene in train]


def test_dev_and_test_use_only_words_of_train() -> None:
    words: dict[str, set[str]] = {name: set() for name in SPLITS}
    for example in EXAMPLES:
        words[example.split] |= {word for text in example.captions for word in tokenize(text, "standard", "words")}
    assert words["dev"] | words["test"] <= words["train"]
    assert 120 <= len(words["train"]) <= 220


def test_every_picture_has_its_features_and_all_is_small(scenes: Path) -> None:
    splits = read_splits(EXPERIMENT.captions, SPLITS)
    cache = FeatureCache(EXPERIMENT.features.cache, identify(EXPERIMENT.features))
    paths = [path for split in splits.values() for path in split.paths()]
    assert (cache.lookup(digest_photos(paths)) >= 0).all()
    assert sum(path.stat().st_size for path in scenes.rglob("*") if path.is_file()) < 8e6


@pytest.mark.slow
def test_the_committed_features_are_vgg16s(vgg16: Path) -> None:
    config = FeaturesConfig(layer="conv5_3", pool="mean", weights=str(vgg16), precision="float32")
    encoder = load_encoder(config)
    cache = FeatureCache(EXPERIMENT.features.cache, encoder.identity)
    paths = read_splits(EXPERIMENT.captions, ("test",))["test"].paths()[:3]
    held = cache.open(digest_photos(paths)).gather(np.arange(3))
    computed = encoder.encode([PhotoTransform(224)(read_photo(path)) for path in paths])
    np.testing.assert_allclose(held.astype(np.float32), computed.astype(np.float32), rtol=1e-2, atol=2e-3)
