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
import torch
from cases import cases
from train_together import KINDS, STEPS, trained, training

from capexp.distributed import ALONE, World, environment

ROOT = Path(__file__).parents[1]
TOGETHER = Path(__file__).parent / "training/train_together.py"


def test_torchruns_environment_tells_the_place_and_nothing_else_does(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        assert World.from_environment() == ALONE
        monkeypatch.setenv(name, "3")
    assert World.from_environment() == World(3, 3, has_torchrun=True)


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


def told_by(count: int, folder: Path, device: str) -> dict[str, Any]:
    """What so many processes tell, which is the same for all of them."""
    command = ["-m", "torch.distributed.run", "--nproc-per-node", str(count), str(TOGETHER), str(folder), device]
    path = os.pathsep.join(str(ROOT / part) for part in ("", "tests", "tests/captioning", "tests/training"))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    subprocess.run([sys.executable, *command], check=True, env=environment, timeout=600)
    told: list[dict[str, Any]] = [
        json.loads((folder / f"rank{rank}" / "told.json").read_text()) for rank in range(count)
    ]
    assert all(one == told[0] for one in told), "each process holds the same weights, bit for bit"
    return told[0]


@pytest.mark.slow
@pytest.mark.parametrize("count", cases(3, of=(1, 2, 3)))
def test_several_processes_come_to_what_one_comes_to(tmp_path: Path, count: int) -> None:
    told = told_by(count, tmp_path, "cpu")
    for kind in KINDS:
        for steps in STEPS:
            alone = trained(training(kind), steps, tmp_path / kind[0] / steps)
            np.testing.assert_allclose(told[f"{kind[0]} {steps}"], alone, rtol=2e-5)
        assert told[f"{kind[0]} difference"] < 1e-4
    for steps in STEPS:
        with_dropout = trained(training(KINDS[0], dropout=0.2), steps, tmp_path / "dropout" / steps)
        assert with_dropout[-1][1] == pytest.approx(told[f"dropout {steps}"][-1][1], rel=0.1)
        assert (with_dropout == [tuple(epoch) for epoch in told[f"dropout {steps}"]]) == (count == 1)
        rewards = told[f"rewards {steps}"]
        assert rewards[-1] > rewards[0]
    assert told["threads"] == [], "none is left to meet the interpreter's end"
    assert not [path for path in (tmp_path / "rank1").rglob("*") if path.suffix in (".pt", ".safetensors")]


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
def test_with_a_gpu_each_the_all_reduce_is_part_of_the_captured_step(tmp_path: Path, count: int) -> None:
    if torch.cuda.device_count() < count:
        pytest.skip(f"fewer than {count} GPUs here: NCCL refuses two processes on one")
    told, device = told_by(count, tmp_path, "cuda"), torch.device("cuda")
    assert told["chosen"] == "CapturedSteps"
    # A single rank's sum in place is no work: NCCL is called, but adds no kernel to the graph.
    assert told["all-reduces"] == {"captured": 1, "kernels": int(count > 1)}
    for kind in KINDS:
        for steps in STEPS:
            alone = trained(training(kind, device=device), steps, tmp_path / kind[0] / steps)
            np.testing.assert_allclose(told[f"{kind[0]} {steps}"], alone, rtol=1e-4)
    if count == 1:
        with_dropout = trained(training(KINDS[0], 0.2, device), "captured", tmp_path / "dropout")
        np.testing.assert_allclose(told["dropout captured"], with_dropout, rtol=1e-4)
