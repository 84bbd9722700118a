"""What the benchmarks share: contestants in turn, medians and ratios, peaks of memory, the machine, the record.

A ratio is what one contestant does in a second by what another does, in the same round of the same call, so it is true
on a machine whose speed drifts; more is better. ``experiments/benchmarks/`` holds the records that are committed, one a
benchmark and kind of device; a run says which of its ratios fell behind them.
"""

import argparse
import json
import multiprocessing
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

RECORDS = Path(__file__).parent
BEHIND = 0.85  # of the committed ratio: what is less is told


def arguments(doc: str | None) -> argparse.ArgumentParser:
    """The flags that every benchmark has."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch on the CPU")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="where to write the record")
    return parser


@dataclass
class Record:
    """What a benchmark measured, and where."""

    name: str
    unit: str
    """What the rates count in a second."""
    device: torch.device
    settings: dict[str, Any]
    rates: dict[str, float] = field(default_factory=dict)
    """Medians over the rounds."""
    ratios: dict[str, float] = field(default_factory=dict)
    """Medians over the rounds; more is better."""
    peaks: dict[str, float] = field(default_factory=dict)
    """MiB at most."""
    growth: dict[str, dict[str, float]] = field(default_factory=dict)
    """How a cost grows: what grows, then its values."""

    def race(
        self,
        contestants: Mapping[str, Callable[[], float]],
        pairs: list[tuple[str, str]],
        rounds: int,
        warm_up: bool = True,
        tidy: Callable[[], object] = lambda: None,
    ) -> None:
        """Runs contestants in turn, after a round that is not counted; each gives how much it did.

        ``tidy`` clears up after each, and is not counted.
        """

        def measure(work: Callable[[], float]) -> float:
            measured = rate(work, self.device)
            tidy()
            return measured

        measured = [{name: measure(work) for name, work in contestants.items()} for _ in range(rounds + warm_up)]
        measured = measured[-rounds:]
        for name in contestants:
            self.rates[name] = statistics.median(one[name] for one in measured)
        for a, b in pairs:
            self.ratios[f"{a} / {b}"] = statistics.median(one[a] / one[b] for one in measured)

    def finish(self, output: Path | None) -> None:
        """Prints the record, and what fell behind the committed one; writes it where asked."""
        record = {
            "name": self.name,
            "command": " ".join(Path(word).name if "/" in word else word for word in sys.argv),
            "machine": machine(self.device),
            "settings": self.settings,
            "unit": self.unit,
            "rates": _rounded(self.rates),
            "ratios": _rounded(self.ratios),
            "peaks_mib": _rounded(self.peaks),
            "growth": {name: _rounded(values) for name, values in self.growth.items()},
        }
        text = json.dumps({key: value for key, value in record.items() if value != {}}, indent=2)
        print(text)
        committed = RECORDS / f"{self.name}-{self.device.type}.json"
        known = json.loads(committed.read_text(encoding="utf-8")).get("ratios", {}) if committed.is_file() else {}
        for name, value in known.items():
            if name in self.ratios and self.ratios[name] < BEHIND * value:
                print(f"{self.name}: fell behind: {name} is {self.ratios[name]:.3g}, committed is {value}")
        if output is not None:
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(text + "\n", encoding="utf-8")


def rate(work: Callable[[], float], device: torch.device) -> float:
    """What some work does in a second; it gives how much it did."""
    _wait(device)
    start = time.perf_counter()
    done = work()
    _wait(device)
    return done / (time.perf_counter() - start)


def peak(work: Callable[..., object], *values: Any) -> float:
    """MiB that a process of its own comes to hold in doing some work, its libraries counted."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:  # whose process may have some of its own
        return pool.submit(_peak, work, values).result()


def _peak(work: Callable[..., object], values: tuple[Any, ...]) -> float:
    work(*values)
    # Not getrusage's maximum, which a process inherits from the one that has started it.
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 1024


def profile(work: Callable[[], object], steps: int, device: torch.device, lines: int = 16) -> None:
    """Prints how many milliseconds of each of the steps that ``work`` does go into which operation of torch."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    work()
    _wait(device)
    start = time.perf_counter()
    work()
    _wait(device)
    unwatched = time.perf_counter() - start
    with torch.profiler.profile(activities=activities) as watched:
        work()
        _wait(device)
    found = watched.key_averages()
    times = {one.key: one.self_device_time_total if device.type == "cuda" else one.self_cpu_time_total for one in found}
    print(f"  {1000 * unwatched / steps:7.2f}  all, not watched")
    for name in sorted(times, key=times.__getitem__, reverse=True)[:lines]:
        print(f"  {times[name] / 1000 / steps:7.2f}  {name}")


def flops(
    a: tuple[int, int], b: tuple[int, int], dtype: torch.dtype, device: torch.device, seconds: float = 0.5
) -> float:
    """Floating-point operations a second of one product of matrices of these shapes, measured now."""
    left, right = torch.randn(a, device=device).to(dtype), torch.randn(b, device=device).to(dtype)
    left @ right
    _wait(device)
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        for _ in range(4):
            left @ right
        _wait(device)
        count += 4
    return count * 2 * a[0] * a[1] * b[1] / (time.perf_counter() - start)


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures were measured on."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    found = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    flags = set(found.get("flags", "").split())
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "processor": found.get("model name", platform.processor()),
        "instructions": sorted(flags & {"avx2", "avx512f", "avx512_bf16", "amx_bf16"}),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _rounded(values: Mapping[str, float]) -> dict[str, float]:
    return {name: float(f"{value:.4g}") for name, value in values.items()}
