"""The bundle: whole, checked, and the same captions again."""

import base64
import hashlib
import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file

from capexp.captioning.bundle import FORMAT_VERSIONS, TrainingRecord
from capexp.captioning.captioner import Caption, Captioner
from capexp.data.photo_transform import PhotoTransform
from capexp.data.photos import read_photo
from capexp.data.vgg16 import EncoderIdentity, identify, load_encoder
from capexp.data.vgg16_weights import NETS
from capexp.data.vocabulary import Vocabulary
from capexp.errors import InputError
from capexp.settings import DecodingConfig, FeaturesConfig, ModelConfig, NetName

DIGEST = NETS["IMAGENET1K_FEATURES"].digests["conv5_3"]
WORDS = Vocabulary(("a", "dog", "runs", "café", "日本"), "standard", "token")


def fresh(digest: str = DIGEST, seed: int = 1, attends: bool = False) -> Captioner:
    net = NETS["IMAGENET1K_FEATURES"]
    identity = EncoderIdentity(
        "conv5_3", "max2" if attends else "mean", net.mean, net.std, digest, "IMAGENET1K_FEATURES"
    )
    small = ModelConfig(decoder="attention" if attends else "merge", embedding_size=8, lstm_units=8)
    captioner = Captioner.fresh(small, WORDS, identity, DecodingConfig(maximum_length=6), seed)
    captioner.record = TrainingRecord(epoch=3, train_loss=3.245, dev_loss=3.612, dev_digest="d")
    return captioner


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return fresh().save(tmp_path / "bundle")


@pytest.mark.parametrize("attends", [False, True], ids=["merge", "attention"])
def test_loaded_again_it_says_the_same(tmp_path: Path, attends: bool) -> None:
    bundle = fresh(attends=attends).save(tmp_path / "bundle")
    features = np.random.default_rng(0).random((10, 49 if attends else 1, 512)).astype(np.float16)
    moved = shutil.copytree(bundle, tmp_path / "elsewhere")
    again = Captioner.load(moved)
    assert again.caption_features(features) == fresh(attends=attends).caption_features(features)
    assert again.record == fresh().record
    assert again.vocabulary == WORDS


