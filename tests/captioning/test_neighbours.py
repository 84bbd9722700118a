"""Captions of similar train photos: which photos, the captions' weights, and the hypotheses that are chosen by them."""

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small import data, identity
from test_plain_decoding import WORDS, decoder_of, log_probabilities, plain_beam, plain_samples, words_of

from capexp.captioning.bundle import TrainingRecord
from capexp.captioning.captioner import Captioner
from capexp.captioning.consensus import Tokens, agreement
from capexp.captioning.decoding import decode
from capexp.captioning.neighbours import Neighbours, pool, whiten
from capexp.data.vocabulary import EOS, UNK, build_vocabulary
from capexp.errors import InputError
from capexp.metrics.cider import CiderReferences
from capexp.settings import DecodingConfig, ModelConfig, VocabularyConfig

CONSENSUS = DecodingConfig(method="consensus", beam_width=4, samples=6, neighbours=3, maximum_length=8)


def some_neighbours(photos: int = 12, positions: int = 3) -> tuple[Neighbours, torch.Tensor]:
    """Train photos with one to four captions of random words, and the features of five photos."""
    rng = np.random.default_rng(5)
    captions = tuple(
        tuple(tuple(rng.integers(4, 4 + 9, rng.integers(1, 9)).tolist()) for _ in range(rng.integers(1, 5)))
        for _ in range(photos)
    )
    train = rng.normal(size=(photos, positions, 5)).astype(np.float32)
    generator = torch.Generator().manual_seed(4)
    return Neighbours(pool(train), captions), 5 * torch.randn(5, positions, 5, generator=generator)


def test_the_pooled_features_are_roots_of_means() -> None:
    features = np.array([[[4, -9, 0], [0, -9, 2]]], np.float32)
    np.testing.assert_allclose(pool(features), [[math.sqrt(2), -3, 1]], rtol=1e-3)


def test_they_are_the_captions_of_the_nearest_photos_by_their_squared_similarity() -> None:
    neighbours, features = some_neighbours()
    centre = neighbours.pooled.astype(np.float64).mean(0)
    for photo, (captions, weights) in zip(features.numpy(), neighbours.captions_near(features.numpy(), 3), strict=True):
        own = pool(photo[None])[0].astype(np.float64) - centre
        cosines = [
            float(own @ other / np.linalg.norm(own) / np.linalg.norm(other))
            for other in neighbours.pooled.astype(np.float64) - centre
        ]
        nearest = sorted(range(len(cosines)), key=lambda i: -cosines[i])[:3]
        assert captions == [caption for i in nearest for caption in neighbours.captions[i]]
        squares = {i: max(cosines[i], 0) ** 2 for i in nearest}
        expected = [
            squares[i] / sum(squares.values()) / len(neighbours.captions[i])
            for i in nearest
            for _ in neighbours.captions[i]
        ]
        np.testing.assert_allclose(weights, expected, rtol=1e-4)


def test_photos_are_compared_in_directions_divided_by_the_fourth_root_of_their_variance() -> None:
    rng = np.random.default_rng(6)
    pooled = (rng.normal(size=(90, 5)) * [9, 3, 1, 1, 0.3] @ rng.normal(size=(5, 5)) + 20).astype(np.float16)
    centred = pooled.astype(np.float64) - pooled.astype(np.float64).mean(0)
    # The rotation back to the features' own axes changes no cosine.
    axes, deviations, _ = np.linalg.svd(centred.T / math.sqrt(90))
    divisors = (deviations**2 + 1e-3 * deviations[0] ** 2) ** 0.25
    expected = centred @ (axes / divisors @ axes.T)
    found = centred @ whiten(pooled)
    assert found.shape == (90, 5)
    np.testing.assert_allclose(found @ found.T, expected @ expected.T, atol=1e-3 * np.abs(expected).max() ** 2)
    captions = tuple(((4 + i,),) for i in range(90))
    photo = np.sign(pooled[:1]) * pooled[:1].astype(np.float32) ** 2  # which is pooled to the first one's features
    unit = expected / np.linalg.norm(expected, axis=1, keepdims=True)
    nearest = np.argsort(-unit @ unit[0])[1:6]
    ((near, weights),) = Neighbours(pooled, captions, whiten(pooled)).captions_near(photo[:, None], 5)
    assert near == [captions[i][0] for i in nearest]
    np.testing.assert_allclose(weights, (squares := (unit @ unit[0])[nearest].clip(0) ** 2) / squares.sum(), rtol=1e-3)
    ((other, _),) = Neighbours(pooled, captions).captions_near(photo[:, None], 5)
    assert other != near


def test_features_with_many_values_are_compared_in_their_main_directions() -> None:
    pooled = np.random.default_rng(7).normal(size=(30, 700)).astype(np.float16)
    assert whiten(pooled).shape == (700, 512)


