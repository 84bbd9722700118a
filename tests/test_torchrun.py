"""torchrun as a user types it: two real processes, a real MLflow store, the embedded scenes."""

import os
import signal
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
from cases import cases
from kinds import TORCHRUN
from mlflow.entities import Run
from PIL import Image
from tracking_server import free_port
from user_folder import Folder, wait_for

from capexp.data.cache import FeatureCache
from capexp.data.photo_transform import MIRROR, PHOTO, crop_view
from capexp.data.photos import digest_photos
from capexp.data.vgg16 import identify
from capexp.settings import FeaturesConfig

pytestmark = pytest.mark.slow

EXACT = (  # masks of dropout differ by process
    *("--model.embedding_size", "48", "--model.lstm_units", "48", "--model.dropout", "0"),
    *("--model.output_dropout", "0", "--training.precision", "float32", "--training.schedule", "constant"),
    # Rounding grows from step to step, with a larger rate sooner.
    *("--training.learning_rate", "1e-3", "--training.batch_size", "128"),
)


def together(folder: Folder, command: str, *arguments: str, status: int = 0) -> tuple[str, str]:
    """What torchrun's two processes print; torchrun itself ends with 1 where one of them has failed."""
    process = folder.start(*TORCHRUN, f"capexp.{command}", *arguments)
    out, err = process.communicate(timeout=300)
    assert process.returncode == status, f"{out}\n{err}"
    return out, err


