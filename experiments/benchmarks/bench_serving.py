"""The served model under load: latency, photos per second, and whether its memory grows.

    python experiments/benchmarks/bench_serving.py --model models:/capexp-scenes@champion --output serving.json

Starts `mlflow models serve` on a free port of 127.0.0.1 and stops it at the end. Run this in the folder whose
`mlflow.db` has the model. Several clients send the photos of a folder at the same time; each waits for its answer
before it sends the next request.
"""

import argparse
import base64
import http.client
import itertools
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

_PHOTOS = Path(__file__).parents[1] / "scenes" / "Scenes_Dataset"
_MIB = 2**20
_PATIENCE = 600  # seconds to wait for an answer; MLflow's default of 60 is too short on a busy machine


@contextmanager
def served(model: str, log: Path) -> Iterator[tuple[int, psutil.Process]]:
    """Serve a model inside the block; give the server's port and its process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["models", "serve", "-m", model, "--env-manager", "local", "--host", "127.0.0.1", "--port", str(port)]
    words += ["--timeout", str(_PATIENCE)]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    with log.open("w") as output:
        server = subprocess.Popen(
            [sys.executable, "-m", "mlflow", *words],
            env=os.environ | {"PATH": path}, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    try:
        end = time.monotonic() + 120
        while not _answers(port):
            if server.poll() is not None or time.monotonic() > end:
                sys.exit(f"{model} is not served:\n{log.read_text()}")
            time.sleep(0.2)
        yield port, psutil.Process(server.pid)
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)


def _answers(port: int) -> bool:
    try:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        connection.request("GET", "/ping")
        return connection.getresponse().status == 200
    except OSError:
        return False


def resident(process: psutil.Process) -> float:
    """Return the resident memory, in MiB, of a process and all its children."""
    held = [one.memory_info().rss for one in (process, *process.children(recursive=True))]
    return float(sum(held)) / _MIB


def computed(process: psutil.Process) -> float:
    """Return the CPU seconds of a process and all its children."""
    times = [one.cpu_times() for one in (process, *process.children(recursive=True))]
    return sum(float(time.user + time.system) for time in times)


class Load:
    """Requests of one photo each from several clients, and their results."""

    def __init__(self, port: int, photos: list[Path], requests: int, clients: int, params: dict[str, Any]) -> None:
        self.port = port
        self.bodies = [_body(photo, params) for photo in photos]
        self.numbers = iter(range(requests))
        self.lock = threading.Lock()
        self.seconds: list[float] = []
        self.records: dict[int, dict[str, Any]] = {}
        self.faults: list[str] = []
        self.threads = [threading.Thread(target=self._client) for _ in range(clients)]

    def _client(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=_PATIENCE)
        while True:
            with self.lock:
                number = next(self.numbers, None)
            if number is None:
                return
            which = number % len(self.bodies)
            start = time.perf_counter()
            try:
                connection.request("POST", "/invocations", self.bodies[which], {"Content-Type": "application/json"})
                answer = connection.getresponse()
                content = answer.read()
                fault = None if answer.status == 200 else f"request {number}: status {answer.status}"
            except OSError as error:
                connection.close()
                fault = f"request {number}: {error!r}"
            seconds = time.perf_counter() - start
            with self.lock:
                self.seconds.append(seconds)
                if fault is not None:
                    self.faults.append(fault)
                    continue
                (record,) = json.loads(content)["predictions"]
                if self.records.setdefault(which, record) != record:
                    self.faults.append(f"request {number}: {record}, but earlier {self.records[which]}")


def _body(photo: Path, params: dict[str, Any]) -> bytes:
    rows = [[base64.b64encode(photo.read_bytes()).decode()]]
    return json.dumps({"dataframe_split": {"columns": ["photo"], "data": rows}, "params": params}).encode()


def measure(model: str, photos: list[Path], requests: int, clients: int, params: dict[str, Any]) -> dict[str, Any]:
    """Serve a model and send it requests; return the measurements.

    Memory at the end is compared with memory after the first fifth of the requests.
    """
    with tempfile.TemporaryDirectory() as folder, served(model, Path(folder) / "log") as (port, process):
        memory = [(0, resident(process))]
        load = Load(port, photos, requests, clients, params)
        start, before = time.perf_counter(), computed(process)
        for thread in load.threads:
            thread.start()
        while any(thread.is_alive() for thread in load.threads):
            time.sleep(0.5)
            memory.append((len(load.seconds), resident(process)))
        took, spent = time.perf_counter() - start, computed(process) - before
    warm = [held for done, held in memory if done >= requests / 5]
    part = max(len(warm) // 4, 1)
    seconds = sorted(load.seconds)
    return {
        "model": model,
        "params": params,
        "requests": requests,
        "clients": clients,
        "answered": len(seconds) - len(load.faults),
        "faults": load.faults,
        "photos_per_second": len(seconds) / took,
        "core_seconds_per_photo": spent / len(seconds),
        "latency_median_seconds": statistics.median(seconds),
        "latency_p95_seconds": seconds[int(0.95 * (len(seconds) - 1))],
        "latency_maximum_seconds": seconds[-1],
        "memory_start_mib": memory[0][1],
        "memory_warm_mib": statistics.median(warm[:part]),
        "memory_end_mib": statistics.median(warm[-part:]),
        "memory_mib_by_requests": memory,
        "captions": {str(photos[which]): record["caption"] for which, record in sorted(load.records.items())},
    }


def main() -> int:
    """Run the benchmark; return 1 if a request was not answered, or if the same photo got different answers, else 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", required=True, help="models:/NAME@champion, or another URI that `mlflow models serve` accepts"
    )
    parser.add_argument("--requests", type=int, default=1200)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--photos", type=Path, default=_PHOTOS, help="a folder; its first --different photos are sent")
    parser.add_argument("--different", type=int, default=100)
    parser.add_argument("--method", choices=("greedy", "beam", "sample", "consensus"), default="greedy")
    parser.add_argument("--beam-width", type=int, default=3)
    parser.add_argument("--output", type=Path, help="a JSON file, with the memory over time and each caption")
    arguments = parser.parse_args()
    photos = list(itertools.islice(sorted(arguments.photos.iterdir()), arguments.different))
    params = {"method": arguments.method, "beam_width": arguments.beam_width}
    result = measure(arguments.model, photos, arguments.requests, arguments.clients, params)
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(
        "{answered} of {requests} requests answered, {clients} clients at once; "
        "{photos_per_second:.1f} photos a second, {core_seconds_per_photo:.2f} s of a core each; "
        "latency median {latency_median_seconds:.2f} s, "
        "95% within {latency_p95_seconds:.2f} s; memory {memory_start_mib:.0f} MiB before, "
        "{memory_warm_mib:.0f} MiB warm, {memory_end_mib:.0f} MiB at the end".format_map(result)
    )
    for fault in result["faults"][:5]:
        print(fault, file=sys.stderr)
    return 1 if result["faults"] or result["answered"] != result["requests"] else 0


if __name__ == "__main__":
    sys.exit(main())