@pytest.mark.parametrize("photos", [1, 2])
def test_photos_without_variance_have_no_directions(photos: int) -> None:
    pooled = np.ones((photos, 3), np.float16)
    assert np.isfinite(whiten(pooled)).all()
    captions = tuple(((4 + i,),) for i in range(photos))
    ((near, weights),) = Neighbours(pooled, captions, whiten(pooled)).captions_near(
        np.full((1, 1, 3), 4, np.float32), 5
    )
    assert near == [caption for (caption,) in captions]
    np.testing.assert_allclose(weights, 1 / photos)


def test_they_do_not_depend_on_the_others() -> None:
    neighbours, features = some_neighbours()
    together = neighbours.captions_near(features.numpy(), 4)
    for i in range(len(features)):
        ((captions, weights),) = neighbours.captions_near(features[i : i + 1].numpy(), 4)
        assert captions == together[i][0]
        np.testing.assert_array_equal(weights, together[i][1])


def test_where_no_train_photo_is_similar_each_counts_alike() -> None:
    pooled = np.array([[1, 0], [-1, 0], [0, 0]], np.float16)
    neighbours = Neighbours(pooled, (((4,),), ((5,), (6,)), ((7,),)))
    ((captions, weights),) = neighbours.captions_near(np.array([[[0, 4]]], np.float32), 2)
    assert captions == [(4,), (5,), (6,)]
    np.testing.assert_allclose(weights, [0.5, 0.25, 0.25])


def test_more_neighbours_than_train_photos_are_all_of_them() -> None:
    neighbours, features = some_neighbours(photos=2)
    assert all(
        len(captions) == sum(map(len, neighbours.captions))
        for captions, _ in neighbours.captions_near(features.numpy(), 9)
    )


def test_a_train_photo_is_not_its_own_neighbour() -> None:
    neighbours, _ = some_neighbours()
    same = np.sign(neighbours.pooled) * neighbours.pooled.astype(np.float32) ** 2  # which are pooled to the same again
    for i, (captions, _) in enumerate(neighbours.captions_near(same[:, None], 20)):
        assert len(captions) == sum(map(len, neighbours.captions)) - len(neighbours.captions[i])
    alone = Neighbours(neighbours.pooled[:1], neighbours.captions[:1])
    ((captions, weights),) = alone.captions_near(same[:1, None], 20)
    assert captions == [] and len(weights) == 0


def test_weighted_agreement_is_cider_d_with_the_document_frequencies_of_train() -> None:
    neighbours, _ = some_neighbours(photos=40)
    people = CiderReferences(
        [[(*map(str, caption), "end") for caption in of_photo] for of_photo in neighbours.captions]
    )
    rng = np.random.default_rng(2)
    hypotheses: list[Tokens] = [tuple(rng.integers(4, 15, length).tolist()) for length in (4, 6, 9, 12)]
    ids = [people.token_ids((*map(str, tokens), "end")) for tokens in hypotheses]
    for photo, captions in enumerate(neighbours.captions):
        if all(len(caption) > 2 for caption in captions):  # which have n-grams of all orders
            expected = people.score([photo] * len(hypotheses), ids)[:, 0] / 10
            (found,) = agreement([hypotheses], [list(captions)], frequencies=neighbours.frequencies)
            np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


def plain_similarity(a: Tokens, b: Tokens, photos: tuple[tuple[Tokens, ...], ...] | None = None) -> float:
    """Return the similarity of a candidate to another caption, from counters of their n-grams.

    With ``photos`` n-grams are weighted by their inverse document frequency in these captions.
    """

    def counts(tokens: Tokens, order: int) -> Counter[Tokens]:
        return Counter((*tokens, EOS)[i : i + order] for i in range(len(tokens) + 2 - order))

    def idf(ngram: Tokens) -> float:
        if photos is None:
            return 1
        has = sum(any(ngram in counts(caption, len(ngram)) for caption in of_photo) for of_photo in photos)
        return math.log(len(photos) / max(has, 1))

    cosines = []
    for order in range(1, min(max(len(a), len(b)) + 1, 4) + 1):
        own = {ngram: count * idf(ngram) for ngram, count in counts(a, order).items()}
        theirs = {ngram: count * idf(ngram) for ngram, count in counts(b, order).items()}
        norms = math.sqrt(sum(v * v for v in own.values()) * sum(v * v for v in theirs.values()))
        products = sum(min(own[ngram], theirs.get(ngram, 0)) * theirs.get(ngram, 0) for ngram in own)
        cosines.append(products / norms if norms else 0.0)
    return math.exp(-((len(a) - len(b)) ** 2) / 72) * sum(cosines) / len(cosines)


