"""Commands answer at once, and without what they do not need."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from pydantic import BaseModel

from capexp import cli
from capexp.captioning.captioner import Captioner
from capexp.data.vgg16 import EncoderIdentity
from capexp.data.vgg16_weights import NETS
from capexp.data.vocabulary import Vocabulary
from capexp.experiment import setting_names
from capexp.settings import DecodingConfig, Experiment, ModelConfig
from capexp.train import _way_to_run

ROOT = Path(__file__).parents[1]

COMMANDS = ("train", "tune", "evaluate", "caption", "compare", "extract", "download", "sync", "bundle")
HEAVY = {"torch", "mlflow", "optuna", "torchvision", "numpy", "streamlit"}
CODE = """
import sys
from capexp import {command}
try:
    {command}.{command}(["--help"])
except SystemExit:
    print(sorted({heavy} & set(sys.modules)))
"""
NOT_NEEDED = {"mlflow", "optuna", "torch._dynamo", "torchvision", "matplotlib", "pandas", "sqlalchemy", "streamlit"}
RUN = """
import sys
from capexp import {command}
assert {command}.{command}({arguments}) == 0
print(sorted({heavy} & set(sys.modules)))
"""


def imported(command: str, *arguments: str) -> str:
    """Which of the heavy modules that it does not need a command has imported when it has done its work."""
    code = RUN.format(command=command, arguments=list(arguments), heavy=NOT_NEEDED)
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def bundle_with_encoder(folder: Path) -> Path:
    """An untrained captioner that carries a made-up VGG16."""
    import torchvision

    net = NETS["IMAGENET1K_FEATURES"]
    identity = EncoderIdentity("conv5_3", "mean", net.mean, net.std, "0" * 64, "made up")
    words = Vocabulary(("a", "dog", "runs"), "standard", "token")
    captioner = Captioner.fresh(ModelConfig(embedding_size=4, lstm_units=4), words, identity, DecodingConfig(), seed=1)
    with torch.device("meta"):
        layers = torchvision.models.vgg16(weights=None, init_weights=False).features.state_dict()
    encoder = {f"convolutions.{name}": torch.full(value.shape, 1e-3).half() for name, value in layers.items()}
    return captioner.save(folder / "bundle", encoder)


def help_of(command: str, *arguments: str) -> str:
    """The help as it is printed, in one line."""
    words = [sys.executable, "-m", f"capexp.{command}", *arguments, "--help"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    return " ".join(done.stdout.split())


@pytest.mark.parametrize("command", ["train", "tune"])
def test_help_lists_every_setting_with_its_default_and_meaning(command: str) -> None:
    text = help_of(command)
    for name in setting_names():
        assert f"--{name} " in text, name
    assert "--training.epochs N Maximum number of epochs. Whole number, 1 to 1,000,000. [20]" in text
    assert "--model.decoder merge|attention" in text
    assert "--captions.root PATH Folder of the data. [required]" in text
    assert "[~/.cache/capexp/features]" in text


def test_help_shows_the_values_of_an_experiments_file() -> None:
    text = help_of("train", "--experiment", "flickr8k-attention")
    assert "Maximum number of epochs. Whole number, 1 to 1,000,000. [16]" in text
    assert "[capexp-flickr8k]" in text


@pytest.mark.parametrize(
    ("command", "used", "unused"),
    [
        ("caption", "--decoding.beam_width", "--training.epochs"),
        ("extract", "--features.layer", "--decoding.method"),
        ("evaluate", "--training.batch_size", "--training.epochs"),
        ("sync", "RUN_ID", "--training.epochs"),
    ],
)
def test_help_lists_the_settings_that_have_an_effect_on_the_command_alone(command: str, used: str, unused: str) -> None:
    text = help_of(command)
    assert used in text and unused not in text


def test_every_setting_is_explained_in_its_docstring() -> None:
    def unexplained(section: type[BaseModel], prefix: str) -> Iterator[str]:
        for name, field in section.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                yield from unexplained(field.annotation, f"{prefix}{name}.")
            elif not field.description:
                yield f"{prefix}{name}"

    assert list(unexplained(Experiment, "")) == []


def test_the_settings_import_nothing_but_the_standard_library_and_pydantic() -> None:
    code = "import sys; before = set(sys.modules); import capexp.settings; print(*(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    imported = {name.partition(".")[0] for name in done.stdout.split()} - set(sys.stdlib_module_names)
    pydantic = {"pydantic", "pydantic_core", "annotated_types", "typing_extensions", "typing_inspection"}
    assert {name for name in imported if not name.startswith("_")} <= {"capexp"} | pydantic


@pytest.mark.parametrize("command", [*COMMANDS, "app"])
def test_help_imports_nothing_heavy(command: str) -> None:
    code = CODE.format(command=command, heavy=HEAVY)
    printed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert printed.splitlines()[-1] == "[]"
    assert f"python -m capexp.{command}" in printed


@pytest.mark.slow
def test_a_caption_from_a_bundle_imports_neither_trackers_nor_compilers(tmp_path: Path, scenes: Path) -> None:
    photo = next(iter(sorted((scenes / "Scenes_Dataset").glob("*.jpg"))))
    assert imported("caption", "--model", str(bundle_with_encoder(tmp_path)), str(photo)) == "[]"


@pytest.mark.slow
def test_nor_does_a_dry_run() -> None:
    assert imported("train", "--dry-run") == "[]"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_an_entry_point_of_the_mlflow_project(command: str) -> None:
    project = yaml.safe_load((ROOT / "MLproject").read_text())
    assert any(f"python -m capexp.{command} " in entry["command"] for entry in project["entry_points"].values())


UNSENT = """
import pickle
from capexp import cli
from capexp.errors import Unsent

