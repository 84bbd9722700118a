"""Laws of training by several processes: what they come to is what one comes to, and the same in each."""

import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small import checkpoints_in, losses, started
from train_together import CONFIG, KINDS, training

from capexp.distributed import ALONE, World, environment

ROOT = Path(__file__).parents[1]
TOGETHER = Path(__file__).parent / "training/train_together.py"


def test_torchruns_environment_tells_the_place_and_nothing_else_does(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        assert World.from_environment() == ALONE
        monkeypatch.setenv(name, "3")
    assert World.from_environment() == World(3, 3)


def test_the_environment_is_set_for_a_block_and_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAPEXP_A", "old")
    monkeypatch.setenv("CAPEXP_B", "kept")
    monkeypatch.delenv("CAPEXP_C", raising=False)
    before = dict(os.environ)
    for error in (None, KeyboardInterrupt):
        with suppress(KeyboardInterrupt), environment(CAPEXP_A="new", CAPEXP_B=None, CAPEXP_C="new"):
            changed = dict(os.environ)
            if error is not None:
                raise error
        assert changed == {name: value for name, value in before.items() if name != "CAPEXP_B"} | {
            "CAPEXP_A": "new",
            "CAPEXP_C": "new",
        }
        assert dict(os.environ) == before


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_several_processes_come_to_what_one_comes_to(tmp_path: Path, count: int) -> None:
    command = ["-m", "torch.distributed.run", "--nproc-per-node", str(count), str(TOGETHER)]
    path = os.pathsep.join(str(ROOT / folder) for folder in ("", "tests", "tests/captioning", "tests/training"))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    subprocess.run([sys.executable, *command, str(tmp_path)], check=True, env=environment, timeout=600)
    told: list[dict[str, Any]] = [
        json.loads((tmp_path / f"rank{rank}" / "told.json").read_text()) for rank in range(count)
    ]
    assert all(one == told[0] for one in told), "each process holds the same weights, bit for bit"
    for kind in KINDS:
        alone = losses(list(started(training(kind), checkpoints_in(tmp_path / kind[0]), CONFIG)))
        np.testing.assert_allclose(told[0][kind[0]], alone, rtol=2e-5)
    dropped = training(KINDS[0], dropout=0.2)
    with_dropout = losses(list(started(dropped, checkpoints_in(tmp_path / "dropout"), CONFIG)))
    assert with_dropout[-1][1] == pytest.approx(told[0]["dropout"][-1][1], rel=0.1)
    rewards = told[0]["rewards"]
    assert rewards[-1] > rewards[0]
    assert told[0]["threads"] == [], "none is left to meet the interpreter's end"
    assert not [path for path in (tmp_path / "rank1").rglob("*") if path.suffix in (".pt", ".safetensors")]
