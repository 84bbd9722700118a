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
    data = Dataset.read(experiment).with_features()
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


def with_captions(folder: Path, captions: list[str]) -> Path:
    (folder / "photos").mkdir()
    names = [f"{number}.jpg" for number in range(len(captions))]
    for name in names:
        (folder / "photos" / name).touch()
    lines = (f"{name}#0\t{caption}\n" for name, caption in zip(names, captions, strict=True))
    (folder / "captions.txt").write_text("".join(lines))
    path = folder / "own.toml"
    path.write_text(
        'name = "own"\n[captions]\nroot = "."\nphotos = "photos"\ncaptions = "captions.txt"\nsplits = "random"\n'
        "[vocabulary]\nminimum_count = 1\n"
        '[features]\nlayer = "conv5_3"\npool = "mean"\nweights = "IMAGENET1K_FEATURES"\n'
        '[registry]\nmodel = "own"\n'
    )
    return path


def test_captions_without_blanks_are_told_with_the_remedy(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = with_captions(tmp_path, ["一只狗在草地上奔跑。", "两个孩子在玩球。", "一个女孩在微笑。"] * 4)
    data = Dataset.read(load_experiment(path, {}))
    (told,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert told.startswith("captions have 1.0 tokens each;") and told.endswith("set vocabulary.tokens = 'characters'")
    caplog.clear()
    data = Dataset.read(load_experiment(path, {"vocabulary.tokens": "characters"}))
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    assert set(data.vocabulary.words) == set("一只狗在草地上奔跑两个孩子在玩球女孩微笑")


def test_random_splits_are_drawn_once_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    experiment = load_experiment(with_captions(tmp_path, ["a dog runs in the snow"] * 20), {})
    data = Dataset.read(experiment)
    assert "photos drawn at random by captions.split_seed = 1: 16 train, 2 dev, 2 test" in caplog.messages
    assert data.drawn is not None and data.drawn["dev"] == data.splits["dev"].photos
    other = Dataset.read(experiment, ("dev",), data.vocabulary, {"train": (), "dev": data.drawn["test"], "test": ()})
    assert other.splits["dev"].photos == data.drawn["test"]
