"""Agreement of captions, held against CIDEr-D and what can be said by hand."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest

from capexp.captioning.consensus import Tokens, agreement
from capexp.data.vocabulary import EOS
from capexp.metrics.cider import CiderReferences

CAPTIONS: list[Tokens] = [
    *((4, 5, 6, 7), (4, 5, 6), (5, 4, 6, 7, 4, 5), (8, 8, 8, 8), (4,), (), (9, 10, 11, 12, 13, 14, 15)),
    *((4, 5, 6, 7, 4, 5, 6, 7, 4, 5, 6, 7, 4, 5, 6, 7), (6, 7)),
]


@pytest.mark.parametrize("others", [CAPTIONS, CAPTIONS[:1], CAPTIONS[2:5]], ids=len)
def test_it_is_cider_d_where_every_ngram_is_as_rare_as_any(others: list[Tokens]) -> None:
    # Of two photos, nothing is said of both: so each n-gram is of one photo, those that nobody has said count so too.
    people = CiderReferences([[(*map(str, tokens), "end") for tokens in others], [("else",)]])
    long = [tokens for tokens in CAPTIONS if len(tokens) > 2]  # which have n-grams of all orders
    ids = [people.token_ids((*map(str, tokens), "end")) for tokens in long]
    expected = people.score([0] * len(long), ids)[:, 0] / 10
    np.testing.assert_allclose(agreement([long], [others])[0], expected, rtol=1e-12, atol=1e-12)


def test_a_caption_agrees_with_itself_wholly_and_with_strangers_not_at_all() -> None:
    long = (4, 5, 6, 7)
    for tokens in (long, (4, 5), (4,), ()):
        assert agreement([[tokens]], [[tokens]])[0] == pytest.approx([1])
    # Of strangers the end alone is common: a word of five and one of four, of the four orders one.
    assert agreement([[long]], [[(8, 9, 10)]])[0] == pytest.approx([math.exp(-1 / 72) / math.sqrt(5 * 4) / 4])


def test_a_majority_of_one_word_wins() -> None:
    candidates = [(5, 6, 7, 8), (4,)]
    assert agreement([candidates], [[(4,)] * 7 + [(5, 6, 7, 8)] * 4])[0].argmax() == 1


def test_what_most_say_is_agreed_with_most_in_whatever_order() -> None:
    captions = [(4, 5, 6), (4, 5, 7), (4, 5, 6, 7), (9, 9, 9)]
    found = agreement([captions], [captions])[0]
    assert found.argmin() == 3
    for order in itertools.permutations(range(4)):
        shuffled = [captions[i] for i in order]
        np.testing.assert_allclose(agreement([shuffled], [captions])[0], found[list(order)])
        np.testing.assert_allclose(agreement([captions], [shuffled])[0], found)


def plain_agreement(candidate: Tokens, others: list[Tokens]) -> float:
    """Return the mean similarity of one candidate, from counters of its n-grams."""

    def counts(tokens: Tokens, order: int) -> Counter[Tokens]:
        return Counter((*tokens, EOS)[i : i + order] for i in range(len(tokens) + 2 - order))

    similarities = []
    for other in others:
        cosines = []
        for order in range(1, min(max(len(candidate), len(other)) + 1, 4) + 1):
            a, b = counts(candidate, order), counts(other, order)
            norms = math.sqrt(sum(n * n for n in a.values()) * sum(n * n for n in b.values()))
            cosines.append(sum(min(a[ngram], b[ngram]) * b[ngram] for ngram in a) / norms if norms else 0.0)
        penalty = math.exp(-((len(candidate) - len(other)) ** 2) / 72)
        similarities.append(penalty * sum(cosines) / len(cosines))
    return sum(similarities) / len(similarities)


@pytest.mark.parametrize("words", [2, 12, 2000], ids="{} words".format)
def test_many_photos_at_once_are_as_counted_one_by_one(words: int) -> None:
    rng = np.random.default_rng(words)

    def captions(count: int) -> list[Tokens]:
        return [tuple(rng.integers(4, 4 + words, rng.integers(0, 12)).tolist()) for _ in range(count)]

    candidates = [captions(count) for count in (3, 1, 10, 10)]
    others = [of_photo + captions(count) for of_photo, count in zip(candidates, (0, 5, 40, 7), strict=True)]
    found = agreement(candidates, others)
    assert [len(of_photo) for of_photo in found] == [3, 1, 10, 10]
    for values, mine, theirs in zip(found, candidates, others, strict=True):
        np.testing.assert_allclose(values, [plain_agreement(one, theirs) for one in mine], rtol=1e-12)
