"""Maps of where an attention captioner looked."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from capexp.captioning.captioner import Captioner
from capexp.data.vgg16 import EncoderIdentity
from capexp.data.vgg16_weights import NETS
from capexp.data.vocabulary import Vocabulary
from capexp.errors import InputError
from capexp.report.attention_maps import draw_maps, require_attention
from capexp.settings import DecodingConfig, ModelConfig


@pytest.mark.parametrize("words", [1, 7])
def test_each_word_has_the_photo_lit_where_it_was_looked_at(tmp_path: Path, words: int) -> None:
    Image.new("RGB", (200, 100), "white").save(tmp_path / "photo.png")
    maps = np.full((words, 7, 7), 1e-4, np.float32)
    maps[:, :, 0] = 1 / 7  # the left edge
    caption = " ".join(["dog"] * words)
    path = draw_maps(tmp_path / "photo.png", caption.split(), maps, tmp_path / "new" / "maps.png")
    pixels = np.asarray(Image.open(path).convert("L"), np.float32)
    assert (pixels < 60).any(), "dark where it did not look"
    assert (pixels > 250).mean() > 0.3


def test_a_captioner_that_looks_at_no_places_is_refused() -> None:
    net = NETS["IMAGENET1K_FEATURES"]
    identity = EncoderIdentity("conv5_3", "mean", net.mean, net.std, "0" * 64, "none")
    words = Vocabulary(("dog",), "standard", "token")
    captioner = Captioner.fresh(ModelConfig(embedding_size=4, lstm_units=4), words, identity, DecodingConfig(), 1)
    with pytest.raises(InputError, match=r"--maps.*as a whole.*'attention'"):
        require_attention(captioner)
