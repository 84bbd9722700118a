"""The gallery: photos, what the captioner and what people say of them, in one HTML file that needs nothing else.

``gallery.html``, ``gallery.css`` and ``gallery.js``, beside this module, are its parts. Captions and file names are
anybody's text: they stand escaped in the page's markup, never in its script, and the page's own policy lets no other
script, style or address in. Without its script the page shows every card, the best first. MLflow shows it in a frame
that may run scripts and nothing else: no form, no storage, no address.
"""

import base64
import hashlib
import html
import io
import random
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from capexp.captioning.captioner import Caption
from capexp.captioning.evaluation import SCORE_NAMES, CaptionScores
from capexp.data.captions import Split
from capexp.data.photos import read_photo
from capexp.files import write_whole

# Photos inlined at most: every run logs a gallery, each trial of a study too, so it stays at a few megabytes.
_BEST = 60
_WORST = 60
_RANDOM = 120
_SIDE = 224  # pixels, the longer side of an inlined photo
_QUALITY = 75  # of its JPEG
_PLACES = 7  # in a row of a map, at most
_DIGITS = string.ascii_uppercase + string.ascii_lowercase + string.digits + "+/"

Maps = NDArray[np.float32]
"""Where a captioner looked at each word: ``(T, side, side)``."""
_NONE: Mapping[int, Maps] = {}


@dataclass(frozen=True)
class Card:
    """A photo, what the captioner says of it, what people said, and how the two compare."""

    photo: Path
    name: str
    """As the split's list names it."""
    caption: str
    log_probability: float
    references: tuple[str, ...]
    cider: float
    rouge_l: float


@dataclass(frozen=True)
class Heading:
    """What stands above the photos: whose captions these are, and what they are worth."""

    experiment: str
    captioner: str
    """Which one of the experiment's."""
    split: str
    decoding: str
    loss: float
    """In nats per token."""
    loss_blind: float
    """With photos shuffled among captions."""
    scores: CaptionScores


@dataclass(frozen=True)
class Choice:
    """Which cards the gallery shows, by their place among all of them."""

    best: tuple[int, ...]
    """The highest CIDEr first."""
    worst: tuple[int, ...]
    """The lowest CIDEr first."""
    random: tuple[int, ...]
    """Drawn from all cards, the best and worst too: what the captioner is like on the whole."""
    shown: tuple[int, ...]
    """All cards that are shown, the highest CIDEr first."""


def make_cards(captions: Sequence[Caption], split: Split, scores: CaptionScores) -> tuple[Card, ...]:
    """A card for each photo of a split, in its order."""
    photos = zip(split.paths(), split.photos, split.references, captions, strict=True)
    return tuple(
        Card(
            path,
            name,
            caption.text,
            caption.log_probability,
            references,
            cider=float(scores.photos.cider[place]),
            rouge_l=float(scores.photos.rouge_l[place]),
        )
        for place, (path, name, references, caption) in enumerate(photos)
    )


