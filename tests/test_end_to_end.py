"""The commands as a user runs them: real processes, a real MLflow store, the embedded scenes."""

import base64
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
from cases import cases
from mlflow.entities.model_registry import ModelVersion
from user_folder import ROOT, Folder, wait_for

from capexp.captioning.captioner import Captioner
from capexp.errors import InputError
from capexp.tracking.store import database_uri
from capexp.train import train

SMALL = (
    *("--model.embedding_size", "48", "--model.lstm_units", "48", "--model.output_dropout", "0"),
    *("--training.learning_rate", "0.01"),
)
METRICS = {"train_loss", "dev_loss", "dev_perplexity", "learning_rate", "epoch_seconds", "tokens_per_second"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Folder, subprocess.CompletedProcess[str]]:
    """A folder in which the scenes were trained for three epochs, without VGG16's weights at hand."""
    folder = Folder(tmp_path_factory.mktemp("trained"))
    return folder, folder.run("train", *SMALL, "--training.epochs", "3")


Trained = tuple[Folder, subprocess.CompletedProcess[str]]


def test_the_run_holds_everything_that_decided_it(trained: Trained) -> None:
    folder, _ = trained
    (run,) = folder.runs()
    assert run.info.status == "FINISHED"
    assert run.data.params["training.learning_rate"] == "0.01"
    assert run.data.params["model.decoder"] == "merge"
    assert {"vocabulary_digest", "data_digest", "git_commit", "device", "encoder"} <= run.data.tags.keys()
    assert {(item.dataset.name, item.tags[0].value) for item in run.inputs.dataset_inputs} == {
        ("scenes-train", "training"),
        ("scenes-dev", "validation"),
    }
    names = {item.path for item in folder.client.list_artifacts(run.info.run_id)}
    assert {"experiment.toml", "loss.png", "scores.png", "cider.png", "captions.html", "log.txt"} <= names
    for picture in ("loss.png", "scores.png", "cider.png"):
        assert folder.artifact(run, picture).read_bytes().startswith(b"\x89PNG")
    gallery = folder.artifact(run, "captions.html").read_text(encoding="utf-8")
    assert gallery.count("<article ") == 100
    for metric in ("dev_cider", "dev_cider_blind", "best_dev_loss", "dev_loss_blind"):
        assert f"{run.data.metrics[metric]:.3f}" in gallery


def test_every_epoch_is_a_step_of_every_metric(trained: Trained) -> None:
    folder, _ = trained
    (run,) = folder.runs()
    for metric in METRICS:
        history = folder.client.get_metric_history(run.info.run_id, metric)
        assert [point.step for point in history] == [1, 2, 3], metric
    assert any(name.startswith("system/") for name in run.data.metrics)


def test_the_best_epoch_is_registered_as_champion_with_a_card(trained: Trained) -> None:
    folder, printed = trained
    (run,) = folder.runs()
    version = folder.client.get_model_version_by_alias("capexp-scenes", "champion")
    dev = [point.value for point in folder.client.get_metric_history(run.info.run_id, "dev_loss")]
    assert run.data.metrics["best_dev_loss"] == min(dev)
    assert float(version.tags["dev_loss"]) == min(dev)
    assert version.run_id == run.info.run_id
    assert "nats per token" in version.description
    assert run.data.metrics["dev_loss_blind"] > min(dev) + 0.2
    assert f"registered  capexp-scenes version {version.version} @champion" in printed.stdout
    assert printed.stdout.count("  says ") == 3


def test_evaluate_after_train_agrees(trained: Trained) -> None:
    folder, _ = trained
    (run,) = folder.runs()
    folder.run("evaluate", "--model", "models:/capexp-scenes@champion", "--output", "scores.json")
    scores = json.loads((folder.path / "scores.json").read_text())
    assert scores["cross_entropy"] == pytest.approx(run.data.metrics["best_dev_loss"], rel=1e-6)
    assert scores["cross_entropy_blind"] == pytest.approx(run.data.metrics["dev_loss_blind"], rel=1e-6)
    assert scores["photos"] == 100
    for key in ("bleu_4", "rouge_l", "cider", "cider_blind", "copied_from_train"):
        assert scores[key] == pytest.approx(run.data.metrics[f"dev_{key}"], rel=1e-4)
    assert scores["cider"] > 2 * scores["cider_blind"]
    low, high = scores["intervals"]["cider"]
    assert low < scores["cider"] < high
    beam = ("--decoding.method", "beam", "--decoding.beam_width", "4")
    folder.run("evaluate", "--model", "models:/capexp-scenes@champion", *beam, "--output", "beam.json")
    wide = json.loads((folder.path / "beam.json").read_text())
    assert wide["decoding"]["beam_width"] == 4
    assert wide["cross_entropy"] == scores["cross_entropy"]
    assert wide["cider"] != scores["cider"]
    assert scores["experiment"] == "scenes"
    idle = folder.run("evaluate", "--model", "models:/capexp-scenes@champion", "--model.dropout", "0.1", status=2)
    assert "has no effect on this command" in idle.stderr


