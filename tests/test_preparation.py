"""What trials of one process share."""

from pathlib import Path

import pytest

from capexp import experiment as experiments
from capexp.data.vocabulary import Vocabulary
from capexp.preparation import prepare


def test_captions_are_encoded_once_for_all_trials_that_take_the_same_batches(
    monkeypatch: pytest.MonkeyPatch, scenes: Path
) -> None:
    prepared = prepare(experiments.load(scenes.parent / "scenes.toml", {}))
    counted: list[str] = []
    encode = Vocabulary.encode

    def counting(words: Vocabulary, caption: str) -> list[int]:
        counted.append(caption)
        return encode(words, caption)

    monkeypatch.setattr(Vocabulary, "encode", counting)
    captions = sum(len(references) for split in prepared.splits.values() for references in split.references)
    for rate in (0.1, 0.01, 0.001):
        trial = experiments.load(scenes.parent / "scenes.toml", {"training.learning_rate": rate})
        assert prepared.batches("train", trial.training) is prepared.batches("train", trial.training)
        assert prepared.batches("dev", trial.training).targets == 5276
    assert len(counted) == captions
    other = experiments.load(scenes.parent / "scenes.toml", {"training.batch_size": 7})
    assert len(prepared.batches("dev", other.training)) > len(prepared.batches("dev", trial.training))