def test_the_same_seed_gives_the_same_weights_and_leaves_the_generator_alone() -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    one, two, other = fresh(), fresh(), fresh(seed=2)
    assert torch.equal(torch.rand(3), expected)
    weights = [captioner.decoder.state_dict()["vocabulary.weight"] for captioner in (one, two, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def together(*members: Captioner) -> Captioner:
    ensemble = Captioner.ensemble(members, DecodingConfig(method="beam", beam_width=2, maximum_length=6))
    ensemble.record = TrainingRecord(epoch=None, train_loss=None, dev_loss=3.5, dev_digest="d")
    return ensemble


def test_an_ensemble_is_whole_in_its_bundle_and_says_the_same_when_loaded(tmp_path: Path) -> None:
    ensemble = together(*[fresh(seed=seed, attends=True) for seed in (1, 2, 3)])
    bundle = ensemble.save(tmp_path / "bundle")
    assert json.loads((bundle / "manifest.json").read_text())["format_version"] == 2
    again = Captioner.load(bundle.rename(tmp_path / "elsewhere"))
    features = np.random.default_rng(0).random((10, 49, 512)).astype(np.float16)
    assert again.caption_features(features) == ensemble.caption_features(features)
    assert (again.digest(), again.record, again.decoding) == (ensemble.digest(), ensemble.record, ensemble.decoding)
    assert (
        again.save(tmp_path / "copy").joinpath("manifest.json").read_bytes()
        == (tmp_path / "elsewhere" / "manifest.json").read_bytes()
    )


def test_members_with_other_words_or_features_are_refused_in_one_line() -> None:
    other = fresh(seed=2)
    other.vocabulary = Vocabulary(("cat", *WORDS.words[1:]), "standard", "token")
    for member, says in ((other, "another vocabulary"), (fresh(attends=True), "pool max2"), (fresh("0" * 64), "0000")):
        with pytest.raises(InputError, match=rf"^member 3 of the ensemble .*{says}.*take members with the same$"):
            together(fresh(), fresh(seed=2), member)


def test_an_ensemble_looks_where_its_members_look_on_the_mean() -> None:
    members = [fresh(seed=seed, attends=True) for seed in (1, 2)]
    features = np.random.default_rng(0).random((3, 49, 512)).astype(np.float16)
    said = ["a dog runs", "", "café"]
    maps = together(*members).attention_maps(features, said)
    assert [one.shape for one in maps] == [(3, 7, 7), (0, 7, 7), (1, 7, 7)]
    apart = [member.attention_maps(features, said) for member in members]
    for mean, one, two in zip(maps, *apart, strict=True):
        np.testing.assert_allclose(mean, (one + two) / 2, rtol=1e-6)
    assert together(*members).decoder.has_attention and not together(fresh(), fresh(seed=2)).decoder.has_attention


def test_looking_back_at_many_photos_is_as_at_each_alone() -> None:
    captioner = fresh(attends=True)
    features = np.random.default_rng(0).random((4, 49, 512)).astype(np.float16)
    said = ["runs", "a dog runs a dog", "", "dog café"]
    for row, text, maps in zip(features, said, captioner.attention_maps(features, said), strict=True):
        (alone,) = captioner.attention_maps(row[None], [text])
        np.testing.assert_allclose(maps, alone, atol=1e-6)
        np.testing.assert_allclose(maps.sum((1, 2)), 1, rtol=1e-5)
    assert [maps.shape for maps in captioner.attention_maps(features[:2], ["", ""])] == [(0, 7, 7)] * 2


FILES = ("captioner.json", "vocabulary.json", "decoder.safetensors", "manifest.json")


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(bundle: Path, name: str) -> None:
    (bundle / name).unlink()
    with pytest.raises(InputError, match=name):
        Captioner.load(bundle)


@pytest.mark.parametrize("name", FILES)
def test_an_altered_file_is_named(bundle: Path, name: str) -> None:
    content = bytearray((bundle / name).read_bytes())
    content[len(content) // 2] ^= 1
    (bundle / name).write_bytes(content)
    with pytest.raises(InputError, match=rf"{name}|altered") as caught:
        Captioner.load(bundle)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path: Path, value: float) -> None:
    captioner = fresh()
    next(captioner.decoder.parameters()).data.view(-1)[3] = value
    with pytest.raises(InputError, match=r"decoder\.safetensors: .* not finite"):
        Captioner.load(captioner.save(tmp_path / "bundle"))


def test_another_format_version_is_named(bundle: Path) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    (bundle / "manifest.json").write_text(json.dumps(manifest | {"format_version": 99}))
    with pytest.raises(InputError, match="format_version 99"):
        Captioner.load(bundle)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"size": 10**6}, "encoder.size: .* 1024"),
        ({"size": 100}, "encoder.size: .* 16"),
        ({"layer": "fc2", "pool": "none", "size": 336}, "fc2 takes photos of 224"),
        ({"pool": "max3"}, "48 divides"),
        ({"transform": "squash-nearest-crop1"}, "the encoder is for view crop1 of photos"),
        ({"transform": "upright"}, "transform 'upright' is unknown"),
    ],
)
def test_an_encoder_of_photos_that_are_not_given_is_refused(
    bundle: Path, changed: dict[str, object], told: str
) -> None:
    settings, manifest = (json.loads((bundle / name).read_text()) for name in ("captioner.json", "manifest.json"))
    settings["encoder"] |= changed
    (bundle / "captioner.json").write_text(json.dumps(settings))
    manifest["sha256"]["captioner.json"] = hashlib.sha256((bundle / "captioner.json").read_bytes()).hexdigest()
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=rf"captioner\.json: .*{told}"):
        Captioner.load(bundle)