@pytest.mark.parametrize("weight", [0.5, 20.0])
def test_captions_are_chosen_as_counted_one_by_one(weight: float) -> None:
    decoder, positions = decoder_of("attention")
    neighbours, features = some_neighbours(positions=positions)
    config = CONSENSUS.model_copy(update={"neighbour_weight": weight})
    found = decode(decoder, features, WORDS, config, neighbours)
    for photo, hypotheses in zip(features, found, strict=True):
        candidates = [words_of(said) for said, _ in plain_beam(decoder, photo, config, config.beam_width)]
        samples = [words_of(said) for said, _ in plain_samples(decoder, photo, config, config.samples)]
        ((near, weights),) = neighbours.captions_near(photo[None].numpy(), config.neighbours)
        scores = {}
        for one in candidates:
            own = [plain_similarity(one, other) for other in candidates + samples]
            others = [plain_similarity(one, other, neighbours.captions) for other in near]
            scores[one] = sum(own) / len(own) + weight * float(np.dot(others, weights))
        assert [h.tokens for h in hypotheses] == sorted(candidates, key=lambda one: -scores[one])
    assert found != decode(decoder, features, WORDS, config.model_copy(update={"neighbours": 0}))


@pytest.mark.parametrize(
    "kind", ["merge", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("attention", "ensemble"))]
)
def test_captions_of_neighbours_may_be_chosen_with_the_probability_that_they_have(kind: str) -> None:
    decoder, positions = decoder_of(kind)
    neighbours, features = some_neighbours(positions=positions)
    changes = {"copy_neighbours": True, "repeat_trigrams": False, "maximum_length": 7}
    config = CONSENSUS.model_copy(update=changes)
    found = decode(decoder, features, WORDS, config, neighbours)
    own_beams = decode(decoder, features, WORDS, config.model_copy(update={"copy_neighbours": False}), neighbours)
    likely = decode(decoder, features, WORDS, config.model_copy(update={"likelihood_weight": 0.3}), neighbours)
    assert [photo[0].tokens for photo in likely] != [photo[0].tokens for photo in found]
    copied = 0
    for photo, hypotheses, own in zip(features, found, own_beams, strict=True):
        ((near, weights),) = neighbours.captions_near(photo[None].numpy(), config.neighbours)
        beam = [words_of(said) for said, _ in plain_beam(decoder, photo, config, config.beam_width)]
        samples = [words_of(said) for said, _ in plain_samples(decoder, photo, config, config.samples)]
        scores = {}
        for one in {*beam, *(caption for caption in near if len(caption) <= 7)}:
            likes = [plain_similarity(one, other) for other in beam + samples]
            others = [plain_similarity(one, other, neighbours.captions) for other in near]
            scores[one] = sum(likes) / len(likes) + config.neighbour_weight * float(np.dot(others, weights))
        assert [h.tokens for h in hypotheses] == sorted(scores, key=lambda one: -scores[one])[: len(beam)]
        for hypothesis in hypotheses:
            said = (*hypothesis.tokens, EOS)[:7]
            expected = sum(
                float(log_probabilities(decoder, photo, said[:step], config)[word]) for step, word in enumerate(said)
            )
            assert hypothesis.log_probability == pytest.approx(expected, rel=1e-4)
        # With a weight of the likelihood, the same captions in another order.
        total = {h.tokens: scores[h.tokens] + 0.3 * h.log_probability for h in hypotheses}
        assert [h.tokens for h in likely.pop(0)] == sorted(total, key=lambda one: -total[one])
        copied += hypotheses[0].tokens not in {h.tokens for h in own}
    assert copied > 0


def test_captions_that_could_not_be_generated_are_not_copied() -> None:
    decoder, positions = decoder_of("merge")
    _, features = some_neighbours(positions=positions)
    impossible = ((UNK, 4), (), (4, 5, 6, 4, 5, 6), tuple(range(4, 13)))
    neighbours = Neighbours(pool(np.ones((1, positions, 5), np.float32)), (impossible,))
    config = CONSENSUS.model_copy(update={"repeat_trigrams": False})
    copies = config.model_copy(update={"copy_neighbours": True})
    assert decode(decoder, features, WORDS, copies, neighbours) == decode(decoder, features, WORDS, config, neighbours)


@pytest.fixture
def captioner() -> Captioner:
    split, features = data("train", 30, seed=1)
    vocabulary = build_vocabulary(
        (text for texts in split.references for text in texts), VocabularyConfig(minimum_count=1)
    )
    config = ModelConfig(embedding_size=8, lstm_units=8)
    captioner = Captioner.fresh(config, vocabulary, identity("mean"), CONSENSUS, seed=1)
    captioner.neighbours = Neighbours.of(split, features, vocabulary)
    return captioner


