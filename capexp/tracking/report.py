"""What a person looks at: loss curves as a picture, captions beside photos as a page."""

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from capexp.data.photos import read_photo
from capexp.training.fit import Epoch

_THUMBNAIL = 224  # pixels, the longer side


@dataclass(frozen=True)
class Sample:
    """A photo of the dev split, what the captioner says, and what people said."""

    photo: Path
    caption: str
    log_probability: float
    references: tuple[str, ...]


def draw_curves(epochs: Sequence[Epoch], title: str, path: Path) -> Path:
    """Train and dev loss by epoch, the best epoch marked, as a PNG."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    numbers = [epoch.number for epoch in epochs]
    best = min(epochs, key=lambda epoch: epoch.dev_loss)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(numbers, [epoch.train_loss for epoch in epochs], "o-", color="#9aa5b1", label="train (dropout on)")
    axes.plot(numbers, [epoch.dev_loss for epoch in epochs], "o-", color="#1f6feb", label="dev")
    axes.plot(best.number, best.dev_loss, "o", color="#d1242f", markersize=10, zorder=3)
    axes.annotate(
        f"best: {best.dev_loss:.3f}, epoch {best.number}", (best.number, best.dev_loss),
        xytext=(0, 14), textcoords="offset points", ha="right" if best.number > 2 else "left", color="#d1242f",
    )  # fmt: skip
    axes.set(xlabel="epoch", ylabel="loss, nats per token", title=title)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=130)
    return path


def write_gallery(samples: Sequence[Sample], title: str, path: Path) -> Path:
    """Photos with their captions and references: one HTML file that needs nothing else.

    Photos are re-encoded small, so none of their metadata is carried over.
    """
    cards = "\n".join(_card(sample) for sample in samples)
    path.write_text(_PAGE.format(title=html.escape(title), count=len(samples), cards=cards), encoding="utf-8")
    return path


def _card(sample: Sample) -> str:
    image = read_photo(sample.photo)
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    data = base64.b64encode(buffer.getvalue()).decode()
    references = "".join(f"<li>{html.escape(reference)}</li>" for reference in sample.references)
    name = html.escape(sample.photo.name)
    return (
        f'<figure><img src="data:image/jpeg;base64,{data}" alt="{name}" title="{name}"><figcaption>'
        f"<strong>{html.escape(sample.caption) or '(no words)'}</strong>"
        f"<small>log-probability {sample.log_probability:.2f}</small><ul>{references}</ul></figcaption></figure>"
    )


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 1100px; padding: 0 1rem; color: #1f2328; }}
main {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(250px, 1fr)); gap: 1rem; }}
figure {{ margin: 0; border: 1px solid #d0d7de; border-radius: 8px; overflow: hidden; }}
img {{ width: 100%; aspect-ratio: 1; object-fit: cover; display: block; }}
figcaption {{ padding: .75rem; }} strong {{ display: block; }} small {{ color: #59636e; }}
ul {{ margin: .5rem 0 0; padding-left: 1.1rem; color: #59636e; font-size: 13px; }}
</style></head><body>
<h1>{title}</h1>
<p>{count} photos of the dev split, drawn at random: the captioner's words in bold, people's below.</p>
<main>
{cards}
</main></body></html>
"""
