"""Ensembles as a user runs them: members found, gone on with or trained, then registered as one captioner."""

import base64
import json
import shutil
import signal
import sys
from pathlib import Path

import mlflow
import pandas as pd
import pytest
from user_folder import Folder, wait_for

from capexp.captioning.captioner import Captioner

pytestmark = pytest.mark.slow

SETTINGS = {
    **{"training.epochs": 3, "training.learning_rate": 0.01, "training.precision": "float32"},
    **{"model.embedding_size": 32, "model.lstm_units": 32, "model.output_dropout": 0.0},
}
SINGLE = [word for name, value in SETTINGS.items() for word in (f"--{name}", str(value))]
MEMBERS = json.dumps([{"experiment": "scenes", "seeds": [1, 2], "settings": SETTINGS}])
TOGETHER = ("--experiment", "scenes-ensemble", "--ensemble.members", MEMBERS)


def test_one_command_finds_one_member_trains_the_other_and_registers_them_as_one(
    tmp_path: Path, vgg16: Path, scenes: Path
) -> None:
    folder = Folder(tmp_path, has_store=True)
    folder.run("train", *SINGLE)
    (single,) = folder.runs()
    process = folder.start(sys.executable, "-m", "capexp.train", *TOGETHER, "--features.weights", str(vgg16))
    wait_for(lambda: {path.parent.name for path in tmp_path.glob("checkpoints/*/last.pt")} - {single.info.run_id})
    process.kill()
    process.communicate()
    single, together, other = folder.runs()
    refused = folder.run("train", "--resume", other.info.run_id, status=2)
    assert f"one of several under run {together.info.run_id}" in refused.stderr

    # As after a kill before it had logged its settings and data: only the tags of its start tell whose it is.
    shutil.rmtree(tmp_path / "checkpoints" / other.info.run_id)
    folder.artifact(other, "experiment.toml").unlink()
    for tag in ("data_digest", "vocabulary_digest", "encoder_key"):
        folder.client.delete_tag(other.info.run_id, tag)

    printed = folder.run("train", "--resume", together.info.run_id)  # with VGG16's weights, as it began
    assert f"scenes, seed 1: found, run {single.info.run_id}" in printed.stderr
    assert f"scenes, seed 2: resumed, run {other.info.run_id}" in printed.stderr
    assert [line.split("epoch")[1].split()[0] for line in printed.stdout.splitlines() if "seed 2   epoch" in line] == [
        "1", "2", "3",
    ]  # fmt: skip
    single, together, other = folder.runs()
    assert [run.info.status for run in (single, together, other)] == ["FINISHED"] * 3
    assert other.data.tags["mlflow.parentRunId"] == together.info.run_id
    assert other.data.tags["member"] == "scenes, seed 2"
    assert together.data.tags["member_1"] == single.info.run_id
    assert together.data.tags["member_2"] == other.info.run_id
    assert "ensemble.members" in together.data.params
    assert not {"training.epochs", "model.decoder"} & together.data.params.keys()
    losses = [run.data.metrics["best_dev_loss"] for run in (single, other)]
    loss = together.data.metrics["dev_loss"]
    assert loss == together.data.metrics["best_dev_loss"] < min(losses)
    assert together.data.metrics["dev_loss_blind"] > loss + 0.2
    names = {item.path for item in folder.client.list_artifacts(together.info.run_id)}
    assert {"experiment.toml", "members", "scores.png", "cider.png", "captions.html", "log.txt"} <= names
    gallery = folder.artifact(together, "captions.html").read_text(encoding="utf-8")
    assert "by the ensemble of 2 captioners (greedy decoding)" in gallery

    first, second = sorted(
        folder.client.search_model_versions("name='capexp-scenes'"), key=lambda version: int(version.version)
    )
    champion = folder.client.get_model_version_by_alias("capexp-scenes", "champion")
    assert champion.version == second.version and second.run_id == together.info.run_id
    assert float(second.tags["dev_loss"]) == loss
    assert "ensemble of merge decoders" in second.description
    assert "| members | scenes, seed 1; scenes, seed 2 |" in second.description

    shutil.rmtree(tmp_path / "checkpoints")  # it is whole in itself
    for version in (first, second):
        folder.run(
            "evaluate", "--model", f"models:/capexp-scenes/{version.version}", "--output", f"{version.version}.json"
        )
    scores = json.loads((tmp_path / f"{second.version}.json").read_text())
    assert scores["cross_entropy"] == pytest.approx(loss, rel=1e-6)
    assert scores["cider"] == pytest.approx(together.data.metrics["dev_cider"], rel=1e-4)
    compared = folder.run("compare", f"models:/capexp-scenes/{first.version}", "models:/capexp-scenes@champion")
    assert "100 photos of dev" in compared.stdout
    photo = min((scenes / "Scenes_Dataset").iterdir())
    said = folder.run("caption", "--model", "models:/capexp-scenes@champion", str(photo))
    mlflow.set_tracking_uri(folder.store)
    served = mlflow.pyfunc.load_model("models:/capexp-scenes@champion")
    (record,) = served.predict(pd.DataFrame({"photo": [base64.b64encode(photo.read_bytes()).decode()]}))
    assert said.stdout == f"{photo}\t{record['caption']}\n" and record["caption"]

    again = folder.run("train", *TOGETHER)  # checkpoints are gone: one is among the artifacts, the other is trained
    assert f"scenes, seed 1: found, run {single.info.run_id}" in again.stderr
    assert "scenes, seed 2: trained now" in again.stderr
    assert folder.runs()[-2].data.metrics["dev_loss"] == pytest.approx(loss, rel=1e-6)


