"""Charts of a study: history, importances, parallel coordinates and slices, as one HTML page and as PNGs."""

import logging
import warnings
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader

log = logging.getLogger(__name__)

_CHARTS = {
    "history": ("optimization_history", "Optimization history"),
    "importances": ("param_importances", "Importance of each setting"),
    "parallel": ("parallel_coordinate", "Parallel coordinates of the trials"),
    "slice": ("slice", "Dev loss by each setting"),
}
_LOSS = "dev loss"


def importances(study: Any) -> dict[str, float]:
    """Return the importance of each setting: the share of the variance of dev loss that it explains (fANOVA).

    The largest comes first. Empty if too few trials are finished.
    """
    import optuna

    finished = study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.COMPLETE])
    if len(finished) < 2 or len({trial.value for trial in finished}) < 2:
        return {}
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    return dict(optuna.importance.get_param_importances(study, evaluator=evaluator))


def draw_charts(study: Any, name: str, folder: Path) -> list[Path]:
    """Write one self-contained page with all charts, and each chart as a PNG; return the paths of all files."""
    import matplotlib as mpl
    import optuna

    shares = importances(study)
    pictures: list[Path] = []
    sections: list[tuple[str, str]] = []
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    for chart, (function, title) in _CHARTS.items():
        options: dict[str, Any] = {"target_name": _LOSS}
        if chart == "importances":
            if not shares:
                continue
            options["evaluator"] = evaluator
        with warnings.catch_warnings(), mpl.rc_context({"figure.autolayout": False}):
            warnings.simplefilter("ignore")
            figure = getattr(optuna.visualization, f"plot_{function}")(study, **options)
            figure.update_layout(title=None, template="plotly_white", margin={"t": 24})
            sections.append((title, figure.to_html(full_html=False, include_plotlyjs=not sections)))
            pictures.append(_draw_picture(study, function, title, options, folder / f"{chart}.png"))
    page = folder / "study.html"
    templates = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
    page.write_text(templates.get_template("study.html").render(title=name, sections=sections), encoding="utf-8")
    return [page, *pictures]


def _draw_picture(study: Any, function: str, title: str, options: dict[str, Any], path: Path) -> Path:
    import matplotlib as mpl

    mpl.use("Agg")
    import numpy as np
    import optuna
    from matplotlib import pyplot

    axes = getattr(optuna.visualization.matplotlib, f"plot_{function}")(study, **options)
    figure = np.ravel(axes)[0].figure
    for axis in figure.axes:
        axis.set_title("")
        axis.set_title("", loc="left")
    figure.suptitle(title)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)
    return path