def test_another_captioners_vocabulary_does_not_fit(bundle: Path, tmp_path: Path) -> None:
    other = fresh()
    other.vocabulary = Vocabulary(("cat",), "standard", "token")
    strange = other.save(tmp_path / "strange")
    with pytest.raises(InputError, match=r"decoder\.safetensors"):
        Captioner.load(strange)
    shutil.copy(strange / "vocabulary.json", bundle / "vocabulary.json")
    with pytest.raises(InputError, match=r"vocabulary\.json: altered"):
        Captioner.load(bundle)


def test_a_failed_save_leaves_nothing_and_keeps_the_old_bundle(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("capexp.captioning.bundle.save_file", full)
    with pytest.raises(InputError, match=r"bundle: cannot be written \(No space"):
        fresh(seed=2).save(bundle)
    assert [path.name for path in bundle.parent.iterdir()] == ["bundle"]
    Captioner.load(bundle)


def test_a_folder_that_is_no_bundle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"not a captioner's bundle"):
        Captioner.load(tmp_path)


def test_photos_get_captions_and_bad_ones_their_error(vgg16: Path, scenes: Path) -> None:
    captioner = fresh()
    captioner.use_encoder(str(vgg16))
    photos = sorted((scenes / "Scenes_Dataset").iterdir())[:2]
    results = captioner.caption_photos([photos[0], b"no picture", photos[1].read_bytes()])
    assert [type(result) for result in results] == [Caption, InputError, Caption]


def test_photos_are_squashed_to_the_captioners_own_size(vgg16: Path, scenes: Path) -> None:
    config = FeaturesConfig(layer="conv5_3", pool="max3", size=144, weights=str(vgg16))
    small = ModelConfig(decoder="attention", embedding_size=8, lstm_units=8)
    captioner = Captioner.fresh(small, WORDS, identify(config), DecodingConfig(maximum_length=6), 1)
    photo = min((scenes / "Scenes_Dataset").iterdir())
    captioner.use_encoder(str(vgg16))
    encoder = load_encoder(config).prepare(torch.device("cpu"), "auto")
    features = encoder.encode([PhotoTransform(144)(read_photo(photo))])
    assert captioner.caption_photos([photo]) == captioner.caption_features(features)


def test_photos_are_resized_as_the_captioner_was_trained(random_vgg16: Path, scenes: Path) -> None:
    config = FeaturesConfig(layer="conv5_3", pool="mean", size=96, resize="nearest", weights=str(random_vgg16))
    small = ModelConfig(embedding_size=8, lstm_units=8, photo_norm="unit")
    captioner = Captioner.fresh(small, WORDS, identify(config), DecodingConfig(maximum_length=6), 1)
    photo = min((scenes / "Scenes_Dataset").iterdir())
    encoder = captioner.use_encoder(str(random_vgg16))
    assert encoder.identity == captioner.encoder_identity
    features = encoder.encode([PhotoTransform(96, "nearest")(read_photo(photo))])
    assert captioner.caption_photos([photo]) == captioner.caption_features(features)
    assert captioner.caption_photos([photo]) != captioner.caption_features(
        encoder.encode([PhotoTransform(96, "bilinear")(read_photo(photo))])
    )


def test_a_captioner_knows_which_net_a_file_of_weights_must_hold(random_vgg16: Path, tmp_path: Path) -> None:
    whole = torch.load(random_vgg16, weights_only=True) | {"classifier.0.weight": torch.zeros(3, 2)}
    torch.save(whole, tmp_path / "whole.pth")
    nets: tuple[NetName, ...] = ("caffe", "torchvision")
    for net in nets:
        config = FeaturesConfig(layer="conv5_3", pool="mean", weights=str(tmp_path / "whole.pth"), net=net)
        small = ModelConfig(embedding_size=8, lstm_units=8)
        captioner = Captioner.fresh(small, WORDS, identify(config), DecodingConfig(), 1)
        assert captioner.use_encoder(str(tmp_path / "whole.pth")).identity == captioner.encoder_identity


