"""The gallery: photos with the captioner's and people's captions, in one self-contained HTML file.

It is rendered from the Jinja2 template ``gallery.html``, with ``gallery.css`` and ``gallery.js``, beside this module.
Captions and file names are untrusted text: the template escapes them in the markup, they never appear in the script,
and the page's Content-Security-Policy allows no other script, style or address. Without its script the page shows every
card, the best first. MLflow shows the page in a sandboxed frame that may run scripts but has no forms, no storage and
no address.
"""

import base64
import hashlib
import io
import random
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader
from numpy.typing import NDArray
from PIL import Image

from capexp.captioning.captioner import Caption
from capexp.captioning.evaluation import SCORE_NAMES, CaptionScores
from capexp.data.captions import Split
from capexp.data.photos import read_photo
from capexp.files import write_whole

# The largest numbers of photos in the page: every run and every trial logs a gallery, which should stay at a few
# megabytes.
_BEST = 60
_WORST = 60
_RANDOM = 120
_SIDE = 224  # the longer side of an inlined photo in pixels
_QUALITY = 75  # the JPEG quality of an inlined photo
_MAP_SIDE = 7  # the largest side of a map in the page, in grid positions
_BASE64 = string.ascii_uppercase + string.ascii_lowercase + string.digits + "+/"

Maps = NDArray[np.float32]
"""The attention weights for each word of a caption, ``(T, side, side)``."""
_NO_MAPS: Mapping[int, Maps] = {}


@dataclass(frozen=True)
class GalleryCard:
    """A photo, the captioner's caption, people's captions, and the scores of the captioner's against people's."""

    photo: Path
    name: str
    """The photo's name in the list of the split."""
    caption: str
    log_probability: float
    references: tuple[str, ...]
    cider: float
    rouge_l: float


@dataclass(frozen=True)
class Heading:
    """The head of the page: which captioner it shows, and its losses and scores."""

    experiment: str
    captioner: str
    """Which of the experiment's captioners, as :meth:`Captioner.describe` says."""
    split: str
    decoding: str
    loss: float
    """The cross-entropy in nats per token."""
    loss_blind: float
    """The loss of the image-blind baseline, with photos shuffled among captions."""
    scores: CaptionScores


@dataclass(frozen=True)
class Choice:
    """Which cards the gallery shows, as positions in the list of all cards."""

    best: tuple[int, ...]
    """The highest CIDEr first."""
    worst: tuple[int, ...]
    """The lowest CIDEr first."""
    random: tuple[int, ...]
    """A random sample of all cards, best and worst included: how the captioner does on average."""
    shown: tuple[int, ...]
    """All cards in the page, the highest CIDEr first."""


def make_cards(captions: Sequence[Caption], split: Split, scores: CaptionScores) -> tuple[GalleryCard, ...]:
    """Return a card for each photo of a split, in the split's order."""
    photos = zip(split.paths(), split.photos, split.references, captions, strict=True)
    return tuple(
        GalleryCard(
            path,
            name,
            caption.text,
            caption.log_probability,
            references,
            cider=float(scores.photos.cider[position]),
            rouge_l=float(scores.photos.rouge_l[position]),
        )
        for position, (path, name, references, caption) in enumerate(photos)
    )


