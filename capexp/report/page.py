"""The page to try a captioner. Streamlit is imported here alone; it runs this file anew at each change on the page."""

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
_WIDEST = 10
_LIT_PIXELS = 150  # the width of one of those that show where the decoder looked
_SHOWN_PIXELS = 1200  # the longer side of the photo as the page shows it


@dataclass(frozen=True)
class Shown:
    """What the page shows: a captioner, the name it was asked for by, and how it decodes unless told otherwise."""

    captioner: Captioner
    model: str
    decoding: DecodingConfig
    turn: threading.Lock = field(default_factory=threading.Lock)
    """One photo at a time, however many visitors: each takes all cores."""


_shown: list[Shown] = []  # the one that this process serves


def serve(shown: Shown, host: str, port: int) -> None:
    """Serves the page until the process is interrupted: nothing is loaded from, or told to, any other machine."""
    _shown[:] = [shown]
    local = host in ("127.0.0.1", "localhost", "::1")
    st.App(__file__).run(
        config={
            "server.address": host,
            "server.port": port,
            "server.headless": True,  # opens no browser, asks for no e-mail address
            "server.maxUploadSize": MAXIMUM_UPLOAD // 2**20,
            "server.maxMessageSize": 2 * MAXIMUM_UPLOAD // 2**20,
            "server.allowedHosts": ["127.0.0.1", "localhost", "::1"] if local else [],  # no rebound names
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
    """Draws the page."""
    (shown,) = _shown
    st.set_page_config(page_title="capexp", layout="centered")
    st.title("What is in the photo?")
    st.caption(_plain(shown.model))
    upload = st.file_uploader("A photo", help="Any picture that Pillow reads; it stays in this computer's memory.")
    left, right = st.columns(2)
    method = left.radio("Method", _METHODS, index=_METHODS.index(shown.decoding.method), horizontal=True)
    vocabulary = shown.captioner.vocabulary
    widest = min(max(_WIDEST, shown.decoding.beam_width), len(vocabulary) - len(vocabulary.never_emitted))
    width = right.number_input(
        "Beam width", 1, widest, min(shown.decoding.beam_width, widest), disabled=method not in ("beam", "consensus"),
        help="How many captions beam search follows at once, and shows.",
    )  # fmt: skip
    if upload is None:
        return
    decoding = shown.decoding.model_copy(update={"method": method, "beam_width": width})
    content = upload.getvalue()
    try:
        photo = read_photo(content)
    except InputError as error:
        st.error(_plain(str(error)))
        return
    photo.thumbnail((_SHOWN_PIXELS, _SHOWN_PIXELS))
    left, right = st.columns(2)  # on a phone the caption comes first, then the photo
    right.image(photo, width="stretch")
    with left, st.spinner("looking"), shown.turn:
        (result,) = shown.captioner.caption_photos([content], decoding)
    if isinstance(result, InputError):
        left.error(_plain(str(result)))
        return
    with left:
        _answer(result)
    if shown.captioner.decoder.has_attention and result.text:
        with shown.turn:
            looked = maps.where_it_looked(shown.captioner, content, result.text)
        lit = maps.light_up(content, result.text, looked)
        st.caption("Where it looked as it said each word")
        st.image([photo for _, photo in lit], [_plain(word) for word, _ in lit], width=_LIT_PIXELS)


def _answer(caption: Caption) -> None:
    """The caption, and what else beam search has kept."""
    st.subheader(_plain(caption.text), anchor=False)
    st.caption(_plain(f"probability {_percent(caption.log_probability)}"))
    if caption.alternatives:
        others = caption.alternatives
        st.table(
            {
                "Or": [_plain(one.text) for one in others],
                "Probability": [_plain(_percent(one.log_probability)) for one in others],
            }
        )


def _percent(log_probability: float) -> str:
    return f"{100 * math.exp(log_probability):.2g}%"


def _plain(text: str) -> str:
    """Text that Markdown leaves as it is: a vocabulary may hold any sign."""
    return re.sub(r"([^\w\s])", r"\\\1", text)


if __name__ == "__main__":  # as Streamlit runs it, apart from the module that serves
    from capexp.report import page

    page.show()
