"""The served model for half an hour under load, with faults: no request may be lost, and memory must stay flat.

    python experiments/soak/soak_service.py --weights FILE
    python experiments/soak/soak_service.py --minutes 1

A captioner is trained on the embedded scenes, registered, and served by `mlflow models serve`. Clients ask for captions
one after another. If no answer comes, they ask again. Each caption must be the one that the bundle gives. At the same
time another client sends invalid requests, breaks off, sends very slowly or stays silent. The server is paused for
seconds again and again, and after a sixth of the time it is killed and started again. Memory is compared over the last
two thirds of the time.
"""

import base64
import http.client
import io
import json
import os
import random
import signal
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from bench_extraction import draw_weights
from bench_serving import resident, served
from PIL import Image
from soak import ENVIRONMENT, ROOT, SMALL, Folder, arguments, finish

MODEL = "models:/capexp-scenes@champion"
JSON = {"Content-Type": "application/json"}
PATIENCE = 300.0  # seconds until a request that is not answered counts as lost
PAUSE = 1.0  # seconds that a client takes between two requests, on average
STALL = 3.0  # seconds for which the server is paused
GROWTH = 1.05  # the largest allowed ratio of late to early memory


def body(*photos: object, **params: object) -> bytes:
    """Return a request for captions of photos in base64."""
    rows = {"dataframe_split": {"columns": ["photo"], "data": [[photo] for photo in photos]}, "params": params}
    return json.dumps(rows).encode()


