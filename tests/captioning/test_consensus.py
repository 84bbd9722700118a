"""Agreement of captions, held against CIDEr-D and what can be said by hand."""

import itertools
import math

import numpy as np
import pytest

from capexp.captioning.consensus import Tokens, agreement
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
    np.testing.assert_allclose(agreement(long, others), expected, rtol=1e-12, atol=1e-12)


def test_a_caption_agrees_with_itself_wholly_and_with_strangers_not_at_all() -> None:
    long = (4, 5, 6, 7)
    for tokens in (long, (4, 5), (4,), ()):
        assert agreement([tokens], [tokens]) == pytest.approx([1])
    # Of strangers the end alone is common: a word of five and one of four, of the four orders one.
    assert agreement([long], [(8, 9, 10)]) == pytest.approx([math.exp(-1 / 72) / math.sqrt(5 * 4) / 4])


def test_a_majority_of_one_word_wins() -> None:
    candidates = [(5, 6, 7, 8), (4,)]
    assert agreement(candidates, [(4,)] * 7 + [(5, 6, 7, 8)] * 4).argmax() == 1


def test_what_most_say_is_agreed_with_most_in_whatever_order() -> None:
    captions = [(4, 5, 6), (4, 5, 7), (4, 5, 6, 7), (9, 9, 9)]
    found = agreement(captions, captions)
    assert found.argmin() == 3
    for order in itertools.permutations(range(4)):
        shuffled = [captions[i] for i in order]
        np.testing.assert_allclose(agreement(shuffled, captions), found[list(order)])
        np.testing.assert_allclose(agreement(captions, shuffled), found)
