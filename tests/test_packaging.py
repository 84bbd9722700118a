"""conda.yaml holds the pins, pyproject.toml the ranges: they list the same and agree; a wheel is whole."""

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]


def pins() -> dict[str, str]:
    listed = yaml.safe_load((ROOT / "conda.yaml").read_text())["dependencies"][-1]["pip"]
    return dict(line.split("==") for line in listed)


def ranges() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [Requirement(text) for text in project["dependencies"]]


def test_every_pin_lies_in_its_range() -> None:
    held = pins()
    assert sorted(held) == sorted(requirement.name for requirement in ranges())
    for requirement in ranges():
        assert requirement.specifier.contains(held[requirement.name]), requirement


def test_makefile_reads_all_pins_of_conda_yaml() -> None:
    """The Makefile takes the lines with ``==`` by the same pattern."""
    lines = re.findall(r"^      - (.*==.*)$", (ROOT / "conda.yaml").read_text(), re.MULTILINE)
    assert [line.split("==")[0] for line in lines] == list(pins())


def test_the_python_pinned_is_exact_and_allowed() -> None:
    python = yaml.safe_load((ROOT / "conda.yaml").read_text())["dependencies"][0]
    assert re.fullmatch(r"python=3\.\d+\.\d+", python)
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"] == ">=3.11"


@pytest.mark.slow
def test_a_wheel_carries_every_file_of_the_package(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(ROOT / "capexp", source / "capexp", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    wheel = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir"]
    subprocess.run([*wheel, str(tmp_path), str(source)], check=True)
    (built,) = tmp_path.glob("capexp-*.whl")
    files = {str(path.relative_to(source)) for path in (source / "capexp").rglob("*") if path.is_file()}
    assert "capexp/report/gallery.html" in files
    assert files <= set(zipfile.ZipFile(built).namelist())
