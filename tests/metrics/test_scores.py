"""Laws of the caption scores: equal to the field's own scorers, and honest about how sure they are."""

import dataclasses
import math
import warnings
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings, strategies as st
from numpy.typing import NDArray
from pycocoevalcap.bleu.bleu import Bleu  # type: ignore[import-untyped]
from pycocoevalcap.cider.cider import Cider  # type: ignore[import-untyped]
from pycocoevalcap.rouge.rouge import Rouge  # type: ignore[import-untyped]

from capexp.data import vocabulary
from capexp.data.captions import read_splits
from capexp.errors import InputError
from capexp.metrics.scores import PhotoScores, paired_difference, score, tokenize, tutorial_bleu
from capexp.settings import CaptionsConfig

KEYS = ["bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider", "cider_plain"]
WORDS = ["a", "A", "dog", "runs", "on", "grass", "3", ".", "t-shirt"]

Photos = list[tuple[str, list[str]]]

captions = st.lists(st.sampled_from(WORDS), max_size=9).map(" ".join)
several_photos = st.lists(st.tuples(captions, st.lists(captions, min_size=1, max_size=4)), min_size=1, max_size=6)


def scored(photos: Photos) -> PhotoScores:
    return score([hypothesis for hypothesis, _ in photos], [references for _, references in photos])


def coco(photos: Photos) -> dict[str, float]:
    """pycocoevalcap on the same tokens; it cannot say CIDEr where no reference has a token."""
    said = {i: [" ".join(tokenize(hypothesis))] for i, (hypothesis, _) in enumerate(photos)}
    wanted = {i: [" ".join(tokenize(one)) for one in references] for i, (_, references) in enumerate(photos)}
    values = [*Bleu(4).compute_score(wanted, said, verbose=0)[0], Rouge().compute_score(wanted, said)[0]]
    if any(one for references in wanted.values() for one in references):
        values.append(Cider().compute_score(wanted, said)[0])
    else:
        with pytest.raises(ValueError, match="empty"):
            Cider().compute_score(wanted, said)
        values.append(0.0)
    return dict(zip(KEYS, values, strict=False))


