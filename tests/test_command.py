"""Commands answer at once, and without what they do not need."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

COMMANDS = ("train", "tune", "evaluate", "caption", "compare", "extract", "download")
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
    root = Path(__file__).parents[1]
    printed = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True).stdout
    assert printed.splitlines()[-1] == "[]"
    assert f"python -m capexp.{command}" in printed


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_an_entry_point_of_the_mlflow_project(command: str) -> None:
    project = yaml.safe_load((Path(__file__).parents[1] / "MLproject").read_text())
    assert any(f"python -m capexp.{command} " in entry["command"] for entry in project["entry_points"].values())
