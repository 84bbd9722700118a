"""Laws of the losses on a split."""

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from capexp.captioning.captioner import Caption, Captioner
from capexp.captioning.evaluation import blind_cross_entropy, compare, cross_entropy, score_captions
from capexp.captioning.model import build_decoder
from capexp.data.batches import CaptionBatches
from capexp.data.captions import Split
from capexp.data.features import Features
from capexp.data.vgg16 import identify
from capexp.data.vocabulary import Vocabulary, build_vocabulary
from capexp.experiment import find_experiment, load_experiment, replace_settings
from capexp.settings import ModelConfig, VocabularyConfig

PHOTOS = 12


def batches(batch_size: int) -> tuple[CaptionBatches, Vocabulary]:
    rng = np.random.default_rng(0)
    texts = tuple(
        tuple(" ".join(rng.choice(list("abcdefg"), rng.integers(1, 9))) for _ in range(3)) for _ in range(PHOTOS)
    )
    split = Split("dev", Path(), tuple(f"{i}.jpg" for i in range(PHOTOS)), texts)
    words = build_vocabulary((text for photo in texts for text in photo), VocabularyConfig(minimum_count=1))
    features = Features(rng.random((PHOTOS, 1, 5)).astype(np.float16), np.arange(PHOTOS))
    return CaptionBatches(split, words, features, batch_size), words


def test_the_loss_is_the_total_over_all_targets_whatever_the_batches() -> None:
    whole, words = batches(1000)
    torch.manual_seed(0)
    decoder = build_decoder(ModelConfig(embedding_size=6, lstm_units=6), (1, 5), len(words))
    losses = [cross_entropy(decoder, batches(size)[0].in_order()) for size in (1, 7, 1000)]
    assert {loss.targets for loss in losses} == {whole.targets}
    assert [loss.per_token for loss in losses] == pytest.approx([losses[0].per_token] * 3, rel=1e-6)


def test_a_decoder_that_knows_nothing_has_the_vocabulary_as_its_perplexity() -> None:
    some, words = batches(8)
    decoder = build_decoder(ModelConfig(embedding_size=6, lstm_units=6), (1, 5), len(words))
    nn.init.zeros_(decoder.vocabulary.weight)
    loss = cross_entropy(decoder, some.in_order())
    assert loss.perplexity == pytest.approx(len(words), rel=1e-5)
    assert loss.per_token == pytest.approx(math.log(len(words)), rel=1e-5)


def test_blind_is_another_loss_only_for_a_decoder_that_looks() -> None:
    some, words = batches(8)
    torch.manual_seed(0)
    decoder = build_decoder(ModelConfig(embedding_size=6, lstm_units=6), (1, 5), len(words))
    seeing, blind = cross_entropy(decoder, some.in_order()), blind_cross_entropy(decoder, some, seed=1)
    assert seeing.targets == blind.targets
    assert abs(seeing.per_token - blind.per_token) > 1e-4
    nn.init.zeros_(decoder.get_parameter("photo.weight"))
    assert cross_entropy(decoder, some.in_order()) == blind_cross_entropy(decoder, some, seed=1)


def captions_of(*texts: str) -> list[Caption]:
    return [Caption(text, -1.0) for text in texts]


SPLIT = Split(
    "dev",
    Path(),
    ("a.jpg", "b.jpg", "c.jpg", "d.jpg"),
    (("A dog runs fast .", "a dog ."), ("Two cats sleep on it .",), ("The red car .",), ("A man who climbs .",)),
)


def test_peoples_own_captions_score_best_and_on_other_photos_nothing() -> None:
    said = captions_of("a dog runs fast", "two cats sleep on it", "the red car", "a man who climbs")
    scores = score_captions(said, SPLIT, seed=1)
    summary = scores.summary
    assert summary["bleu_1"] == pytest.approx(1)
    assert scores.blind.corpus()["cider"] == summary["cider_blind"]
    assert (scores.blind.cider < scores.photos.cider).all()
    assert summary["cider"] > 5 > 1 > summary["cider_blind"]
    assert summary["distinct_captions"] == 1
    assert summary["words_used"] == 15
    assert summary["mean_length"] == 4
    assert "copied_from_train" not in summary


def test_one_caption_for_all_and_copies_of_train_are_told() -> None:
    said, train = captions_of(*["a dog runs"] * 3, "new"), ["A dog RUNS .", "Nothing else ."]
    summary = score_captions(said, SPLIT, seed=1, train=train).summary
    assert summary["distinct_captions"] == 0.5
    assert summary["copied_from_train"] == 0.75


def test_captioners_of_photos_resized_in_two_ways_are_compared_each_on_its_own(
    random_vgg16: Path, scenes: Path, tmp_path: Path
) -> None:
    shutil.copytree(scenes, tmp_path / "data", ignore=shutil.ignore_patterns("features"))
    (tmp_path / "data" / "Scenes.devImages.txt").write_text("scene_0020.jpg\nscene_0022.jpg\n")
    features = {"weights": str(random_vgg16), "cache": str(tmp_path / "features"), "size": "96"}
    overrides = {"captions.root": str(tmp_path / "data")} | {f"features.{name}": of for name, of in features.items()}
    experiment = load_experiment(find_experiment("scenes"), overrides)
    captioners = []
    for resize in ("bilinear", "nearest"):
        identity = identify(replace_settings(experiment, {"features.resize": resize}).features)
        vocabulary = Vocabulary(("a", "tree"), "standard", "token")
        captioners.append(Captioner.fresh(experiment.model, vocabulary, identity, experiment.decoding, 1))
    comparison = compare(experiment, (captioners[0], captioners[1]), "dev")
    assert comparison.photos == 2
    keys = {captioner.encoder_identity.key() for captioner in captioners}
    assert {path.stem.rpartition("-")[2] for path in (tmp_path / "features").glob("*.features")} == keys
