"""conda.yaml holds the pins, pyproject.toml the ranges: they list the same and agree; a wheel is whole."""

import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from user_folder import Folder

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
    shutil.copytree(ROOT / "experiments", source / "experiments", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    wheel = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir"]
    subprocess.run([*wheel, str(tmp_path), str(source)], check=True)
    (built,) = tmp_path.glob("capexp-*.whl")
    files = {str(path.relative_to(source)) for path in (source / "capexp").rglob("*") if path.is_file()}
    assert "capexp/report/gallery.html" in files
    assert files <= set(zipfile.ZipFile(built).namelist())
    installed = install(built, tmp_path / "venv")
    folder = Folder(tmp_path / "user")
    folder.path.mkdir()
    del folder.environment["PYTHONPATH"]
    folder.environment |= {"XDG_CACHE_HOME": str(tmp_path / "caches"), "HOME": str(tmp_path), "COLUMNS": "300"}

    def run(*words: str, status: int = 0) -> str:
        process = folder.start(str(installed), *words)
        out, err = process.communicate(timeout=300)
        assert process.returncode == status, err
        return out + err

    data = tmp_path / "venv" / "share" / "capexp" / "experiments"
    before = {path: path.stat().st_mtime for path in data.rglob("*")}
    told = run("train", "--training.epochs", "1", "--model.lstm_units", "16", "--model.embedding_size", "16")
    assert "registered  capexp-scenes version 1" in told
    assert {path: path.stat().st_mtime for path in data.rglob("*")} == before, "installed files are only read"
    assert str(tmp_path / "caches" / "capexp" / "flickr8k") in run("download", "--help")
    told = run("train", "--experiment", "flickr8k-merge-conv", "--dry-run", status=2)
    assert f"{tmp_path / 'caches' / 'capexp' / 'flickr8k'}: no such folder" in told
    assert "COMMAND is one of train, tune" in run("--help") and "COMMAND" in run("paint", status=2)


def install(wheel: Path, folder: Path) -> Path:
    """Install a wheel in a new environment that shares the other packages of this one; return its command."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "install", "--quiet", "--no-deps"]
    subprocess.run([*pip, str(wheel)], check=True)
    return folder / "bin" / "capexp"
