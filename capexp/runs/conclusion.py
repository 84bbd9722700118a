"""The end of a run: evaluate its captioner on dev, and log metrics, plots and a gallery."""

import time

import numpy as np

from capexp.captioning.captioner import Captioner
from capexp.captioning.evaluation import Evaluation, evaluate_dev
from capexp.report.gallery import GalleryCard, Heading, choose, make_cards, write_gallery
from capexp.report.plots import draw_histogram, draw_scores
from capexp.runs.lifecycle import OpenRun, Plan
from capexp.tracking.outbox import Point


def evaluate_on_dev(plan: Plan, captioner: Captioner) -> Evaluation:
    """Evaluate a captioner on the dev split; the test split is not read."""
    train = [text for references in plan.data.splits["train"].references for text in references]
    batches = plan.data.batches("dev", plan.experiment.training)
    return evaluate_dev(captioner, batches, train, plan.experiment.seed)


def conclude(
    run: OpenRun, captioner: Captioner, metrics: dict[str, float]
) -> tuple[Evaluation, tuple[GalleryCard, ...], list[Point]]:
    """Evaluate a run's captioner on dev; log metrics, plots and a gallery.

    ``metrics`` come from training and are logged together with the metrics of the evaluation. Returns the evaluation,
    the gallery cards of some dev photos, sampled at random, and the logged points of the metrics.
    """
    experiment, data, tracked = run.plan.experiment, run.plan.data, run.tracked
    record, folder = captioner.record, tracked.folder
    assert record is not None
    evaluation = evaluate_on_dev(run.plan, captioner)
    points = tracked.log_metrics(metrics | evaluation.metrics(), record.epoch or 0, time.time_ns() // 1_000_000)
    name, seed = experiment.name, experiment.seed
    tracked.log_artifact(draw_scores(evaluation.scores, seed, name, folder / "scores.png"))
    tracked.log_artifact(draw_histogram(evaluation.scores, name, folder / "cider.png"))
    cards = make_cards(evaluation.captions, data.splits["dev"], evaluation.scores)
    choice = choose(cards, seed)
    heading = Heading(
        experiment=name,
        captioner=captioner.describe(),
        split="dev",
        decoding=experiment.decoding.describe(),
        loss=record.dev_loss,
        loss_blind=evaluation.blind.per_token,
        scores=evaluation.scores,
    )
    maps = {}
    if captioner.has_maps and captioner.vocabulary.tokens != "characters":  # the page takes words
        features = data.features["dev"].gather(np.array(choice.shown))
        shown_maps = captioner.attention_maps(features, [cards[position].caption for position in choice.shown])
        maps = dict(zip(choice.shown, shown_maps, strict=True))
    tracked.log_artifact(write_gallery(cards, choice, heading, seed, folder / "captions.html", maps))
    return evaluation, tuple(cards[position] for position in choice.random), points
