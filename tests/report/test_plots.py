"""The pictures that a run leaves."""

from pathlib import Path

import pytest
from PIL import Image

from capexp.captioning.captioner import Caption
from capexp.captioning.evaluation import CaptionScores, score_captions
from capexp.data.captions import Split
from capexp.errors import InputError
from capexp.report.plots import draw_histogram, draw_losses, draw_scores
from capexp.training.loop import Epoch


def epoch(number: int, dev_loss: float) -> Epoch:
    return Epoch(number, dev_loss - 0.1, dev_loss, 1e-3, 1.0, 100.0, improved=True, ended_at=0)


def scores(photos: int) -> CaptionScores:
    names = tuple(f"{number}.jpg" for number in range(photos))
    references = tuple((f"a dog {number} runs on the grass .",) for number in range(photos))
    said = [Caption(f"a dog {number} sits on the grass", -1.0) for number in range(photos)]
    return score_captions(said, Split("dev", Path(), names, references), seed=1)


def assert_picture(path: Path) -> None:
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert picture.width > 800
        colors = picture.convert("RGB").getcolors(2**24)
    assert colors is not None and len(colors) > 50  # more than an empty frame


@pytest.mark.parametrize("losses", [[3.0], [3.0, 2.5, 2.7]])
def test_losses_are_a_picture_for_one_epoch_and_for_many(tmp_path: Path, losses: list[float]) -> None:
    epochs = [epoch(number, loss) for number, loss in enumerate(losses, start=1)]
    assert_picture(draw_losses(epochs, "title", tmp_path / "loss.png"))


@pytest.mark.parametrize("photos", [1, 2, 30])
def test_scores_are_pictures_for_one_photo_and_for_many(tmp_path: Path, photos: int) -> None:
    assert_picture(draw_scores(scores(photos), 1, "title", tmp_path / "scores.png"))
    assert_picture(draw_histogram(scores(photos), "title", tmp_path / "cider.png"))


def test_a_folder_that_is_not_there_is_told_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be written"):
        draw_losses([epoch(1, 3.0)], "title", tmp_path / "nowhere" / "loss.png")
