"""What trials of one process share."""

from pathlib import Path

import pytest

from capexp.data.dataset import Dataset
from capexp.data.vocabulary import Vocabulary
from capexp.experiment import load_experiment


def test_captions_are_encoded_once_for_all_trials_that_take_the_same_batches(
    monkeypatch: pytest.MonkeyPatch, scenes: Path
) -> None:
    experiment = load_experiment(scenes.parent / "scenes.toml", {})
    data = Dataset.read(experiment).with_features(experiment)
    counted: list[str] = []
    encode = Vocabulary.encode

    def counting(words: Vocabulary, caption: str) -> list[int]:
        counted.append(caption)
        return encode(words, caption)

    monkeypatch.setattr(Vocabulary, "encode", counting)
    captions = sum(len(references) for split in data.splits.values() for references in split.references)
    for rate in (0.1, 0.01, 0.001):
        trial = load_experiment(scenes.parent / "scenes.toml", {"training.learning_rate": rate})
        assert data.batches("train", trial.training) is data.batches("train", trial.training)
        assert data.batches("dev", trial.training).targets == 5276
    assert len(counted) == captions
    other = load_experiment(scenes.parent / "scenes.toml", {"training.batch_size": 7})
    assert len(data.batches("dev", other.training)) > len(data.batches("dev", trial.training))