def choose(cards: Sequence[GalleryCard], seed: int) -> Choice:
    """Choose the best cards, the worst, and a random sample; if there are few cards, show all of them.

    Best and worst are a quarter of the cards each, the random sample is half of them, up to the bounds of the gallery.
    """
    count = len(cards)
    # CIDEr is 0 for many captions; ROUGE-L ranks these.
    ranked = sorted(range(count), key=lambda position: (-cards[position].cider, -cards[position].rouge_l))
    best = ranked[: min(_BEST, -(-count // 4))]
    worst = ranked[::-1][: min(_WORST, -(-count // 4))]
    sampled = random.Random(seed).sample(range(count), min(_RANDOM, -(-count // 2)))
    is_small = count <= _BEST + _WORST + _RANDOM
    wanted = set(range(count)) if is_small else {*best, *worst, *sampled}
    shown = [position for position in ranked if position in wanted]
    return Choice(tuple(best), tuple(worst), tuple(sampled), tuple(shown))


def write_gallery(
    cards: Sequence[GalleryCard],
    choice: Choice,
    heading: Heading,
    seed: int,
    path: Path,
    maps: Mapping[int, Maps] = _NO_MAPS,
) -> Path:
    """Write the page and return ``path``.

    The photos in it are newly encoded small JPEGs without any metadata of the originals. ``maps`` are attention maps,
    keyed by the positions of their cards; the page's script shows them word by word. ``seed`` is the bootstrap's.
    """
    style, script = _part("gallery.css"), _part("gallery.js")
    templates = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
    page = templates.get_template("gallery.html").render(
        style=style,
        style_hash=_hash(style),
        script=script,
        script_hash=_hash(script),
        heading=heading,
        scores=_score_rows(heading.scores, seed),
        photos=f"{len(cards):,}",
        shown=_describe_choice(choice, len(cards)),
        choice=choice,
        has_maps=bool(maps),
        cards=[_parts_of(cards[position], position, choice, maps.get(position)) for position in choice.shown],
    )
    return write_whole(path, page)


def _part(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """Return the hash with which a Content-Security-Policy allows an inline script or style."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _describe_choice(choice: Choice, count: int) -> str:
    if len(choice.shown) == count:
        return f"All {count:,} photos are shown"
    return (
        f"{len(choice.shown):,} of {count:,} photos are shown: by CIDEr the {len(choice.best)} best and the "
        f"{len(choice.worst)} worst, and {len(choice.random)} drawn at random from all"
    )


def _score_rows(scores: CaptionScores, seed: int) -> list[tuple[str, float, float, float, float]]:
    """Return each score's name, value, the two ends of its interval, and its value with photos shuffled."""
    values, intervals, blind = scores.photos.corpus(), scores.photos.intervals(seed=seed), scores.blind.corpus()
    return [(name, values[key], *intervals[key], blind[key]) for key, name in SCORE_NAMES.items()]


def _parts_of(card: GalleryCard, position: int, choice: Choice, maps: Maps | None) -> dict[str, Any]:
    """Return what the template shows of a card."""
    # Where features come from a file, the photos may not be at hand.
    image, width, height = _inlined(card.photo) if card.photo.is_file() else (None, 0, 0)
    return {
        "of": card,
        "image": image,
        "width": width,
        "height": height,
        "views": " ".join(view for view in ("best", "worst") if position in getattr(choice, view)),
        "drawn": choice.random.index(position) if position in choice.random else None,
        "maps": None if maps is None or image is None else _encode_maps(maps),
    }


def _encode_maps(maps: Maps) -> str:
    """Return maps ``(T, side, side)`` as text: word by word, row by row, one base64 digit per position.

    Each map is scaled so that its maximum is 63. Maps of a large grid are averaged over 2x2 positions until they are
    small enough, so that the maps take little of the page's size.
    """
    while (side := maps.shape[1]) > _MAP_SIDE and side % 2 == 0:
        maps = maps.reshape(len(maps), side // 2, 2, side // 2, 2).mean((2, 4))
    scaled = maps / maps.max((1, 2), keepdims=True, initial=1e-9)
    return "".join(_BASE64[level] for level in (scaled * 63).round().astype(int).flat)


def _inlined(photo: Path) -> tuple[str, int, int]:
    """Return a photo as a small JPEG in a data URL, with its width and height in pixels."""
    image = read_photo(photo)
    image.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    image.info.clear()  # otherwise Pillow copies the JPEG comment
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=_QUALITY, optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f"data:image/jpeg;base64,{data}", image.width, image.height
