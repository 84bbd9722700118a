"""``capexp.load``: a captioner in Python, called with photos in any form."""

import io
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import capexp
from capexp.captioning.captioner import Caption, Captioner
from capexp.data.vgg16 import identify
from capexp.data.vocabulary import Vocabulary
from capexp.errors import InputError
from capexp.settings import DecodingConfig, FeaturesConfig, ModelConfig

ROOT = Path(__file__).parents[1]
WORDS = Vocabulary(("dog", "runs", "snow", "a", "the"), "standard", "token", "words")


def saved(folder: Path, weights: Path, **model: object) -> Path:
    config = FeaturesConfig(layer="conv5_3", pool="max2", size=96, weights=str(weights))
    small = ModelConfig.model_validate({"embedding_size": 8, "lstm_units": 8} | model)
    captioner = Captioner.fresh(small, WORDS, identify(config), DecodingConfig(maximum_length=5), seed=3)
    return captioner.save(folder)


@pytest.fixture(scope="module")
def captioner(random_vgg16: Path, tmp_path_factory: pytest.TempPathFactory) -> Captioner:
    bundle = saved(tmp_path_factory.mktemp("door") / "bundle", random_vgg16, decoder="attention", attention_size=8)
    return capexp.load(bundle, device="cpu", weights=str(random_vgg16))


@pytest.fixture(scope="module")
def photo(scenes: Path) -> Path:
    return min((scenes / "Scenes_Dataset").iterdir())


def test_a_photo_in_any_form_gives_the_same_caption(captioner: Captioner, photo: Path) -> None:
    with Image.open(photo) as image:
        forms: list[Any] = [
            photo,
            str(photo),
            photo.read_bytes(),
            bytearray(photo.read_bytes()),
            image,
            np.asarray(image.convert("RGB")),
        ]
        captions = [captioner(form) for form in forms]
    with photo.open("rb") as file:
        captions.append(captioner(file))
    assert all(isinstance(caption, Caption) for caption in captions)
    assert len({(caption.text, caption.log_probability) for caption in captions}) == 1
    assert captions[0] == captioner.caption_photos([photo])[0]


@pytest.mark.slow
def test_a_list_gives_a_list_and_an_iterator_reads_as_it_is_asked(captioner: Captioner, photo: Path) -> None:
    one = captioner(photo)
    assert captioner([photo, photo.read_bytes()]) == [one, one]
    assert captioner([]) == []
    taken = 0

    def photos() -> Iterator[Path]:
        nonlocal taken
        for taken in range(1, 41):  # noqa: B007
            yield photo

    captions = captioner(photos())
    assert taken == 0
    assert next(captions) == one
    assert 0 < taken < 40
    assert sum(1 for _ in captions) == 39


def test_decoding_settings_are_keyword_arguments(captioner: Captioner, photo: Path) -> None:
    beam = captioner(photo, method="beam", beam_width=3, maximum_length=2)
    assert len(beam.alternatives) == 2 and len(beam.text.split()) <= 2
    assert captioner.decoding.method == "greedy", "its own settings stay"
    for wrong in ({"beam": 3}, {"method": "nucleus"}, {"beam_width": 0}):
        with pytest.raises(InputError, match="decoding"):
            captioner(photo, **wrong)


def test_an_attention_captioner_tells_where_it_looked(
    captioner: Captioner, photo: Path, random_vgg16: Path, tmp_path: Path
) -> None:
    caption = captioner(photo)
    assert caption.attention is not None
    assert caption.attention.shape == (len(caption.text.split()), 3, 3)
    assert caption.attention.sum((1, 2)) == pytest.approx(1, abs=1e-5)
    config = FeaturesConfig(layer="conv5_3", pool="mean", weights=str(random_vgg16))
    small = ModelConfig(embedding_size=8, lstm_units=8)
    merge = Captioner.fresh(small, WORDS, identify(config), DecodingConfig(), seed=3).save(tmp_path / "merge")
    assert capexp.load(str(merge), weights=str(random_vgg16))(photo).attention is None


def test_what_is_no_photo_is_refused_in_one_line(captioner: Captioner, photo: Path, tmp_path: Path) -> None:
    grey, floats, empty = np.zeros((8, 8), np.uint8), np.zeros((8, 8, 3), np.float32), np.zeros((0, 8, 3), np.uint8)
    told: dict[str, Any] = {
        "no such file": tmp_path / "nothing.jpg",
        "cannot be read as a picture": b"no picture",
        r"an array \(8, 8\) of uint8; give": grey,
        "of float32; give": floats,
        r"an array \(0, 8, 3\)": empty,
    }
    for words, wrong in told.items():
        with pytest.raises(InputError, match=words):
            captioner(wrong)
        with pytest.raises(InputError, match=words):
            captioner([photo, wrong])
    with pytest.raises(InputError, match="neither a bundle's folder"):
        capexp.load(tmp_path / "nowhere")


def test_an_image_that_the_caller_has_opened_stays_open_and_as_it_was(captioner: Captioner, photo: Path) -> None:
    content = io.BytesIO(photo.read_bytes())
    image = Image.open(content)
    captioner(image)
    assert not content.closed and image.size == Image.open(photo).size


def test_the_import_does_nothing_else() -> None:
    code = (
        "import sys, capexp; assert capexp.load; "
        "print(*[name for name in sys.modules if name.startswith(('capexp.', 'torch', 'mlflow', 'numpy'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