@pytest.mark.slow
def test_meteor_and_spice_are_told_or_why_they_are_not(trained: Trained) -> None:
    folder, _ = trained
    words = ("--model", "models:/capexp-scenes@champion", "--java", "--output", "java.json")
    printed = folder.run("evaluate", *words)
    scores = json.loads((folder.path / "java.json").read_text())
    for name in ("meteor", "spice"):
        if scores[name] is None:
            assert f"{name}: left out: " in printed.stderr
        else:
            assert 0 < scores[name] < 1


@pytest.mark.slow
def test_two_captioners_are_compared_on_the_same_photos(trained: Trained, tmp_path: Path) -> None:
    folder, _ = trained
    bundle = max(folder.path.glob("checkpoints/*/ep*"))  # the last improvement
    other = Folder(tmp_path)
    other.run("train", "--model.lstm_units", "16", "--model.embedding_size", "16", "--training.epochs", "1")
    (worse,) = tmp_path.glob("checkpoints/*/ep*")
    printed = other.run("compare", str(worse), str(bundle), "--output", "compared.json")
    record = json.loads((tmp_path / "compared.json").read_text())
    cider = record["differences"]["cider"]
    assert 0 < cider["low"] < cider["value"] < cider["high"]
    assert cider["p"] < 0.01
    assert f"{cider['value']:+9.3f}" in printed.stdout
    gains = [photo["cider"][1] - photo["cider"][0] for photo in record["most"]]
    assert gains == sorted(gains, reverse=True) and gains[0] > 0
    other.run("compare", str(bundle), str(bundle), "--output", "same.json")
    same = json.loads((tmp_path / "same.json").read_text())
    assert [same["differences"]["cider"]["value"], same["differences"]["cider"]["p"]] == [0, 1]
    assert not same["most"]


@pytest.mark.slow
def test_captions_of_similar_train_photos_are_compared_with(trained: Trained, tmp_path: Path, scenes: Path) -> None:
    folder, _ = trained
    consensus = ("--decoding.method", "consensus", "--decoding.samples", "5")
    words = (*consensus, "--decoding.neighbours", "5")
    copies = ("--decoding.copy_neighbours", "true")
    # A bundle without captions of train photos: evaluate takes those of the data, caption cannot.
    champion = ("--model", "models:/capexp-scenes@champion")
    alone = json.loads(folder.run("evaluate", *champion, *consensus).stdout)
    scores = json.loads(folder.run("evaluate", *champion, *words).stdout)
    assert scores["cross_entropy"] == alone["cross_entropy"]
    assert scores["cider"] > alone["cider"]
    copied = json.loads(folder.run("evaluate", *champion, *words, *copies).stdout)
    assert copied["copied_from_train"] > scores["copied_from_train"]
    photo = str(scenes / "Scenes_Dataset" / "scene_0286.jpg")
    refused = folder.run("caption", *champion, *words, photo, status=2)
    assert "holds no captions of train photos; train it with decoding.neighbours" in refused.stderr
    # A bundle with them: the dev captions of its training need nothing else.
    other = Folder(tmp_path)
    other.run("train", *SMALL, "--training.epochs", "1", "--training.self_critical.epochs", "1", *words)
    (run,) = other.runs()
    assert list(tmp_path.glob("checkpoints/*/self-critical/ep002-*"))
    again = json.loads(other.run("evaluate", *champion).stdout)
    assert again["decoding"]["neighbours"] == 5
    assert again["cider"] == pytest.approx(run.data.metrics["dev_cider"])
    version = other.client.get_model_version_by_alias("capexp-scenes", "champion")
    assert "with the captions of 5 similar train photos" in version.description