def end():
    raise pickle.loads(pickle.dumps(Unsent("0123", "no server")))

cli.main("tune", end)
"""


def test_a_run_that_was_not_all_sent_is_told_with_the_remedy_from_a_worker_too() -> None:
    printed = subprocess.run([sys.executable, "-c", UNSENT], cwd=ROOT, capture_output=True, text=True)
    assert printed.returncode == 3
    assert printed.stderr.count("\n") == 1 and printed.stderr.startswith("capexp.tune: run 0123 ")
    assert "(no server)" in printed.stderr and printed.stderr.endswith("python -m capexp.sync 0123\n")


@pytest.mark.slow
def test_mlflows_telemetry_is_off_unless_a_user_turns_it_on(tmp_path: Path) -> None:
    code = (
        "from capexp import cli\n"
        "def command():\n"
        "    from mlflow.telemetry import get_telemetry_client\n"
        "    print(get_telemetry_client() is not None)\n"
        "    return 0\n"
        "cli.main('train', command)"
    )
    for wanted, shown in ({}, "False"), ({"MLFLOW_DISABLE_TELEMETRY": "false"}, "True"):
        # Nothing of this environment: MLflow has none either where it sees a test or continuous integration.
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(tmp_path),
            "PYTHONPATH": str(Path(cli.__file__).parents[1]),
        }
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment | wanted, cwd=tmp_path, capture_output=True, text=True
        )
        assert done.stdout.strip() == shown, done.stderr


def test_what_mlflow_has_started_from_elsewhere_says_how_to_get_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    def way(uri: str) -> str | None:
        mlflow.set_tracking_uri(uri)
        return _way_to_run()

    before = mlflow.get_tracking_uri() if mlflow.is_tracking_uri_set() else None
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    elsewhere = f"sqlite:///{tmp_path}/some where/mlflow.db"
    try:
        assert way(elsewhere) is None, "a user who has set the address has it set"
        monkeypatch.setenv("MLFLOW_RUN_ID", "0123")
        assert way(elsewhere) == f"cd {tmp_path}; export MLFLOW_TRACKING_URI='{elsewhere}'"
        assert way("http://me:secret@server:5000") == f"cd {tmp_path}; export MLFLOW_TRACKING_URI=http://server:5000"
        assert way(f"sqlite:///{tmp_path}/mlflow.db") is None, "`mlflow run .` in the project's folder"
    finally:
        mlflow.set_tracking_uri(before)


def test_the_empty_folder_that_mlflow_run_makes_is_removed_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, stray = tmp_path / "a b" / "fünf", tmp_path / "a%20b" / "f%C3%BCnf"
    for folder in (here, stray):
        folder.mkdir(parents=True)
    monkeypatch.chdir(here)
    cli._remove_stray_folder()
    assert {path.name for path in tmp_path.iterdir()} == {"a b"}
    cli._remove_stray_folder()  # there is none
    stray.mkdir(parents=True)
    (stray / "file").touch()
    cli._remove_stray_folder()
    assert (stray / "file").is_file()
    (stray / "file").unlink()
    os.utime(stray, (0, 0))  # made long ago, and not by MLflow
    cli._remove_stray_folder()
    assert stray.is_dir()
    (tmp_path / "plain").mkdir()
    monkeypatch.chdir(tmp_path / "plain")
    cli._remove_stray_folder()
    assert (tmp_path / "plain").is_dir()
