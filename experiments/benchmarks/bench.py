"""Code that all benchmarks share: run contestants in turn; medians, ratios, peaks of memory; the machine; the record.

A ratio is one contestant's work per second divided by another's, in the same round of the same run. So it is valid on a
machine whose speed drifts; more is better. ``experiments/benchmarks/`` contains the committed records, one per
benchmark and kind of device; a run reports which of its ratios fell behind them.
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
BEHIND = {"cpu": 0.85, "cuda": 0.9}  # a figure below this share of the committed one is reported


def arguments(doc: str | None) -> argparse.ArgumentParser:
    """Return a parser with the flags that every benchmark has."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch's threads on the CPU")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="where to write the record")
    return parser


@dataclass
class Record:
    """The results of a benchmark, and the machine on which they were measured."""

    name: str
    unit: str
    """The unit of work that the rates count per second."""
    device: torch.device
    settings: dict[str, Any]
    rates: dict[str, float] = field(default_factory=dict)
    """Work per second: medians over the rounds."""
    ratios: dict[str, float] = field(default_factory=dict)
    """Medians over the rounds; more is better."""
    peaks: dict[str, float] = field(default_factory=dict)
    """The peak of memory in MiB."""
    growth: dict[str, dict[str, float]] = field(default_factory=dict)
    """How a cost grows: keyed by the name of the cost, then by the size that varies."""

    def race(
        self,
        contestants: Mapping[str, Callable[[], float]],
        pairs: list[tuple[str, str]],
        rounds: int,
        warm_up: bool = True,
        tidy: Callable[[], object] = lambda: None,
    ) -> None:
        """Run the contestants in turn; each returns how much work it did. The first round is not counted.

        ``tidy`` is called after each contestant, and its time is not counted.
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
        """Print the record, and the ratios that fell behind the committed ones; write it to ``output`` if given."""
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
        known = json.loads(committed.read_text(encoding="utf-8")) if committed.is_file() else {}
        figures = [("ratios", self.ratios)]
        if self.device.type == "cuda" and known and known["machine"]["device"] == machine(self.device)["device"]:
            figures.append(("rates", self.rates))  # a GPU's speed does not drift
        for kind, of_kind in figures:
            for name, value in known.get(kind, {}).items():
                if name in of_kind and of_kind[name] < BEHIND[self.device.type] * value:
                    print(f"{self.name}: fell behind: {name} is {of_kind[name]:.3g}, committed is {value}")
        if output is not None:
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(text + "\n", encoding="utf-8")


def rate(work: Callable[[], float], device: torch.device) -> float:
    """Return how much ``work`` does per second; ``work`` returns how much it did."""
    _wait(device)
    start = time.perf_counter()
    done = work()
    _wait(device)
    return done / (time.perf_counter() - start)


def peak(work: Callable[..., object], *values: Any) -> float:
    """Return the peak of memory, in MiB, of a new process that does some work, its libraries included."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:  # its process may start others itself
        return pool.submit(_peak, work, values).result()


def _peak(work: Callable[..., object], values: tuple[Any, ...]) -> float:
    work(*values)
    # Not getrusage's maximum, which a process inherits from the process that has started it.
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 1024


def profile(work: Callable[[], object], steps: int, device: torch.device, lines: int = 16) -> None:
    """Print the milliseconds per step that each of torch's operations takes; ``work`` does ``steps`` steps."""
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
    """Measure the floating-point operations per second of a product of two matrices of these shapes."""
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
    """Return a description of the machine on which the figures were measured."""
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
