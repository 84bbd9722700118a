"""What a run shows of its captioner."""

import re
from contextlib import nullcontext
from pathlib import Path

import mlflow
import numpy as np
import pytest

from capexp.captioning.bundle import TrainingRecord
from capexp.captioning.captioner import Captioner
from capexp.data.dataset import Dataset, Loaded
from capexp.data.features import Features
from capexp.experiment import find_experiment, load_experiment
from capexp.runs.conclusion import conclude
from capexp.runs.folder import RunFolder
from capexp.runs.lifecycle import OpenRun, Plan
from capexp.tracking.run import tracked_run
from capexp.tracking.store import database_uri


@pytest.mark.slow
def test_the_gallery_of_a_captioner_that_looks_tells_where_of_every_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On features drawn at random: fresh attention captioners together, and a map for each word that they say."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mlflow, "get_tracking_uri", mlflow.get_tracking_uri)
    mlflow.set_tracking_uri(database_uri(tmp_path / "mlflow.db"))
    small = {
        "model.decoder": "attention",
        "model.embedding_size": 16,
        "model.lstm_units": 16,
        "model.photo_norm": "none",
    }
    overrides = {**small, "features.pool": "none", "decoding.maximum_length": 6}
    experiment = load_experiment(find_experiment("scenes"), overrides)
    data = Dataset.read(experiment)
    generator = np.random.default_rng(1)
    features = {
        name: Features(
            (40 * generator.random((40, 196, 512), np.float32)).astype(np.float16),
            generator.integers(0, 40, len(split.photos)),
        )
        for name, split in data.splits.items()
    }
    prepared = Dataset(data.splits, data.vocabulary, Loaded(features, data.encoder))
    members = [
        Captioner.fresh(experiment.model, data.vocabulary, data.encoder, experiment.decoding, seed) for seed in (1, 2)
    ]
    captioner = Captioner.ensemble(members, experiment.decoding)
    captioner.record = TrainingRecord(epoch=None, train_loss=None, dev_loss=5.0, dev_digest="d")
    with tracked_run("report", "report", tmp_path, lock=lambda _: nullcontext()) as tracked:
        run = OpenRun(Plan(experiment, prepared), tracked, RunFolder(tracked.folder), captioner.device)
        evaluation, samples, _ = conclude(run, captioner, {"dev_loss": 5.0})
        metrics = mlflow.get_run(tracked.run_id).data.metrics
    assert metrics["dev_loss"] == 5.0 and metrics["dev_loss_blind"] == evaluation.blind.per_token
    page = (tracked.folder / "captions.html").read_text(encoding="utf-8")
    cards = re.findall(r'data-looked="([^"]*)".*?<h2[^>]*>([^<]*)</h2>', page, re.DOTALL)
    assert len(cards) == 100
    assert [len(looked) for looked, _ in cards] == [
        49 * (0 if said == "(no words)" else len(said.split())) for _, said in cards
    ]
    assert len({looked for looked, _ in cards}) > 10
    assert len(samples) == 50