def test_an_interrupt_ends_member_and_ensemble_killed_and_the_same_command_goes_on(tmp_path: Path) -> None:
    folder = Folder(tmp_path, has_store=True)
    process = folder.start(sys.executable, "-m", "capexp.train", *TOGETHER)
    wait_for(lambda: list(tmp_path.glob("checkpoints/*/last.pt")))
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 130, err
    together, first = folder.runs()
    assert [run.info.status for run in (together, first)] == ["KILLED"] * 2
    printed = folder.run("train", *TOGETHER)
    assert f"scenes, seed 1: resumed, run {first.info.run_id}" in printed.stderr
    _, _, second_try, other = folder.runs()
    assert second_try.data.tags["member_1"] == first.info.run_id
    assert second_try.data.tags["member_2"] == other.info.run_id
    (bundle,) = tmp_path.glob("checkpoints/*/ensemble")
    assert len(Captioner.load(bundle).models) == 2


def test_a_member_that_was_interrupted_as_a_run_of_its_own_is_resumed(tmp_path: Path) -> None:
    folder = Folder(tmp_path, has_store=True)
    process = folder.start(sys.executable, "-m", "capexp.train", *SINGLE)
    wait_for(lambda: list(tmp_path.glob("checkpoints/*/last.pt")))
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=300)
    (single,) = folder.runs()
    assert single.info.status == "KILLED"
    printed = folder.run("train", *TOGETHER)
    assert f"scenes, seed 1: resumed, run {single.info.run_id}" in printed.stderr
    single, together, _ = folder.runs()
    assert (single.info.status, together.info.status) == ("FINISHED", "FINISHED")
    assert single.info.experiment_id != together.info.experiment_id


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("train", "--training.epochs", "2"), "training.epochs = 2 decides nothing in an ensemble"),
        (("train", "--training.self_critical.epochs", "2"), "training.self_critical.epochs = 2 decides nothing"),
        (("train", "--seeds", "2"), "its seeds are those of ensemble.members"),
        (("train", "--features.pool", "max2"), "scenes has features.pool = mean, scenes-ensemble has max2"),
        (("tune",), "trains nothing that could be searched"),
    ],
)
def test_what_an_ensemble_cannot_do_is_told_in_one_line_and_leaves_no_run(
    tmp_path: Path, words: tuple[str, ...], says: str
) -> None:
    folder = Folder(tmp_path, has_store=True)
    err = folder.run(words[0], "--experiment", "scenes-ensemble", *words[1:], status=2).stderr
    assert says in err and err.count("\n") == 1
    assert folder.runs() == []