@pytest.mark.slow
def test_test_scores_need_no_photos_of_other_splits(trained: Trained, tmp_path: Path, scenes: Path) -> None:
    folder, _ = trained
    data = tmp_path / "data"
    shutil.copytree(scenes, data, ignore=shutil.ignore_patterns("Scenes_Dataset"))
    (data / "Scenes_Dataset").mkdir()
    for name in (scenes / "Scenes.testImages.txt").read_text().split():
        shutil.copy(scenes / "Scenes_Dataset" / name, data / "Scenes_Dataset")
    words = ("--experiment", "scenes", "--model", "models:/capexp-scenes@champion", "--split", "test")
    folder.run("evaluate", *words, "--captions.root", str(data), "--output", "test.json")
    scores = json.loads((folder.path / "test.json").read_text())
    assert scores["photos"] == 100
    assert 0 <= scores["copied_from_train"] <= 1


@pytest.mark.slow
def test_the_experiment_artifact_gives_the_same_losses_again(trained: Trained, tmp_path: Path) -> None:
    folder, _ = trained
    (run,) = folder.runs()
    again = Folder(tmp_path)
    again.run("train", "--experiment", str(folder.artifact(run, "experiment.toml")))
    (other,) = again.runs()
    assert other.data.metrics["best_dev_loss"] == run.data.metrics["best_dev_loss"]


