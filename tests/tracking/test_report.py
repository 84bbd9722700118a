"""The pictures and pages that a run leaves."""

import base64
from pathlib import Path

import pytest
from PIL import Image

from capexp.tracking.report import Sample, draw_curves, write_gallery
from capexp.training.fit import Epoch


def epoch(number: int, dev_loss: float) -> Epoch:
    return Epoch(number, dev_loss - 0.1, dev_loss, 1e-3, 1.0, 100.0, improved=True, ended_at=0)


@pytest.mark.parametrize("losses", [[3.0], [3.0, 2.5, 2.7]])
def test_curves_are_a_picture_for_one_epoch_and_for_many(tmp_path: Path, losses: list[float]) -> None:
    epochs = [epoch(number, loss) for number, loss in enumerate(losses, start=1)]
    with Image.open(draw_curves(epochs, "title", tmp_path / "loss.png")) as picture:
        assert picture.format == "PNG"
        assert picture.width > 800


def test_the_gallery_stands_alone_escapes_words_and_carries_no_metadata(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x010E] = "where the photographer lives"
    Image.new("RGB", (900, 600), "red").save(tmp_path / "photo.jpg", exif=exif)
    sample = Sample(tmp_path / "photo.jpg", "<script>a dog</script>", -3.2, ("A dog & a <b>cat</b> .",))
    page = write_gallery([sample], "one & two", tmp_path / "captions.html").read_text(encoding="utf-8")
    assert "&lt;script&gt;a dog" in page
    assert "<b>cat" not in page
    assert "one &amp; two" in page
    assert "http" not in page
    assert page.count("data:image/jpeg;base64,") == 1
    data = base64.b64decode(page.split("base64,")[1].split('"')[0])
    (tmp_path / "inlined.jpg").write_bytes(data)
    with Image.open(tmp_path / "inlined.jpg") as inlined:
        assert max(inlined.size) <= 224
        assert not inlined.getexif()
