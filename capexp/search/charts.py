"""What a study looks like: its history, what mattered, which values went together; a page and pictures."""

import html
import logging
import warnings
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

_CHARTS = {
    "history": ("optimization_history", "Dev loss, trial by trial"),
    "importances": ("param_importances", "Which settings mattered"),
    "parallel": ("parallel_coordinate", "Which values went together"),
    "slice": ("slice", "Dev loss by each setting"),
}
_LOSS = "dev loss"


def importances(study: Any) -> dict[str, float]:
    """How much of the spread of dev loss each setting explains (fANOVA), the greatest first.

    Empty where too few trials are finished to tell.
    """
    import optuna

    finished = study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.COMPLETE])
    if len(finished) < 2 or len({trial.value for trial in finished}) < 2:
        return {}
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    return dict(optuna.importance.get_param_importances(study, evaluator=evaluator))


def draw_charts(study: Any, name: str, folder: Path) -> list[Path]:
    """One page with all charts, which needs nothing else, and each of them as a PNG."""
    import matplotlib as mpl
    import optuna

    shown = importances(study)
    drawn: list[Path] = []
    sections: list[str] = []
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    for chart, (function, title) in _CHARTS.items():
        options: dict[str, Any] = {"target_name": _LOSS}
        if chart == "importances":
            if not shown:
                continue
            options["evaluator"] = evaluator
        with warnings.catch_warnings(), mpl.rc_context({"figure.autolayout": False}):
            warnings.simplefilter("ignore")
            figure = getattr(optuna.visualization, f"plot_{function}")(study, **options)
            figure.update_layout(title=None, template="plotly_white", margin={"t": 24})
            sections.append(f"<h2>{title}</h2>" + figure.to_html(full_html=False, include_plotlyjs=not sections))
            drawn.append(_draw(study, function, title, options, folder / f"{chart}.png"))
    page = folder / "study.html"
    page.write_text(_PAGE.format(title=html.escape(name), sections="\n".join(sections)), encoding="utf-8")
    return [page, *drawn]


def _draw(study: Any, function: str, title: str, options: dict[str, Any], path: Path) -> Path:
    import matplotlib as mpl

    mpl.use("Agg")
    import numpy as np
    import optuna
    from matplotlib import pyplot

    axes = getattr(optuna.visualization.matplotlib, f"plot_{function}")(study, **options)
    figure = np.ravel(axes)[0].figure
    for one in figure.axes:
        one.set_title("")
        one.set_title("", loc="left")
    figure.suptitle(title)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)
    return path


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 1100px; padding: 0 1rem; color: #1f2328; }}
</style></head><body>
<h1>{title}</h1>
{sections}
</body></html>
"""