def ranks(folder: Folder, command: str, *arguments: str, status: int = 0) -> tuple[str, str]:
    """What two processes print in the environment of torchrun's; without torchrun it takes a third of the time."""
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    started = [
        folder.start(sys.executable, "-m", f"capexp.{command}", *arguments, **world, RANK=rank, LOCAL_RANK=rank)
        for rank in ("0", "1")
    ]
    try:
        (out, err), (other_out, other_err) = [process.communicate(timeout=300) for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [status, status], f"{out}\n{err}\n{other_out}\n{other_err}"
    return out + other_out, err + other_err


def losses(folder: Folder, run: Run) -> list[tuple[float, float]]:
    train, dev = (folder.client.get_metric_history(run.info.run_id, name) for name in ("train_loss", "dev_loss"))
    return [(one.value, other.value) for one, other in zip(train, dev, strict=True)]


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    made = Folder(tmp_path, has_store=True)
    made.environment["OMP_NUM_THREADS"] = "1"
    return made


def test_a_run_goes_on_under_torchrun_and_without_it_to_the_same_losses(folder: Folder) -> None:
    folder.run("train", *EXACT, "--training.epochs", "3")
    (alone,) = folder.runs()
    out, err = together(folder, "train", *EXACT, "--training.epochs", "1")
    assert out.count("epoch   1") == 1, "the first process alone tells"
    assert "Traceback" not in err
    _, run = folder.runs()
    assert run.info.status == "FINISHED"
    folder.run("train", "--resume", run.info.run_id, "--training.epochs", "2")
    ranks(folder, "train", "--resume", run.info.run_id, "--training.epochs", "3")
    _, run = folder.runs()
    np.testing.assert_allclose(losses(folder, run), losses(folder, alone), rtol=2e-4)
    assert run.info.status == "FINISHED"
    assert folder.client.get_registered_model("capexp-scenes").latest_versions[0].run_id == run.info.run_id


@pytest.mark.parametrize("rank", cases("1", of=("0", "1")))
def test_a_process_that_is_killed_ends_the_run_and_it_goes_on(folder: Folder, rank: str) -> None:
    started = folder.start(*TORCHRUN, "capexp.train", *EXACT, "--training.epochs", "500", "--training.patience", "500")
    wait_for(lambda: list(folder.path.glob("checkpoints/*/previous.pt")))
    killed = next(child for child in psutil.Process(started.pid).children() if child.environ().get("RANK") == rank)
    os.kill(killed.pid, signal.SIGKILL)
    _, err = started.communicate(timeout=300)
    assert started.returncode == 1
    (run,) = folder.runs()
    if rank == "1":  # the first process tells, and brings the run to its end
        assert run.info.status in ("FAILED", "KILLED")
        assert "another of torchrun's processes has gone" in err or "interrupted" in err
    assert "Signal 9 (SIGKILL)" in err  # torchrun's own words
    done = len(losses(folder, run))
    assert done >= 1, "the state of the second epoch may be saved before its losses are logged"
    ranks(folder, "train", "--resume", run.info.run_id, "--training.epochs", str(done + 2))
    (run,) = folder.runs()
    assert run.info.status == "FINISHED"
    assert len(losses(folder, run)) == done + 2


@pytest.mark.parametrize("how", cases(signal.SIGTERM, of=(signal.SIGINT, signal.SIGTERM)))
def test_an_interrupt_ends_the_run_killed_and_it_goes_on_to_the_undisturbed_losses(
    folder: Folder, how: signal.Signals
) -> None:
    settings = (*EXACT, "--training.epochs", "6", "--training.save_steps", "6", "--training.patience", "500")
    undisturbed = Folder(folder.path / "undisturbed")
    undisturbed.path.mkdir()
    undisturbed.environment["OMP_NUM_THREADS"] = "1"
    ranks(undisturbed, "train", *settings)
    (alone,) = undisturbed.runs()
    started = folder.start(*TORCHRUN, "capexp.train", *settings)
    wait_for(lambda: list(folder.path.glob("checkpoints/*/ep002-*")))
    os.kill(started.pid, how)  # torchrun passes it on
    _, err = started.communicate(timeout=300)
    assert err.count("capexp.train: interrupted") == 1
    (run,) = folder.runs()
    assert run.info.status == "KILLED"
    assert run.data.tags["stopped"] == "interrupt"
    ranks(folder, "train", "--resume", run.info.run_id)
    (run,) = folder.runs()
    assert run.info.status == "FINISHED"
    assert not {"stopped", "error"} & run.data.tags.keys()
    assert losses(folder, run) == losses(undisturbed, alone)


WRONG = {"--model.dropout 2": "--model.dropout 2", "--training.learning_rate 1e30": "the loss is"}


@pytest.mark.parametrize("words", cases(of=WRONG))
def test_what_is_wrong_for_all_is_told_once(folder: Folder, words: str) -> None:
    """The other process waits for the first one, and torchrun ends it."""
    _, err = together(folder, "train", *words.split(), status=1)
    assert err.count("capexp.train: ") == 1
    assert WRONG[words] in err
    assert "exitcode  : 2" in err


def test_what_each_sees_by_itself_is_told_once(folder: Folder) -> None:
    _, err = ranks(folder, "train", "--seeds", "2", status=2)
    assert err.count("capexp.train: --seeds: not under torchrun") == err.count("capexp.train: ") == 1
    _, err = ranks(folder, "evaluate", "--model", "models:/x/1", status=2)
    assert err.count("start this one by itself") == 1


def test_features_are_computed_by_all_and_are_those_that_one_computes(folder: Folder, random_vgg16: Path) -> None:
    (folder.path / "photos").mkdir()
    generator = np.random.default_rng(1)
    names = [f"{number}.png" for number in range(9)]
    for name in names:
        Image.fromarray(generator.integers(0, 256, (6, 8, 3), dtype=np.uint8)).save(folder.path / "photos" / name)
    (folder.path / "captions.txt").write_text("".join(f"{name}#0\ta thing\n" for name in names))
    (folder.path / "train.txt").write_text("\n".join(names[:6]))
    (folder.path / "dev.txt").write_text("\n".join(names[6:]))
    settings = (
        *("--experiment", "own-photos", "--captions.root", "."),
        *("--features.weights", str(random_vgg16), "--features.mirror", "true", "--features.crops", "1"),
    )
    ranks(folder, "extract", *settings, "--features.cache", "together", "--training.device", "cpu")
    folder.run("extract", *settings, "--features.cache", "alone", "--training.device", "cpu")
    made, _, _ = folder.path.glob("together/*.features")
    config = FeaturesConfig.model_validate(
        {"layer": "conv5_3", "pool": made.name.split("-")[1], "weights": str(random_vgg16)}
    )
    digests = digest_photos([folder.path / "photos" / name for name in names])
    for view, count in ((PHOTO, 9), (MIRROR, 6), (crop_view(1), 6)):
        identity = identify(config).of_view(view)
        ours, theirs = (
            FeatureCache(folder.path / one, identity).open(digests[:count]).gather(np.arange(count))
            for one in ("together", "alone")
        )
        np.testing.assert_array_equal(ours, theirs)
    assert (FeatureCache(folder.path / "alone", identify(config).of_view(MIRROR)).lookup(digests[6:]) < 0).all()
    (folder.path / "photos" / names[1]).write_bytes(b"?")
    (folder.path / "photos" / names[4]).write_bytes(b"??")
    _, err = ranks(folder, "extract", *settings, "--features.cache", "together", status=2)
    assert err.count("cannot be read as a picture") + err.count("cannot be read as pictures") >= 1


def test_random_splits_of_a_resumed_run_are_the_same_on_all_ranks(folder: Folder, scenes: Path) -> None:
    data = folder.path / "data"
    data.mkdir()
    (data / "Scenes_Dataset").symlink_to(scenes / "Scenes_Dataset")
    lines = (scenes / "Scenes.token.txt").read_text().splitlines(keepends=True)
    (data / "Scenes.token.txt").write_text("".join(lines[:3000]))
    drawn = ("--captions.root", str(data), "--captions.splits", "random")
    ranks(folder, "train", *EXACT, *drawn, "--training.epochs", "1")
    (run,) = folder.runs()
    (data / "Scenes.token.txt").write_text("".join(lines))  # 200 photos more: a new draw would be another
    ranks(folder, "train", "--resume", run.info.run_id, "--training.epochs", "2")
    (resumed,) = folder.runs()
    assert resumed.info.status == "FINISHED" and len(losses(folder, resumed)) == 2
    assert resumed.data.tags["data_digest"] == run.data.tags["data_digest"]