def faults(good: str) -> dict[str, bytes]:
    """Return invalid requests, keyed by kind."""
    huge = io.BytesIO()
    Image.new("1", (30_000, 30_000)).save(huge, "PNG")  # little to send, 900 million pixels to open
    return {
        "no JSON": b"garbage",
        "nothing": b"",
        "no text": bytes(range(128, 256)),
        "JSON within JSON": b"[" * 10_000,
        "other columns": json.dumps({"dataframe_split": {"columns": ["x"], "data": [[good]]}}).encode(),
        "no picture": body("bm8gcGljdHVyZQ=="),
        "no base64": body("#"),
        "a path": body("/etc/passwd"),
        "an address": body("http://127.0.0.1/x.jpg"),
        "half a picture": body(good[: len(good) // 2]),
        "too many pixels": body(base64.b64encode(huge.getvalue()).decode()),
        "too many photos": body(*[good] * 65),
        "too many bytes": body("A" * 24 * 2**20),
        "a beam too wide": body(good, method="beam", beam_width=9000),
        "an unknown method": body(good, method="x"),
    }


class Soak:
    """The server, its clients, and the results of their requests."""

    def __init__(self, photos: list[Path], said: list[str], folder: Folder, seconds: float, seed: int) -> None:
        self.photos = [base64.b64encode(photo.read_bytes()).decode() for photo in photos]
        self.said = said
        self.folder = folder
        self.seconds = seconds
        self.end = time.monotonic() + seconds
        self.draw = random.Random(seed)
        self.counted: Counter[str] = Counter()
        self.lost: list[str] = []
        self.latencies: list[float] = []
        self.memory: list[tuple[float, float]] = []
        self.lock = threading.Lock()
        self.port = 0

    def is_over(self) -> bool:
        """Return whether the time is up, or something was lost."""
        return bool(self.lost) or time.monotonic() > self.end

    def ask(self, content: bytes, timeout: float = 60) -> tuple[int, bytes]:
        """Send a request; return the status and the content of its answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            connection.request("POST", "/invocations", content, JSON)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def work(self, task: Callable[[], None]) -> None:
        """Run a task in a thread; an exception in it counts as lost."""
        try:
            task()
        except Exception as error:  # an answer that cannot be parsed
            self.lost.append(f"{type(error).__name__}: {error}")

    def client(self, number: int) -> None:
        """Ask for captions until the time is up; ask for each caption until it is answered."""
        draw = random.Random(number)
        while not self.is_over():
            which = draw.randrange(len(self.photos))
            content, start = body(self.photos[which]), time.monotonic()
            while True:
                status, told = 0, b""
                with suppress(OSError, http.client.HTTPException):
                    status, told = self.ask(content)
                if status == 200:
                    break
                with self.lock:
                    self.counted["asked again"] += 1
                if time.monotonic() - start > PATIENCE:
                    self.lost.append(f"no answer in {PATIENCE:.0f} s, at last status {status}: {told[:200]!r}")
                    return
                time.sleep(0.2)
            (record,) = json.loads(told)["predictions"]
            with self.lock:
                self.counted["captions"] += 1
                self.latencies.append(time.monotonic() - start)
                if record["caption"] != self.said[which]:
                    self.lost.append(f"photo {which}: {record}, the bundle says {self.said[which]!r}")
            time.sleep(draw.expovariate(1 / PAUSE))

    def stranger(self) -> None:
        """Send invalid requests; no answer may be a caption."""
        kinds = faults(self.photos[0])
        while not self.is_over():
            kind = self.draw.choice([*kinds, "broken off", "dripping", "silent"])
            with suppress(OSError, http.client.HTTPException):
                if kind in kinds:
                    status, told = self.ask(kinds[kind])
                    if status == 200 and any(one["caption"] for one in json.loads(told)["predictions"]):
                        self.lost.append(f"{kind}: {told[:200]!r}")
                else:
                    self._rude(kind)
            with self.lock:
                self.counted[f"fault: {kind}"] += 1
            time.sleep(0.5)

    def _rude(self, kind: str) -> None:
        """Send a request and do not complete it."""
        content = body(self.photos[0])
        head = f"POST /invocations HTTP/1.1\r\nHost: x\r\nContent-Type: {JSON['Content-Type']}\r\n"
        with socket.create_connection(("127.0.0.1", self.port), timeout=5) as connection:
            if kind == "silent":
                time.sleep(2)
                return
            connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode())
            for place in range(0, 40, 4):
                connection.sendall(content[place : place + 4])
                if kind == "dripping":
                    time.sleep(0.2)

    def run(self, clients: int) -> None:
        """Serve the model while the clients send requests; kill the server once and start it again."""
        tasks = [partial(self.client, number) for number in range(clients)]
        threads = [threading.Thread(target=self.work, args=(task,)) for task in (*tasks, self.stranger)]
        with ExitStack() as first:
            self.port, process = first.enter_context(served(MODEL, self.folder.path / "server-1.txt"))
            for thread in threads:
                thread.start()
            self._watch(process, lambda: time.monotonic() > self.end - self.seconds * 5 / 6)
            os.killpg(process.pid, signal.SIGKILL)
            self.counted["server killed"] += 1
        with served(MODEL, self.folder.path / "server-2.txt") as (self.port, process):
            self._watch(process, self.is_over)
            for thread in threads:
                thread.join()

    def _watch(self, process: psutil.Process, is_over: Callable[[], bool]) -> None:
        """Record the server's memory, and pause the server for a moment from time to time."""
        again = time.monotonic() + self.seconds / 20
        while not is_over() and not self.lost:
            time.sleep(1)
            self.memory.append((time.monotonic(), resident(process)))
            if time.monotonic() > again:
                again = time.monotonic() + self.draw.uniform(0.5, 1.5) * self.seconds / 20
                everyone = [process, *process.children(recursive=True)]
                for one in everyone:
                    one.suspend()
                time.sleep(STALL)
                for one in everyone:
                    one.resume()
                self.counted["server stopped for a moment"] += 1


def main() -> int:
    """Run the soak; return 1 if a request was lost or memory grew, else 0."""
    parser = arguments(__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--weights", type=Path, metavar="FILE", help="VGG16's convolutions; default: random weights")
    flags = parser.parse_args()
    if flags.weights is not None and not flags.weights.is_file():
        parser.error(f"--weights {flags.weights}: no such file")
    root = Path(tempfile.mkdtemp(prefix="capexp-soak-"))
    folder = Folder(root / "service")
    words = [*SMALL, "--training.epochs", "2"]
    if flags.weights is None:
        words += ["--features.weights", str(draw_weights(root / "random.pth")), "--features.cache", "cache"]
    else:
        words += ["--features.weights", str(flags.weights.absolute())]
    folder.run("train", *words)
    os.environ.update(ENVIRONMENT)
    import mlflow

    from capexp.captioning.captioner import Caption, Captioner
    from capexp.tracking.store import database_uri

    mlflow.set_tracking_uri(database_uri(folder.path / "mlflow.db"))
    local = Path(mlflow.artifacts.download_artifacts(MODEL, dst_path=str(root / "local")))
    photos = sorted((ROOT / "experiments/scenes/Scenes_Dataset").iterdir())[:50]
    captioner = Captioner.load(local / "artifacts/bundle")
    captions = [captioner.caption_photos([photo])[0] for photo in photos]  # one at a time, as the clients ask
    said = [caption.text for caption in captions if isinstance(caption, Caption)]
    soak = Soak(photos, said, folder, 60 * flags.minutes, flags.seed)
    soak.run(flags.clients)
    begin = soak.end - soak.seconds * 2 / 3
    held = [mib for moment, mib in soak.memory if moment > begin]
    part = max(len(held) // 4, 1)
    early, late = statistics.median(held[:part]), statistics.median(held[-part:])
    latencies = sorted(soak.latencies)
    counted: dict[str, Any] = dict(sorted(soak.counted.items())) | {
        "requests lost": len(soak.lost),
        "latency median seconds": round(statistics.median(latencies), 2),
        "latency p99 seconds": round(latencies[int(0.99 * (len(latencies) - 1))], 2),
        "memory MiB, early": round(early),
        "memory MiB, late": round(late),
        "minutes": flags.minutes,
    }
    finish(counted, flags.output)
    if late > GROWTH * early:
        soak.lost.append(f"memory grew from {early:.0f} to {late:.0f} MiB")
    for line in soak.lost[:5]:
        print(line, file=sys.stderr)
    return 1 if soak.lost else 0


if __name__ == "__main__":
    sys.exit(main())