def cider_by_definition(photos: Photos) -> float:
    """CIDEr as the paper writes it: dense vectors over all n-grams, frequencies as shares of the caption."""
    said = [tokenize(hypothesis) for hypothesis, _ in photos]
    wanted = [[tokenize(one) for one in references] for _, references in photos]
    total = 0.0
    for n in range(1, 5):

        def grams(tokens: tuple[str, ...], n: int = n) -> list[str]:
            return [" ".join(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]

        known = sorted({gram for one in chain(said, *wanted) for gram in grams(one)})
        holds = [[gram in {g for one in references for g in grams(one)} for gram in known] for references in wanted]
        idf = np.log(len(photos) / np.maximum(1, np.sum(holds, axis=0)))

        def vector(
            tokens: tuple[str, ...], idf: NDArray[np.float64] = idf, known: list[str] = known
        ) -> NDArray[np.float64]:
            counts = np.array([grams(tokens).count(gram) for gram in known], dtype=np.float64)
            weighed: NDArray[np.float64] = counts / max(1, counts.sum()) * idf
            return weighed

        for hypothesis, references in zip(said, wanted, strict=True):
            for one in references:
                norm = float(np.linalg.norm(vector(hypothesis)) * np.linalg.norm(vector(one)))
                cosine = float(vector(hypothesis) @ vector(one)) / norm if norm else 0.0
                total += cosine / len(references) / len(photos) / 4
    return 10 * total


def random_photos(photos: int, seed: int, noise: float) -> tuple[list[str], list[list[str]]]:
    """Captions that are a reference with some words replaced, and the references."""
    random = np.random.default_rng(seed)
    words = [f"w{i}" for i in range(60)]
    references = [[" ".join(random.choice(words, 9)) for _ in range(3)] for _ in range(photos)]
    hypotheses = []
    for own in references:
        tokens = own[0].split()
        hypotheses.append(" ".join(random.choice(words) if random.random() < noise else token for token in tokens))
    return hypotheses, references


@given(several_photos)
@settings(max_examples=150, deadline=None)
def test_corpus_scores_equal_the_coco_scorer_on_any_text(photos: Photos) -> None:
    ours = scored(photos).corpus()
    assert list(ours) == KEYS
    for key, theirs in coco(photos).items():
        assert ours[key] == pytest.approx(theirs, abs=1e-9), key


@given(several_photos)
@settings(max_examples=60, deadline=None)
def test_plain_cider_is_the_papers_and_never_below_cider_d(photos: Photos) -> None:
    scores = scored(photos)
    assert scores.corpus()["cider_plain"] == pytest.approx(cider_by_definition(photos), abs=1e-9)
    assert np.all(scores.cider <= scores.cider_plain + 1e-9)


@pytest.mark.parametrize(
    ("hypothesis", "references"),
    [("", ["a dog"]), ("", [""]), ("", ["", "a dog"]), ("dog", ["dog"]), ("a dog", ["."]), ("a a a a a", ["a", "a a"])],
)
def test_small_and_empty_captions_score_as_the_coco_scorer_has_it(hypothesis: str, references: list[str]) -> None:
    for photos in ([(hypothesis, references)], [(hypothesis, references), ("a dog runs", ["a dog runs on grass"])]):
        ours = scored(photos).corpus()
        assert all(math.isfinite(value) for value in ours.values())
        assert {key: ours[key] for key in KEYS[:6]} == pytest.approx(coco(photos), abs=1e-9)


@pytest.mark.slow
def test_real_captions_score_as_the_coco_scorer_has_it(flickr8k: Path) -> None:
    split = read_splits(CaptionsConfig(root=flickr8k), ("dev",))["dev"]
    photos = [(one, list(others)) for one, *others in split.references]
    ours = scored(photos).corpus()
    assert {key: ours[key] for key in KEYS[:6]} == pytest.approx(coco(photos), abs=1e-9)
    assert 0.7 < ours["cider"] < 0.9  # a person against four others


def test_a_caption_equal_to_its_only_reference_has_the_highest_scores() -> None:
    texts = ["a dog runs on grass", "two men ride one horse .", "the old red boat at sea"]
    best = score(texts, [[text] for text in texts]).corpus()
    expected = {key: 10.0 if key.startswith("cider") else 1.0 for key in KEYS}
    assert best == pytest.approx(expected, abs=1e-8)


def test_the_score_of_one_photo_has_no_cider_for_no_word_tells_it_from_others() -> None:
    alone = score(["a dog runs on grass"], [["a dog runs on grass"]]).corpus()
    assert alone["bleu_4"] == pytest.approx(1, abs=1e-8)
    assert alone["cider"] == alone["cider_plain"] == 0


def test_the_order_of_photos_and_of_references_does_not_matter() -> None:
    hypotheses, references = random_photos(20, seed=3, noise=0.3)
    forward = score(hypotheses, references).corpus()
    backward = score(hypotheses[::-1], [own[::-1] for own in references[::-1]]).corpus()
    assert backward == pytest.approx(forward, rel=1e-12)


def test_resamples_of_two_photos_are_the_scores_of_their_three_mixtures() -> None:
    photos = [("a dog runs on grass", ["a dog runs"]), ("two men ride a horse", ["one man rides a horse there"])]
    first, second = photos
    mixtures = [scored(mixture).corpus() for mixture in ([first, first], photos, [second, second])]
    resampled = scored(photos).resampled(4000, seed=5)
    for key in KEYS[:5]:
        near = np.abs(resampled[key][:, None] - [mixture[key] for mixture in mixtures]) < 1e-12  # (S, 3)
        assert near.mean(axis=0) == pytest.approx([0.25, 0.5, 0.25], abs=0.03)
        assert np.all(near.any(axis=1))


def test_resamples_spread_as_the_mean_of_that_many_photos_does() -> None:
    scores = score(*random_photos(200, seed=4, noise=0.4))
    resampled = scores.resampled(12_000, seed=1)  # more than are drawn at once
    for key in ("rouge_l", "cider", "cider_plain"):
        per_photo = getattr(scores, key)
        assert resampled[key].shape == (12_000,)
        assert resampled[key].mean() == pytest.approx(per_photo.mean(), rel=0.01)
        assert resampled[key].std() == pytest.approx(per_photo.std() / math.sqrt(200), rel=0.05)


def test_intervals_contain_their_values_and_narrow_with_more_photos() -> None:
    widths = []
    for photos in (30, 480):
        scores = score(*random_photos(photos, seed=2, noise=0.4))
        values, intervals = scores.corpus(), scores.intervals()
        assert list(intervals) == KEYS
        assert all(low < values[key] < high for key, (low, high) in intervals.items())
        widths.append(np.array([high - low for low, high in intervals.values()]))
    assert widths[1] / widths[0] == pytest.approx(np.full(len(KEYS), 0.25), rel=0.5)


def test_the_bootstrap_is_seeded() -> None:
    scores = score(*random_photos(40, seed=2, noise=0.4))
    other = score(*random_photos(40, seed=2, noise=0.6))
    assert scores.intervals(200, seed=7) == scores.intervals(200, seed=7) != scores.intervals(200, seed=8)
    assert paired_difference(scores, other, 200, seed=7) == paired_difference(scores, other, 200, seed=7)
    assert paired_difference(scores, other, 200, seed=7) != paired_difference(scores, other, 200, seed=8)


def test_nothing_differs_from_itself() -> None:
    scores = score(*random_photos(40, seed=2, noise=0.4))
    for difference in paired_difference(scores, scores, 500).values():
        assert (difference.value, difference.low, difference.high, difference.p) == (0, 0, 0, 1)


def test_photos_captioned_alike_speak_for_neither_captioner() -> None:
    hypotheses, references = random_photos(10, seed=2, noise=0.4)
    a, b = score([references[0][0], *hypotheses[1:]], references), score(["w1", *hypotheses[1:]], references)
    without_the_first = 0.9**10
    for difference in paired_difference(a, b).values():
        assert difference.low == 0 < difference.value
        assert difference.p == pytest.approx(2 * without_the_first, abs=0.03)


def test_a_clearly_better_captioner_has_a_small_p_and_the_reverse_has_the_same() -> None:
    better, references = random_photos(100, seed=2, noise=0.2)
    worse, _ = random_photos(100, seed=2, noise=0.7)
    a, b = score(better, references), score(worse, references)
    forth, back = paired_difference(a, b, 1000), paired_difference(b, a, 1000)
    assert list(forth) == KEYS
    for key, difference in forth.items():
        assert difference.value == a.corpus()[key] - b.corpus()[key]
        assert 0 < difference.low < difference.value < difference.high
        assert difference.p == back[key].p == 2 / 1001  # the least that 1000 resamples can say
        assert (back[key].low, back[key].high) == pytest.approx((-difference.high, -difference.low))


def test_p_is_below_a_twentieth_about_once_in_twenty_where_there_is_no_difference() -> None:
    base, random = score(*random_photos(60, seed=2, noise=0.4)), np.random.default_rng(0)
    small = 0
    for trial in range(200):
        a, b = (dataclasses.replace(base, rouge_l=random.normal(0.4, 0.1, 60)) for _ in range(2))
        small += paired_difference(a, b, 300, seed=trial)["rouge_l"].p < 0.05
    assert 2 <= small <= 22


@pytest.mark.slow
@given(several_photos)
@settings(max_examples=100, deadline=None)
def test_the_tutorials_bleu_equals_nltk(photos: Photos) -> None:
    assert_tutorial_bleu_equals_nltk([hypothesis for hypothesis, _ in photos], [own for _, own in photos])


def test_the_tutorials_bleu_equals_nltk_where_nothing_but_start_and_end_matches() -> None:
    for hypothesis in ("", "dog", "dog runs", "dog runs on green grass today"):
        assert_tutorial_bleu_equals_nltk([hypothesis], [["two men there", "a"]])
    values = tutorial_bleu(["dog runs"], [["two men"]])
    assert values["tutorial_bleu_1"] == pytest.approx(0.5)
    assert values["tutorial_bleu_4"] < 1e-70


@pytest.mark.slow
def test_the_tutorials_bleu_equals_nltk_on_real_captions(flickr8k: Path) -> None:
    split = read_splits(CaptionsConfig(root=flickr8k), ("dev",))["dev"]
    assert_tutorial_bleu_equals_nltk([own[0] for own in split.references], [own[1:] for own in split.references])


def assert_tutorial_bleu_equals_nltk(hypotheses: list[str], references: Sequence[Sequence[str]]) -> None:
    from nltk.translate.bleu_score import corpus_bleu  # type: ignore[import-untyped]

    def framed(caption: str) -> list[str]:
        return ["startseq", *vocabulary.tokenize(caption, "tutorial", "words"), "endseq"]

    weights = [(1.0, 0, 0, 0), (0.5, 0.5, 0, 0), (0.3, 0.3, 0.3, 0), (0.25, 0.25, 0.25, 0.25)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # NLTK's, of no matches
        theirs = [
            corpus_bleu(
                [[framed(one) for one in own] for own in references], [framed(one) for one in hypotheses], order
            )
            for order in weights
        ]
    ours = tutorial_bleu(hypotheses, references)
    assert list(ours) == [f"tutorial_bleu_{order}" for order in range(1, 5)]
    assert list(ours.values()) == pytest.approx(theirs, rel=1e-9, abs=1e-300)


@given(captions)
def test_tokens_hold_a_letter_or_digit_and_stay_tokens(caption: str) -> None:
    tokens = tokenize(caption)
    assert tokenize(" ".join(tokens)) == tokens
    assume(caption)
    assert tokens == tuple(word.lower() for word in caption.split() if word != ".")


@pytest.mark.parametrize("scorer", [score, tutorial_bleu])
def test_no_photos_and_photos_without_references_are_refused(scorer: type) -> None:
    with pytest.raises(InputError, match="0 photos"):
        scorer([], [])
    with pytest.raises(InputError, match=r"photo 1 \(counted from 0\) of 3 has no reference"):
        scorer(["a", "b", "c"], [["a"], [], ["c"]])
    with pytest.raises(AssertionError):
        scorer(["a"], [["a"], ["b"]])


def test_captioners_are_compared_on_as_many_photos() -> None:
    with pytest.raises(AssertionError):
        paired_difference(score(["a"], [["a"]]), score(["a", "b"], [["a"], ["b"]]))
