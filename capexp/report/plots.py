"""Plots of a run: losses per epoch, scores beside the image-blind baseline, a histogram of CIDEr."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from capexp.captioning.evaluation import SCORE_NAMES, CaptionScores
from capexp.files import writing
from capexp.training.loop import Epoch

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_OURS, _BLIND, _BEST = "#1f6feb", "#9aa5b1", "#d1242f"
_BINS = 30  # the number of bins of the histogram


def draw_losses(epochs: Sequence[Epoch], title: str, path: Path) -> Path:
    """Plot train and dev loss per epoch, with the best epoch marked, as a PNG; return ``path``."""
    from matplotlib.ticker import MaxNLocator

    numbers = [epoch.number for epoch in epochs]
    best = [epoch for epoch in epochs if epoch.improved][-1]
    figure = _figure()
    axes = figure.add_subplot()
    axes.plot(numbers, [epoch.train_loss for epoch in epochs], "o-", color=_BLIND, label="train (dropout on)")
    axes.plot(numbers, [epoch.dev_loss for epoch in epochs], "o-", color=_OURS, label="dev")
    axes.plot(best.number, best.dev_loss, "o", color=_BEST, markersize=10, zorder=3)
    axes.annotate(
        f"best: {best.dev_loss:.3f}, epoch {best.number}", (best.number, best.dev_loss),
        xytext=(0, 14), textcoords="offset points", ha="right" if best.number > 2 else "left", color=_BEST,
    )  # fmt: skip
    axes.set(xlabel="epoch", ylabel="loss, nats per token", title=title)
    axes.set_xlim(numbers[0] - 0.5, numbers[-1] + 0.5)
    axes.margins(y=0.12)  # room for the text above the best epoch
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    return _save(figure, path)


def draw_scores(scores: CaptionScores, seed: int, title: str, path: Path) -> Path:
    """Plot BLEU, ROUGE-L and CIDEr with 95% intervals, beside the image-blind baseline, as a PNG; return ``path``.

    CIDEr has axes of its own, because its values have a different range.
    """
    figure = _figure()
    figure.subplots_adjust(left=0.06, bottom=0.14, wspace=0.14)
    bleu_rouge, cider = figure.subplots(1, 2, width_ratios=(4, 1))
    others = [key for key in SCORE_NAMES if key != "cider"]
    for axes, keys in ((bleu_rouge, others), (cider, ["cider"])):
        _points(axes, scores, seed, keys)
    figure.suptitle(f"{title}: scores with 95% intervals over {len(scores.photos.lengths):,} photos")
    figure.legend(*bleu_rouge.get_legend_handles_labels(), loc="lower center", ncols=2, frameon=False)
    return _save(figure, path)


def _points(axes: "Axes", scores: CaptionScores, seed: int, keys: list[str]) -> None:
    """Draw two bars per score: the captioner's value, then the image-blind baseline's."""
    columns = np.arange(len(keys))
    series = (("the captioner", scores.photos, _OURS, -0.12), ("photos shuffled", scores.blind, _BLIND, 0.12))
    for label, photos, color, offset in series:
        values, intervals = photos.corpus(), photos.intervals(seed=seed)
        heights = np.array([values[key] for key in keys])
        # A percentile interval does not always contain the value itself.
        errors = np.array([[values[key] - intervals[key][0], intervals[key][1] - values[key]] for key in keys])
        axes.errorbar(columns + offset, heights, errors.clip(min=0).T, fmt="o", color=color, capsize=4, label=label)
        for column, height in zip(columns + offset, heights, strict=True):
            axes.annotate(
                f"{height:.3f}", (column, height), xytext=(9 if offset > 0 else -9, 0), textcoords="offset points",
                ha="left" if offset > 0 else "right", va="center", color=color, fontsize="small",
            )  # fmt: skip
    axes.set_xticks(columns, [SCORE_NAMES[key] for key in keys])
    axes.set_xlim(-0.6, len(keys) - 0.4)
    axes.set_ylim(bottom=0)
    axes.margins(y=0.1)
    axes.grid(axis="y", alpha=0.25)


def draw_histogram(scores: CaptionScores, title: str, path: Path) -> Path:
    """Plot a histogram of the photos' CIDEr, beside the image-blind baseline's, as a PNG; return ``path``."""
    figure = _figure()
    axes = figure.add_subplot()
    ours, blind = scores.photos.cider, scores.blind.cider
    edges = np.linspace(0, max(float(ours.max()), float(blind.max()), 1e-3), _BINS + 1).tolist()
    axes.hist(ours, edges, color=_OURS, alpha=0.75, label="the captioner")
    axes.hist(blind, edges, color=_BLIND, histtype="step", linewidth=2, label="photos shuffled")
    mean = float(ours.mean())
    is_left = mean < edges[-1] / 2
    axes.axvline(mean, color=_BEST, linewidth=1)
    axes.annotate(
        f"mean {mean:.3f}", (mean, 1), xycoords=("data", "axes fraction"),
        xytext=(5 if is_left else -5, -14), textcoords="offset points", ha="left" if is_left else "right", color=_BEST,
    )  # fmt: skip
    axes.set(xlabel="CIDEr of a photo's caption", ylabel="photos", title=f"{title}: CIDEr of {len(ours):,} photos")
    axes.grid(axis="y", alpha=0.25)
    axes.legend(frameon=False)
    return _save(figure, path)


def _figure() -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=130)
    # matplotlib's layouts measure all texts first, which takes as long as to draw them.
    figure.subplots_adjust(left=0.09, right=0.985, bottom=0.12, top=0.92)
    return figure


def _save(figure: "Figure", path: Path) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    with writing(path):
        FigureCanvasAgg(figure).print_png(path)  # type: ignore[no-untyped-call]  # savefig would draw twice
    return path