def test_named_weights_without_the_captioners_layer_are_refused() -> None:
    identity = EncoderIdentity("fc2", "none", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "0" * 64, "vgg.pth")
    captioner = Captioner.fresh(ModelConfig(embedding_size=8, lstm_units=8), WORDS, identity, DecodingConfig(), 1)
    with pytest.raises(InputError, match=r"^features.layer = 'fc2' needs the fully connected layers"):
        captioner.use_encoder("IMAGENET1K_FEATURES")


def test_weights_of_another_net_are_refused(vgg16: Path) -> None:
    with pytest.raises(InputError, match="was trained on"):
        fresh(digest="0" * 64).use_encoder(str(vgg16))


def test_a_bundle_with_its_encoder_needs_nothing_else(vgg16: Path, scenes: Path, tmp_path: Path) -> None:
    config = FeaturesConfig(layer="conv5_3", pool="mean", weights=str(vgg16))
    bundle = fresh().save(tmp_path / "whole", load_encoder(config).weights())
    photo = min((scenes / "Scenes_Dataset").iterdir())
    alone = Captioner.load(bundle)
    told = fresh()
    told.use_encoder(str(vgg16))
    ours, theirs = alone.use_encoder().state_dict(), told.use_encoder().state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    (one,), (two,) = alone.caption_photos([photo]), told.caption_photos([photo])
    assert isinstance(one, Caption)
    assert isinstance(two, Caption)
    assert one.text == two.text


def test_without_weights_at_hand_the_remedy_is_told(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "empty"))
    monkeypatch.setenv("CAPEXP_OFFLINE", "1")
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    assert base64.b64encode(buffer.getvalue())
    with pytest.raises(InputError, match="CAPEXP_OFFLINE"):
        Captioner.load(bundle).caption_photos([buffer.getvalue()])


@pytest.mark.parametrize("golden", sorted(Path(__file__).parent.glob("golden-*")), ids=lambda path: path.name)
def test_bundles_of_every_format_ever_written_say_what_they_said(golden: Path) -> None:
    features = load_file(golden / "features.safetensors")["features"]
    said = json.loads((golden / "captions.json").read_text())
    captions = Captioner.load(golden / "bundle").caption_features(features)
    assert [caption.text for caption in captions] == [text for text, _ in said]
    log_probabilities = [caption.log_probability for caption in captions]
    assert log_probabilities == pytest.approx([value for _, value in said], abs=1e-3)
    assert len({text for text, _ in said}) == len(said) > 9, "captions that differ from photo to photo"


def test_every_format_has_its_golden_bundle() -> None:
    for version in FORMAT_VERSIONS:
        golden = Path(__file__).with_name(f"golden-{version}")
        assert (golden / "captions.json").is_file()
        assert json.loads((golden / "bundle" / "manifest.json").read_text())["format_version"] == version


def test_a_vocabulary_of_before_keeps_its_words_as_they_were_written() -> None:
    """Written when captions were split at blanks alone: "snow." is a word of its own there."""
    captioner = Captioner.load(Path(__file__).with_name("golden-1-whitespace") / "bundle")
    vocabulary = captioner.vocabulary
    assert vocabulary.tokens == "whitespace"
    entries = vocabulary.entries
    assert vocabulary.encode("A dog in the Snow. snow") == [
        entries[word] for word in ["a", "dog", "in", "the", "snow.", "snow"]
    ]
    stop, plain = (vocabulary.decode([entries[word]]) for word in ("snow.", "snow"))
    assert (stop, plain) == ("snow.", "snow")
    # A new vocabulary of the same words is another one, whose losses do not compare.
    assert replace(vocabulary, tokens="words").digest() != vocabulary.digest()