def choose(cards: Sequence[Card], seed: int) -> Choice:
    """The best, the worst and some drawn at random; all others too where they are few.

    Best and worst are a quarter of the cards each, the random ones half of them, up to the gallery's bounds.
    """
    count = len(cards)
    # Many captions share no word that counts: ROUGE-L tells these apart.
    ranked = sorted(range(count), key=lambda place: (-cards[place].cider, -cards[place].rouge_l))
    best = ranked[: min(_BEST, -(-count // 4))]
    worst = ranked[::-1][: min(_WORST, -(-count // 4))]
    drawn = random.Random(seed).sample(range(count), min(_RANDOM, -(-count // 2)))
    few = count <= _BEST + _WORST + _RANDOM
    wanted = set(range(count)) if few else {*best, *worst, *drawn}
    shown = [place for place in ranked if place in wanted]
    return Choice(tuple(best), tuple(worst), tuple(drawn), tuple(shown))


def write_gallery(
    cards: Sequence[Card], choice: Choice, heading: Heading, seed: int, path: Path, looked: Mapping[int, Maps] = _NONE
) -> Path:
    """The page; its photos are small JPEGs made anew, so none of the originals' metadata is carried over.

    ``looked`` holds, by a card's place, where the captioner looked as it said each word: the page shows it word by
    word, where its script runs.

    Raises:
        InputError: a photo cannot be read any more, or the file cannot be written.
    """
    style, script = _part("gallery.css"), _part("gallery.js")
    page = Template(_part("gallery.html")).substitute(
        style=style,
        style_hash=_hash(style),
        script=script,
        script_hash=_hash(script),
        experiment=html.escape(heading.experiment),
        captioner=html.escape(heading.captioner),
        split=html.escape(heading.split),
        decoding=html.escape(heading.decoding),
        loss=f"{heading.loss:.3f}",
        loss_blind=f"{heading.loss_blind:.3f}",
        scores=_score_rows(heading.scores, seed),
        photos=f"{len(cards):,}",
        shown=_told(choice, len(cards)),
        best=len(choice.best),
        worst=len(choice.worst),
        random=len(choice.random),
        all=len(choice.shown),
        looked="" if looked else "hidden",
        cards="\n".join(_card(cards[place], place, choice, looked.get(place)) for place in choice.shown),
    )
    return write_whole(path, page)


def _part(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """What a Content-Security-Policy knows an inline script or style by."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _told(choice: Choice, count: int) -> str:
    if len(choice.shown) == count:
        return f"All {count:,} photos are shown"
    return (
        f"{len(choice.shown):,} of {count:,} photos are shown: by CIDEr the {len(choice.best)} best and the "
        f"{len(choice.worst)} worst, and {len(choice.random)} drawn at random from all"
    )


def _score_rows(scores: CaptionScores, seed: int) -> str:
    values, intervals, blind = scores.photos.corpus(), scores.photos.intervals(seed=seed), scores.blind.corpus()
    return "\n".join(
        f'<tr><th scope="row">{name}</th><td>{values[key]:.3f}</td>'
        f"<td>{intervals[key][0]:.3f} to {intervals[key][1]:.3f}</td><td>{blind[key]:.3f}</td></tr>"
        for key, name in SCORE_NAMES.items()
    )


def _card(card: Card, place: int, choice: Choice, maps: Maps | None) -> str:
    """One card's markup: its numbers for the script in ``data-`` attributes, its words as text."""
    image, width, height = _inlined(card.photo)
    references = "".join(f'<li dir="auto">{html.escape(reference)}</li>' for reference in card.references)
    views = [view for view in ("best", "worst") if place in getattr(choice, view)]
    drawn = f' data-drawn="{choice.random.index(place)}"' if place in choice.random else ""
    looked = "" if maps is None else f' data-looked="{_coarse(maps)}"'
    return f"""<article data-views="{" ".join(views)}"{drawn}{looked} data-cider="{card.cider:.4f}" \
data-rouge-l="{card.rouge_l:.4f}" data-log-probability="{card.log_probability:.4f}">
<img src="{image}" width="{width}" height="{height}" alt="{html.escape(card.references[0])}">
<h2 dir="auto">{html.escape(card.caption) or "(no words)"}</h2>
<ul>{references}</ul>
<dl><div><dt>CIDEr</dt><dd>{card.cider:.2f}</dd></div><div><dt>ROUGE-L</dt><dd>{card.rouge_l:.2f}</dd></div>\
<div><dt>log-probability</dt><dd>{card.log_probability:.2f}</dd></div></dl>
<p dir="auto">{html.escape(card.name)}</p>
</article>"""


def _coarse(maps: Maps) -> str:
    """Maps ``(T, side, side)`` as text: word after word, row after row, a digit of base64 a place, 63 at the brightest.

    Those of a large grid are averaged over places of 2x2, as often as it takes: a page of photos stays one of photos.
    """
    while (side := maps.shape[1]) > _PLACES and side % 2 == 0:
        maps = maps.reshape(len(maps), side // 2, 2, side // 2, 2).mean((2, 4))
    lit = maps / maps.max((1, 2), keepdims=True, initial=1e-9)
    return "".join(_DIGITS[level] for level in (lit * 63).round().astype(int).flat)


def _inlined(photo: Path) -> tuple[str, int, int]:
    """A photo as a small JPEG in a data URL, with its width and height."""
    image = read_photo(photo)
    image.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    image.info.clear()  # Pillow would write a JPEG comment again
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=_QUALITY, optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f"data:image/jpeg;base64,{data}", image.width, image.height