def test_without_weights_the_served_model_says_so_per_photo(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = trained
    (run,) = folder.runs()
    monkeypatch.setenv("TORCH_HOME", folder.environment["TORCH_HOME"])
    monkeypatch.setenv("CAPEXP_OFFLINE", "1")
    model = mlflow.pyfunc.load_model(str(folder.artifact(run, "captioner")))
    photo = min((ROOT / "experiments/scenes/Scenes_Dataset").iterdir()).read_bytes()
    (record,) = model.predict(pd.DataFrame({"photo": [base64.b64encode(photo).decode()]}))
    assert record["caption"] is None
    assert "IMAGENET1K_FEATURES" in record["error"]


def test_caption_without_weights_ends_with_the_remedy(trained: Trained) -> None:
    folder, _ = trained
    photo = str(min((ROOT / "experiments/scenes/Scenes_Dataset").iterdir()))
    printed = folder.run("caption", "--model", "models:/capexp-scenes@champion", photo, status=2)
    assert printed.stderr.count("\n") == 1
    assert "IMAGENET1K_FEATURES" in printed.stderr


@pytest.mark.slow
def test_with_weights_photos_are_captioned_from_the_registered_model_alone(
    vgg16: Path, scenes: Path, tmp_path: Path
) -> None:
    folder = Folder(tmp_path)
    folder.run("train", *SMALL, "--training.epochs", "1", "--features.weights", str(vgg16))
    photos = [str(path) for path in sorted((scenes / "Scenes_Dataset").iterdir())[:2]]
    beam = ("--decoding.method", "beam", "--json")
    (line,) = folder.run("caption", "--model", "models:/capexp-scenes@champion", photos[0], *beam).stdout.splitlines()
    told = json.loads(line)
    assert [len(told["alternatives"]), told["photo"]] == [2, photos[0]]
    assert told["log_probability"] >= max(other["log_probability"] for other in told["alternatives"])
    (tmp_path / "album").mkdir()
    for photo in photos:
        shutil.copy(photo, tmp_path / "album")
    (tmp_path / "album/broken.png").write_bytes(b"no picture")
    (tmp_path / "album/notes.txt").write_text("not looked at")
    printed = folder.run("caption", "--model", "models:/capexp-scenes@champion", "album", "album/*_0*.jpg", status=1)
    names = [f"album/{Path(photo).name}" for photo in photos]
    assert [line.split("\t")[0] for line in printed.stdout.splitlines()] == names * 2
    left_out, broken = printed.stderr.splitlines()
    assert left_out == "album: 1 files left out that are no pictures: notes.txt"
    assert broken.startswith("capexp.caption: album/broken.png: cannot be read as a picture")
    odd = Path(os.fsdecode(os.fsencode(tmp_path / "album") + b"/caf\xe9.jpg"))
    shutil.copy(photos[0], odd)
    words = ("--model", "models:/capexp-scenes@champion", str(odd.relative_to(tmp_path)))
    command = [sys.executable, "-m", "capexp.caption", *words]
    ended = subprocess.run(command, cwd=tmp_path, env=folder.environment, stdout=subprocess.PIPE, check=True)
    assert os.fsencode("caf\udce9.jpg\t") in ended.stdout
    assert '"album/caf\\udce9.jpg"' in folder.run("caption", *words, "--json").stdout
    odd.unlink()
    (run,) = folder.runs()
    model = mlflow.pyfunc.load_model(str(folder.artifact(run, "captioner")))
    sent = [base64.b64encode(Path(photo).read_bytes()).decode() for photo in photos]
    records = model.predict(pd.DataFrame({"photo": [sent[0], "#", sent[1]]}))
    said = [line.split("\t")[1] for line in printed.stdout.splitlines()]
    assert [record["caption"] for record in records] == [said[0], None, said[1]]
    assert [record["error"] is None for record in records] == [True, False, True]
    assert model.predict(pd.DataFrame({"photo": [Path(photos[0]).read_bytes()]}))[0]["caption"] == said[0]


@pytest.mark.slow
def test_a_worse_model_is_registered_but_not_champion_unless_promoted(trained: Trained) -> None:
    folder, _ = trained
    before = folder.client.get_model_version_by_alias("capexp-scenes", "champion").version
    printed = folder.run("train", *SMALL, "--training.epochs", "1")
    assert "not champion: dev_loss" in printed.stdout
    assert folder.client.get_model_version_by_alias("capexp-scenes", "champion").version == before
    folder.run("train", *SMALL, "--training.epochs", "1", "--promote")
    assert folder.client.get_model_version_by_alias("capexp-scenes", "champion").version != before


def has_epoch(folder: Folder, number: int) -> Callable[[], bool]:
    return lambda: any(list(folder.path.glob(f"checkpoints/*/ep{number:03d}-*")))


@pytest.mark.slow
def test_a_version_without_its_card_is_taken_up_or_deleted(tmp_path: Path) -> None:
    """What a kill leaves between the registration of a version and its card."""
    folder = Folder(tmp_path)
    folder.run("train", *SMALL, "--training.epochs", "1")
    (run,) = folder.runs()

    def cut_short(*kept: str) -> None:
        client = folder.client
        for version in client.search_model_versions("name='capexp-scenes'"):
            for tag in version.tags.keys() - set(kept):
                client.delete_model_version_tag("capexp-scenes", version.version, tag)
            client.update_model_version("capexp-scenes", version.version, "")
        client.delete_registered_model_alias("capexp-scenes", "champion")
        client.update_run(run.info.run_id, "RUNNING")

    cut_short()
    folder.run("train", "--resume", run.info.run_id)
    (version,) = folder.client.search_model_versions("name='capexp-scenes'")
    assert str(version.version) == "1"
    assert_tells_the_truth(folder, version)
    cut_short()
    folder.run("train", "--resume", run.info.run_id, "--training.epochs", "3")
    (version,) = folder.client.search_model_versions("name='capexp-scenes'")
    assert str(version.version) == "2"
    assert_tells_the_truth(folder, version)
    cut_short("decoder_digest")
    folder.run("train", "--resume", run.info.run_id)
    (version,) = folder.client.search_model_versions("name='capexp-scenes'")
    assert str(version.version) == "2"
    assert "nats per token" in version.description
    assert_tells_the_truth(folder, version)


@pytest.mark.slow
def test_several_seeds_are_nested_runs_with_mean_and_spread(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    settings = ("--seed", "5", *SMALL, "--training.epochs", "2", "--training.precision", "float32")
    printed = folder.run("train", "--seeds", "2", *settings)
    assert "seed 6   epoch   2" in printed.stdout
    parent, *children = folder.runs()
    assert [run.info.status for run in (parent, *children)] == ["FINISHED"] * 3
    assert [run.data.params["seed"] for run in children] == ["5", "6"]
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent.info.run_id}
    losses_of = [run.data.metrics["best_dev_loss"] for run in children]
    assert parent.data.metrics["best_dev_loss_mean"] == pytest.approx(np.mean(losses_of))
    assert parent.data.metrics["best_dev_loss_std"] == pytest.approx(np.std(losses_of, ddof=1))
    assert parent.data.metrics["dev_cider_std"] > 0
    best = children[int(np.argmin(losses_of))]
    assert parent.data.tags["best_run"] == best.info.run_id
    (version,) = folder.client.search_model_versions("name='capexp-scenes'")
    assert float(version.tags["dev_loss"]) == min(losses_of)
    alone = Folder(tmp_path / "alone")
    alone.path.mkdir()
    alone.run("train", *settings[:1], "6", *settings[2:])
    (single,) = alone.runs()
    assert single.data.metrics["best_dev_loss"] == losses_of[1], "a seed gives the same alone"


@pytest.mark.slow
def test_a_killed_extraction_goes_on_and_two_at_once_share_the_work(tmp_path: Path, vgg16: Path) -> None:
    folder = Folder(tmp_path)
    words = (
        *("--split", "dev", "--features.cache", "cache", "--features.weights", str(vgg16)),
        *("--features.batch_size", "10", "--features.size", "96"),
    )
    process = folder.start(sys.executable, "-m", "capexp.extract", *words)
    record = 32 + 4 + 2 * 512

    def size() -> int:
        return sum(path.stat().st_size for path in tmp_path.glob("cache/*.features"))

    wait_for(lambda: size() > 4096 + 20 * record)
    process.kill()
    process.communicate()
    kept = (size() - 4096) // record
    assert 20 <= kept < 100
    both = [folder.start(sys.executable, "-m", "capexp.extract", *words) for _ in range(2)]
    for process in both:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        assert "100 photos of dev" in out
    assert size() == 4096 + 100 * record, "each photo once"
    (file,) = tmp_path.glob("cache/*.features")
    ours = np.frombuffer(file.read_bytes()[4096:], dtype=np.dtype([("photo", "S32"), ("rest", "V1028")]))
    assert len(set(ours["photo"])) == 100


BAD = {
    "--training.epochs 0": "training.epochs",
    "--training.epoch 3": "did you mean training.epochs?",
    "--model.dropout 1.5": "model.dropout",
    "--model.lstm_units -4": "model.lstm_units",
    "--training.device cuda:99": "training.device = 'cuda:99'",
    "--experiment nothing": "--experiment nothing",
    "--captions.root /nowhere": "/nowhere: no such folder",
    "--features.weights /nowhere.pth": "/nowhere.pth",
    "--features.layer fc2": "features.layer",
    "--features.pool max2 --features.weights IMAGENET1K_V1": "grid of 49",
    "--vocabulary.minimum_count 1000000": "vocabulary.minimum_count",
    "--resume 0123": "nothing was tracked here",
    "--training.epochs": "--training.epochs needs a value",
}


@pytest.mark.parametrize("arguments", BAD)
def test_bad_settings_are_refused_in_one_line_before_any_run(
    tmp_path: Path, arguments: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CAPEXP_OFFLINE", "1")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    mlflow.set_tracking_uri(database_uri(tmp_path / "mlflow.db"))
    with pytest.raises((InputError, SystemExit)) as caught:
        train(arguments.split())
    line = capsys.readouterr().err if isinstance(caught.value, SystemExit) else f"{caught.value}\n"
    assert line.count("\n") == 1
    assert BAD[arguments] in line
    assert not Folder(tmp_path).runs()
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("arguments", ["--training.epochs 0", "--captions.root /nowhere", "--training.epochs"])
def test_a_refusal_is_one_line_on_stderr_and_exit_status_2(tmp_path: Path, arguments: str) -> None:
    folder = Folder(tmp_path)
    printed = folder.run("train", *arguments.split(), status=2)
    assert printed.stderr.count("\n") == 1, printed.stderr
    assert printed.stderr.startswith("capexp.train: ")
    assert BAD[arguments] in printed.stderr
    assert not list(tmp_path.iterdir())


def assert_tells_the_truth(folder: Folder, version: ModelVersion) -> None:
    """The score that a version is compared by is that of the weights it holds."""
    mlflow.set_tracking_uri(folder.store)
    local = Path(mlflow.artifacts.download_artifacts(f"models:/{version.name}/{version.version}"))
    record = Captioner.load(local / "artifacts/bundle").record
    assert record is not None
    assert float(version.tags["dev_loss"]) == record.dev_loss


@pytest.mark.slow
def test_a_finished_run_trained_on_registers_what_it_has_now(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.run("train", *SMALL, "--training.epochs", "1")
    (run,) = folder.runs()
    folder.run("train", "--resume", run.info.run_id, "--training.epochs", "2")
    versions = folder.client.search_model_versions("name='capexp-scenes'")
    assert len(versions) == 2
    for version in versions:
        assert_tells_the_truth(folder, version)
    champion = max(versions, key=lambda version: int(version.version))  # the later one is the better one
    assert folder.client.get_model_version_by_alias("capexp-scenes", "champion").version == champion.version

    again = ("train", "--resume", run.info.run_id, "--training.self_critical.learning_rate", "0.0003")
    second = (*again, "--training.self_critical.epochs", "1", "--registry.metric", "dev_cider")
    (last,) = [line for line in folder.run(*second).stdout.splitlines() if "reward" in line]
    is_better = last.endswith("*")  # which one small epoch need not be
    assert len(folder.client.search_model_versions("name='capexp-scenes'")) == 2 + is_better
    assert len(folder.client.get_metric_history(run.info.run_id, "dev_loss")) == 3
    assert "has finished" in folder.run(*second, status=2).stderr
    refused = folder.run("train", "--resume", run.info.run_id, "--training.self_critical.epochs", "0", status=2)
    assert "--training.self_critical.epochs 0: run" in refused.stderr and "has done 1 already" in refused.stderr
    told = folder.runs()[0].data.tags
    assert told["resumed.training.self_critical.learning_rate"] == "0.0003"
    assert told["resumed.registry.metric"] == "dev_cider"
    settings = tmp_path / "checkpoints" / run.info.run_id / "experiment.toml"
    before = settings.read_bytes()
    refused = folder.run("train", "--resume", run.info.run_id, "--training.epochs", "3", status=2)
    assert "its self-critical phase has begun after 2 epochs" in refused.stderr and refused.stderr.count("\n") == 1
    more = ("--training.self_critical.epochs", "2", "--training.self_critical.learning_rate", "0.5")
    refused = folder.run("train", "--resume", run.info.run_id, *more, status=2)
    assert "--training.self_critical.learning_rate 0.5: the run was started with 0.0003" in refused.stderr
    assert settings.read_bytes() == before


@pytest.mark.slow
def test_a_run_that_is_being_trained_or_whose_data_changed_is_not_resumed(tmp_path: Path, scenes: Path) -> None:
    folder = Folder(tmp_path)
    shutil.copytree(scenes, tmp_path / "data")
    settings = (*SMALL, "--captions.root", "data", "--training.epochs", "500", "--training.patience", "500")
    process = folder.start(sys.executable, "-m", "capexp.train", *settings)
    wait_for(has_epoch(folder, 1))
    (run,) = folder.runs()
    refused = folder.run("train", "--resume", run.info.run_id, status=2)
    assert "another process is training it" in refused.stderr
    process.kill()
    process.communicate()
    captions = tmp_path / "data/Scenes.token.txt"
    captions.write_text(captions.read_text().replace("A ", "The ", 1))
    refused = folder.run("train", "--resume", run.info.run_id, status=2)
    assert "data_digest" in refused.stderr
    assert refused.stderr.count("\n") == 1


@pytest.mark.slow
def test_clearing_features_that_cannot_be_computed_again_is_refused(tmp_path: Path, scenes: Path) -> None:
    folder = Folder(tmp_path)
    shutil.copytree(scenes / "features", tmp_path / "features")
    refused = folder.run("extract", "--features.cache", "features", "--clear", status=2)
    assert "IMAGENET1K_FEATURES" in refused.stderr
    assert list((tmp_path / "features").glob("*.features"))


@pytest.mark.slow
def test_four_first_runs_at_once_all_end_well(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.environment["OMP_NUM_THREADS"] = "1"
    words = (*SMALL, "--training.epochs", "1")
    processes = [folder.start(sys.executable, "-m", "capexp.train", *words) for _ in range(4)]
    for process in processes:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, f"{out}\n{err}"
    assert [run.info.status for run in folder.runs()] == ["FINISHED"] * 4
    assert len(folder.client.search_model_versions("name='capexp-scenes'")) == 4


@pytest.mark.slow
def test_an_unreachable_server_is_told_of_before_any_work(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.environment["MLFLOW_TRACKING_URI"] = "http://someone:geheim@127.0.0.1:9"
    start = time.monotonic()
    printed = folder.run("train", *SMALL, status=2)
    assert "MLFLOW_TRACKING_URI" in printed.stderr.splitlines()[-1]
    assert "geheim" not in printed.stdout + printed.stderr
    assert time.monotonic() - start < 120


@pytest.mark.slow
def test_a_study_goes_on_where_it_stopped_and_registers_its_best_once(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    settings = ("--training.epochs", "1", "--tune.search", '{"model.lstm_units": {"low": 8, "high": 32}}')
    folder.run("tune", "--trials", "2", *settings)
    folder.run("tune", "--trials", "3", *settings)
    runs = folder.runs()
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    trials = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert len(trials) == 3
    assert {run.info.status for run in runs} == {"FINISHED"}
    units = [run.data.params["model.lstm_units"] for run in trials]
    assert len(set(units)) == 3, "a continued study draws new values"
    best = min(trials, key=lambda run: float(run.data.metrics["best_dev_loss"]))
    assert parent.data.tags["best_run"] == best.info.run_id
    versions = folder.client.search_model_versions("name='capexp-scenes'")
    assert {version.run_id for version in versions} == {parent.info.run_id}
    for version in versions:
        assert_tells_the_truth(folder, version)
    assert [path.name for path in (tmp_path / "studies/scenes").iterdir()] == [best.info.run_id]


@pytest.mark.slow
def test_mlflow_run_trains_in_the_run_that_mlflow_made(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.environment["MLFLOW_TRACKING_URI"] = database_uri(tmp_path / "mlflow.db")
    settings = {"training.epochs": "1", "training.learning_rate": "5e-3", "model.lstm_units": "32"}
    given = [word for name, value in settings.items() for word in ("-P", f"{name}={value}")]
    process = folder.start("mlflow", "run", str(ROOT), "--env-manager", "local", *given)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, f"{out}\n{err}"
    (run,) = folder.runs()
    assert run.info.status == "FINISHED"
    assert run.data.params["training.learning_rate"] == "5e-3"
    assert run.data.params["model.dropout"] == "0.2"
    assert folder.client.get_model_version_by_alias("capexp-scenes", "champion").run_id == run.info.run_id


@pytest.mark.slow
@pytest.mark.parametrize("form", cases("captions.txt", of=("captions.txt", "coco.json", "karpathy.json")))
def test_the_template_goes_from_ones_own_photos_to_a_registered_captioner(
    tmp_path: Path, flickr8k: Path, vgg16: Path, form: str
) -> None:
    data = tmp_path / "my-photos"
    (data / "photos").mkdir(parents=True)
    photos = {
        split: (flickr8k / f"Flickr_8k.{split}Images.txt").read_text().split()[:count]
        for split, count in (("train", 24), ("dev", 6))
    }
    captions = [line for line in (flickr8k / "Flickr8k.token.txt").read_text().splitlines() if "#" in line]
    ours = [line for line in captions if line.split("#")[0] in {*photos["train"], *photos["dev"]}]
    texts = [(line.split("#")[0], line.split("\t")[1]) for line in ours]
    for split, names in photos.items():
        for name in names:
            shutil.copy(flickr8k / "Flicker8k_Dataset" / name, data / "photos" / name)
        if form != "karpathy.json":
            (data / f"{split}.txt").write_text("\n".join(names))
    names = [*photos["train"], *photos["dev"]]
    if form == "captions.txt":
        content = "\n".join(ours)
    elif form == "coco.json":
        images = [{"id": number, "file_name": name} for number, name in enumerate(names)]
        notes = [{"image_id": names.index(name), "caption": text} for name, text in texts]
        content = json.dumps({"images": images, "annotations": notes})
    else:
        said = {name: [{"raw": text} for other, text in texts if other == name] for name in names}
        splits = {name: "train" if name in photos["train"] else "val" for name in names}
        rows = [{"filename": name, "split": splits[name], "sentences": said[name]} for name in names]
        content = json.dumps({"images": rows})
    (data / form).write_text(content)
    (tmp_path / "experiments").mkdir()
    shutil.copy(ROOT / "experiments/own-photos.toml", tmp_path / "experiments/my-photos.toml")
    folder = Folder(tmp_path)
    words = [
        *("--experiment", "experiments/my-photos.toml", "--captions.captions", form),
        *("--features.weights", str(vgg16), "--features.cache", "cache"),
    ]
    if form == "karpathy.json":
        words += ["--captions.splits", "karpathy"]
    has_views = form == "captions.txt"
    if has_views:
        words += ["--features.mirror", "true", "--features.crops", "1"]
    assert "30 of 30 photos have no features yet" in folder.run("train", *words, "--dry-run").stdout
    assert not folder.runs()
    folder.run("train", *words)
    assert len(list((tmp_path / "cache").glob("*.features"))) == (3 if has_views else 1)
    model = "models:/capexp-own-photos@champion"
    printed = folder.run("caption", "--model", model, str(flickr8k / "Flicker8k_Dataset" / photos["dev"][0]))
    assert printed.stdout.strip().partition("\t")[2]


def linked_metrics(folder: Folder, model_id: str) -> dict[tuple[str, str], float]:
    """The metrics that MLflow shows on a model's page, by data set and name."""
    model = folder.client.get_logged_model(model_id)
    return {(metric.dataset_name, metric.key): metric.value for metric in model.metrics if metric.dataset_name}


@pytest.mark.slow
def test_scores_stand_on_the_models_page_and_a_plain_evaluation_writes_nothing(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.run("train", *SMALL, "--training.epochs", "2")
    (run,) = folder.runs()
    (model,) = folder.client.search_logged_models([run.info.experiment_id])
    linked = linked_metrics(folder, model.model_id)
    for name in ("best_dev_loss", "dev_loss_blind", "dev_cider", "dev_bleu_4"):
        assert linked["scenes-dev", name] == run.data.metrics[name]
        assert len(folder.client.get_metric_history(run.info.run_id, name)) == 1, "logged once"
    (dev,) = [item.dataset for item in run.inputs.dataset_inputs if item.dataset.name == "scenes-dev"]
    assert {metric.dataset_digest for metric in folder.client.get_logged_model(model.model_id).metrics} <= {
        dev.digest,
        None,
    }

    champion = ("--model", "models:/capexp-scenes@champion", "--split", "test")
    before = run.to_dictionary()
    plain = json.loads(folder.run("evaluate", *champion).stdout)
    assert [one.to_dictionary() for one in folder.runs()] == [before]
    printed = folder.run("evaluate", *champion, "--log")
    first, second = folder.runs()
    assert first.to_dictionary() == before, "a finished training run is not written to"
    assert second.info.run_id in printed.stderr and second.info.status == "FINISHED"
    linked = linked_metrics(folder, model.model_id)
    for name, key in (("test_loss", "cross_entropy"), ("test_cider", "cider"), ("test_bleu_4", "bleu_4")):
        assert linked["scenes-test", name] == second.data.metrics[name] == pytest.approx(plain[key], rel=1e-6)
    assert second.data.params["decoding.method"] == plain["decoding"]["method"]
    assert [item.dataset.name for item in second.inputs.dataset_inputs] == ["scenes-test"]
    inputs = folder.client.get_run(second.info.run_id).inputs
    assert [item.model_id for item in inputs.model_inputs] == [model.model_id]
    assert json.loads(folder.artifact(second, "scores.json").read_text())["photos"] == 100
    # Of a bundle there is no model; under `mlflow run` its run gets the scores.
    bundle = max(folder.path.glob("checkpoints/*/ep*"))
    made = folder.client.create_run(run.info.experiment_id)
    folder.client.log_param(made.info.run_id, "model", "'given by mlflow'")
    folder.environment["MLFLOW_RUN_ID"] = made.info.run_id
    try:
        folder.run("evaluate", "--model", str(bundle))
    finally:
        del folder.environment["MLFLOW_RUN_ID"]
    adopted = folder.client.get_run(made.info.run_id)
    assert adopted.data.metrics["dev_cider"] == pytest.approx(run.data.metrics["dev_cider"], rel=1e-4)
    assert adopted.data.params["model"] == "'given by mlflow'"
