"""Commands answer at once, and without what they do not need."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]

COMMANDS = ("train", "tune", "evaluate", "caption", "compare", "extract", "download", "sync")
HEAVY = {"torch", "mlflow", "optuna", "torchvision", "numpy", "streamlit"}
CODE = """
import sys
from capexp import {command}
try:
    {command}.{command}(["--help"])
except SystemExit:
    print(sorted({heavy} & set(sys.modules)))
"""


@pytest.mark.parametrize("command", [*COMMANDS, "app"])
def test_help_imports_nothing_heavy(command: str) -> None:
    code = CODE.format(command=command, heavy=HEAVY)
    printed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert printed.splitlines()[-1] == "[]"
    assert f"python -m capexp.{command}" in printed


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_an_entry_point_of_the_mlflow_project(command: str) -> None:
    project = yaml.safe_load((ROOT / "MLproject").read_text())
    assert any(f"python -m capexp.{command} " in entry["command"] for entry in project["entry_points"].values())


UNSENT = """
import pickle
from capexp import command
from capexp.data.errors import Unsent

def end():
    raise pickle.loads(pickle.dumps(Unsent("0123", "no server")))

command.main("tune", end)
"""


def test_a_run_that_was_not_all_sent_is_told_with_the_remedy_from_a_worker_too() -> None:
    printed = subprocess.run([sys.executable, "-c", UNSENT], cwd=ROOT, capture_output=True, text=True)
    assert printed.returncode == 3
    assert printed.stderr.count("\n") == 1 and printed.stderr.startswith("capexp.tune: run 0123 ")
    assert "(no server)" in printed.stderr and printed.stderr.endswith("python -m capexp.sync 0123\n")
