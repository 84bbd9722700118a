"""What a run shows of its captioner: what it is worth on dev, in metrics and pictures, and what it says there."""

import time
from pathlib import Path

import numpy as np

from capexp.captioning.captioner import Captioner
from capexp.experiment import Experiment
from capexp.measurement import Measured, measure
from capexp.preparation import Prepared
from capexp.report.gallery import Card, Heading, choose, make_cards, write_gallery
from capexp.report.plots import draw_histogram, draw_scores
from capexp.tracking.run import TrackedRun


def report(
    tracked: TrackedRun,
    experiment: Experiment,
    prepared: Prepared,
    captioner: Captioner,
    metrics: dict[str, float],
    folder: Path,
) -> tuple[Measured, tuple[Card, ...]]:
    """Measures a captioner on dev and shows it: files in a folder and among the run's artifacts.

    The metrics, of what it was trained to, are logged with those that are measured. Returns what was measured, and
    photos of the dev split drawn at random.
    """
    training = captioner.training
    assert training is not None
    measured = measure(experiment, prepared, captioner)
    tracked.log_metrics(metrics | measured.metrics(), step=training.epoch or 0, timestamp=time.time_ns() // 1_000_000)
    name, seed = experiment.name, experiment.seed
    tracked.log_artifact(draw_scores(measured.scores, seed, name, folder / "scores.png"))
    tracked.log_artifact(draw_histogram(measured.scores, name, folder / "cider.png"))
    cards = make_cards(measured.captions, prepared.splits["dev"], measured.scores)
    choice = choose(cards, seed)
    heading = Heading(
        experiment=name,
        captioner=captioner.describe(),
        split="dev",
        decoding=experiment.decoding.describe(),
        loss=training.dev_loss,
        loss_blind=measured.blind.per_token,
        scores=measured.scores,
    )
    looked = {}
    if captioner.decoder.looks:
        features = prepared.features["dev"].gather(np.array(choice.shown))
        maps = captioner.look_back(features, [cards[place].caption for place in choice.shown])
        looked = dict(zip(choice.shown, maps, strict=True))
    tracked.log_artifact(write_gallery(cards, choice, heading, seed, folder / "captions.html", looked))
    return measured, tuple(cards[place] for place in choice.random)
