"""A kill of a soak: the soaks themselves take an hour and more, and are run by hand."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.parametrize(("activity", "kills"), [("train", 1)])
def test_killed_at_random_it_comes_to_what_the_undisturbed_comes_to(tmp_path: Path, activity: str, kills: int) -> None:
    command = [sys.executable, str(ROOT / "experiments/soak/soak_kills.py"), "--only", activity, "--kills", str(kills)]
    subprocess.run(
        [*command, "--output", str(tmp_path / "counted.json")],
        env=os.environ | {"TMPDIR": str(tmp_path)}, check=True, timeout=600,
    )  # fmt: skip
    counted = json.loads((tmp_path / "counted.json").read_text())[activity]
    assert counted["kills"] == kills
    assert counted["ended as undisturbed"] == counted["begun"] > 0
    assert counted["bundles checked"] > 0
