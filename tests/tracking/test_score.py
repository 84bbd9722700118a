"""Who becomes champion."""

import pytest

from capexp.settings import Metric, TokenRule
from capexp.tracking.registry import Score


def score(
    metric: Metric,
    loss: float,
    cider: float,
    dev: str = "dev split",
    words: str = "vocabulary",
    rule: TokenRule = "words",
) -> Score:
    return Score(metric, {"dev_loss": loss, "dev_cider": cider}, dev, words, rule)


HOLDER = score("dev_loss", 2.8, 0.35).tags()


@pytest.mark.parametrize(
    ("challenger", "earned", "reason"),
    [
        (score("dev_loss", 2.79, 0.1), True, "dev_loss 2.7900 is better than 2.8000 of version 4"),
        (score("dev_loss", 2.8, 0.9), False, "not better"),
        (score("dev_loss", 2.9, 0.9), False, "not better"),
        (score("dev_loss", 1.0, 0.9, dev="other photos"), False, "another dev split"),
        (score("dev_loss", 1.0, 0.9, words="other words"), False, "another vocabulary"),
        (score("dev_cider", 2.9, 0.36), True, "dev_cider 0.3600 is better than 0.3500 of version 4"),
        (score("dev_cider", 1.0, 0.35), False, "dev_cider 0.3500 is not better"),
        (score("dev_cider", 1.0, 0.9, dev="other photos"), False, "another dev split"),
        (score("dev_cider", 1.0, 0.9, words="other words"), True, "better"),
        (score("dev_cider", 1.0, 0.9, rule="whitespace"), False, "split by the rule words, this one by whitespace"),
        (score("dev_loss", 2.0, 0.9, rule="whitespace"), True, "better"),  # the vocabulary's digest says the same
        (score("dev_loss", float("nan"), 0.9), False, "not better"),
    ],
)
def test_only_a_better_score_on_the_same_ground_wins(challenger: Score, earned: bool, reason: str) -> None:
    won, why = challenger.beats(HOLDER, "4")
    assert won is earned
    assert reason in why


@pytest.mark.parametrize("metric", ["dev_loss", "dev_cider"])
def test_a_champion_without_the_metric_is_not_beaten_silently(metric: Metric) -> None:
    lacking = {name: value for name, value in HOLDER.items() if name != metric}
    won, why = score(metric, 1.0, 2.0).beats(lacking, "1")
    assert not won
    assert f"has no {metric}" in why


def test_a_champion_of_before_was_scored_on_words_as_they_were_written() -> None:
    before = {name: value for name, value in HOLDER.items() if name != "tokens"}
    won, why = score("dev_cider", 1.0, 2.0).beats(before, "1")
    assert not won and "split by the rule whitespace, this one by words" in why
    assert score("dev_cider", 1.0, 2.0, rule="whitespace").beats(before, "1")[0]