def test_a_bundle_carries_them(captioner: Captioner, tmp_path: Path) -> None:
    again = Captioner.load(captioner.save(tmp_path / "bundle"))
    assert again.neighbours is not None and captioner.neighbours is not None
    assert again.neighbours.captions == captioner.neighbours.captions
    assert captioner.neighbours.whitening is not None and again.neighbours.whitening is not None
    np.testing.assert_array_equal(again.neighbours.whitening, captioner.neighbours.whitening)
    assert captioner.vocabulary.decode(again.neighbours.captions[0][0]).startswith("a ")
    _, features = data("dev", 10, seed=2)
    (part,) = features.parts(10)
    assert again.caption_features(part) == captioner.caption_features(part)


def test_a_bundle_from_before_features_were_whitened_compares_them_as_they_are(
    captioner: Captioner, tmp_path: Path
) -> None:
    assert captioner.neighbours is not None
    captioner.neighbours = replace(captioner.neighbours, whitening=None)
    again = Captioner.load(captioner.save(tmp_path / "bundle"))
    assert again.neighbours is not None and again.neighbours.whitening is None


def test_a_bundle_without_them_is_as_it_was_before_they_were_known(captioner: Captioner, tmp_path: Path) -> None:
    captioner.neighbours, captioner.decoding = None, DecodingConfig()
    bundle = captioner.save(tmp_path / "bundle")
    assert not (bundle / "neighbours.safetensors").exists()
    assert (
        not {"neighbours", "neighbour_weight", "copy_neighbours", "likelihood_weight"}
        & json.loads((bundle / "captioner.json").read_text())["decoding"].keys()
    )


def test_a_captioner_without_them_says_what_to_do(captioner: Captioner) -> None:
    captioner.neighbours = None
    _, features = data("dev", 2, seed=2)
    (part,) = features.parts(2)
    for method in ("consensus", "beam"):  # a page may change the method later
        with pytest.raises(InputError, match=r"decoding.neighbours = 3: .*train it with decoding.neighbours, or set"):
            captioner.caption_features(part, CONSENSUS.model_copy(update={"method": method}))
    captioner.caption_features(part, CONSENSUS.model_copy(update={"neighbours": 0}))


def test_an_ensemble_has_its_own(captioner: Captioner, tmp_path: Path) -> None:
    twin = Captioner.fresh(captioner.models[0], captioner.vocabulary, identity("mean"), CONSENSUS, seed=1)
    ensemble = Captioner.ensemble([captioner, twin], CONSENSUS)
    ensemble.record = TrainingRecord(epoch=None, train_loss=None, dev_loss=3.5, dev_digest="d")
    ensemble.neighbours = captioner.neighbours
    _, features = data("dev", 10, seed=2)
    (part,) = features.parts(10)
    again = Captioner.load(ensemble.save(tmp_path / "bundle"))
    assert [one.text for one in again.caption_features(part)] == [one.text for one in captioner.caption_features(part)]


@pytest.mark.parametrize("copies", [False, True])
def test_captions_do_not_depend_on_the_other_photos(captioner: Captioner, copies: bool) -> None:
    captioner.decoding = captioner.decoding.model_copy(update={"copy_neighbours": copies})
    _, features = data("dev", 70, seed=2)
    (part,) = features.parts(70)
    together = captioner.caption_features(part)
    for i in range(0, 70, 9):
        (alone,) = captioner.caption_features(part[i : i + 1])
        assert alone.text == together[i].text
        assert [other.text for other in alone.alternatives] == [other.text for other in together[i].alternatives]


FAULTS = {
    "pooled": [
        lambda a: a.astype(np.float32),
        lambda a: a[:-1],
        lambda a: a[:, :-1],
        lambda a: np.full_like(a, np.nan),
    ],
    "tokens": [
        lambda a: a[:-1],
        lambda a: a[:, None],
        lambda a: a - 100,
        lambda a: a + 100,
        lambda a: a.astype(np.int64),
    ],
    "lengths": [lambda a: a[:-1], lambda a: -a],
    "whitening": [
        lambda a: a.astype(np.float16),
        lambda a: a[:-1],
        lambda a: a[:, 0],
        lambda a: np.full_like(a, np.inf),
    ],
    "captions": [lambda a: a[:-1], lambda a: a[0], lambda a: 0 * a],
}


@pytest.mark.parametrize(("name", "fault"), [(name, i) for name, faults in FAULTS.items() for i in range(len(faults))])
def test_arrays_that_do_not_fit_are_refused(captioner: Captioner, name: str, fault: int) -> None:
    assert captioner.neighbours is not None
    arrays = captioner.neighbours.arrays()
    size, entries = arrays["pooled"].shape[1], len(captioner.vocabulary)
    Neighbours.of_arrays(arrays, size, entries)
    with pytest.raises(ValueError, match="do not fit"):
        Neighbours.of_arrays({**arrays, name: FAULTS[name][fault](arrays[name])}, size, entries)
