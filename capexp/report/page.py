"""The page to try a captioner. Only this module imports Streamlit, which runs it again at each change on the page."""

import math
import re
import threading
from dataclasses import dataclass, field

import streamlit as st

from capexp.captioning.captioner import Caption, Captioner
from capexp.data.photos import MAXIMUM_UPLOAD, read_photo
from capexp.errors import InputError
from capexp.report import attention_maps as maps
from capexp.settings import DecodingConfig

_METHODS = ("greedy", "beam", "consensus", "sample")
_WIDEST_BEAM = 10
_MAP_PIXELS = 150  # the width of an attention map
_PHOTO_PIXELS = 1200  # the longer side of the photo on the page


@dataclass(frozen=True)
class ServedCaptioner:
    """The captioner of the page, the ``--model`` that names it, and its default decoding settings."""

    captioner: Captioner
    model: str
    decoding: DecodingConfig
    turn: threading.Lock = field(default_factory=threading.Lock)
    """Held while a photo is captioned: one at a time, however many visitors there are, because each takes all cores."""


_served: list[ServedCaptioner] = []  # at most one, the captioner of this process


def serve(served: ServedCaptioner, host: str, port: int) -> None:
    """Serve the page until the process is interrupted. It loads nothing from other machines, and sends them nothing."""
    _served[:] = [served]
    local = host in ("127.0.0.1", "localhost", "::1")
    st.App(__file__).run(
        config={
            "server.address": host,
            "server.port": port,
            "server.headless": True,  # opens no browser, asks for no e-mail address
            "server.maxUploadSize": MAXIMUM_UPLOAD // 2**20,
            "server.maxMessageSize": 2 * MAXIMUM_UPLOAD // 2**20,
            "server.allowedHosts": ["127.0.0.1", "localhost", "::1"] if local else [],  # against DNS rebinding
            "server.fileWatcherType": "none",
            "browser.gatherUsageStats": False,
            "logger.hideWelcomeMessage": True,
            "client.toolbarMode": "minimal",
            "client.showErrorDetails": "none",  # a defect's traceback goes to the terminal
            "client.showErrorLinks": False,
            "client.allowedOrigins": [],
        }
    )


def show() -> None:
    """Draw the page."""
    (served,) = _served
    # The controls.
    st.set_page_config(page_title="capexp", layout="centered")
    st.title("What is in the photo?")
    st.caption(_plain(served.model))
    upload = st.file_uploader("A photo", help="Any picture that Pillow reads; it stays in this computer's memory.")
    left, right = st.columns(2)
    method = left.radio("Method", _METHODS, index=_METHODS.index(served.decoding.method), horizontal=True)
    vocabulary = served.captioner.vocabulary
    widest_beam = min(max(_WIDEST_BEAM, served.decoding.beam_width), len(vocabulary) - len(vocabulary.never_emitted))
    width = right.number_input(
        "Beam width", 1, widest_beam, min(served.decoding.beam_width, widest_beam),
        disabled=method not in ("beam", "consensus"),
        help="How many captions beam search follows at once, and shows.",
    )  # fmt: skip
    if upload is None:
        return
    # The photo and its caption.
    decoding = served.decoding.model_copy(update={"method": method, "beam_width": width})
    content = upload.getvalue()
    try:
        photo = read_photo(content)
    except InputError as error:
        st.error(_plain(str(error)))
        return
    photo.thumbnail((_PHOTO_PIXELS, _PHOTO_PIXELS))
    left, right = st.columns(2)  # on a phone the caption comes first, then the photo
    right.image(photo, width="stretch")
    with left, st.spinner("Captioning the photo"), served.turn:
        (result,) = served.captioner.caption_photos([content], decoding)
    if isinstance(result, InputError):
        left.error(_plain(str(result)))
        return
    with left:
        _show_caption(result)
    # The attention maps.
    if served.captioner.has_maps and result.text:
        with served.turn:
            weights = maps.attention_of(served.captioner, content, result.text)
        overlays = maps.overlay_attention(content, served.captioner.vocabulary.spell(result.text), weights)
        st.caption("Attention map of each word")
        st.image([photo for _, photo in overlays], [_plain(word) for word, _ in overlays], width=_MAP_PIXELS)


def _show_caption(caption: Caption) -> None:
    """Show the caption with its probability, and a table of the other hypotheses of the beam."""
    st.subheader(_plain(caption.text), anchor=False)
    st.caption(_plain(f"probability {_percent(caption.log_probability)}"))
    if caption.alternatives:
        others = caption.alternatives
        st.table(
            {
                "Or": [_plain(other.text) for other in others],
                "Probability": [_plain(_percent(other.log_probability)) for other in others],
            }
        )


def _percent(log_probability: float) -> str:
    return f"{100 * math.exp(log_probability):.2g}%"


def _plain(text: str) -> str:
    """Escape text for Markdown: a vocabulary may contain any character."""
    return re.sub(r"([^\w\s])", r"\\\1", text)


if __name__ == "__main__":  # Streamlit runs the file as a script, apart from the module in which ``serve`` was called
    from capexp.report import page

    page.show()
