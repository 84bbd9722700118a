"""Who becomes champion."""

import pytest

from capexp.tracking.registry import Score, compare

HOLDER = Score("dev_loss", 2.8, "dev split", "vocabulary").tags()


@pytest.mark.parametrize(
    ("score", "earned", "reason"),
    [
        (Score("dev_loss", 2.79, "dev split", "vocabulary"), True, "2.7900 is better than 2.8000 of version 4"),
        (Score("dev_loss", 2.8, "dev split", "vocabulary"), False, "not better"),
        (Score("dev_loss", 2.9, "dev split", "vocabulary"), False, "not better"),
        (Score("dev_loss", 1.0, "other photos", "vocabulary"), False, "another dev split"),
        (Score("dev_loss", 1.0, "dev split", "other words"), False, "another vocabulary"),
    ],
)
def test_only_a_better_score_on_the_same_ground_wins(score: Score, earned: bool, reason: str) -> None:
    won, why = compare(score, HOLDER, "4")
    assert won is earned
    assert reason in why


def test_a_champion_without_the_metric_is_not_beaten_silently() -> None:
    won, why = compare(Score("dev_loss", 1.0, "d", "v"), {"dev_digest": "d", "vocabulary_digest": "v"}, "1")
    assert not won
    assert "has no dev_loss" in why
