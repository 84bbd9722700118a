"""The registered model where it is used: served by MLflow, under load, and loaded where nothing else of ours is."""

import base64
import http.client
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest
from bench_serving import measure, served
from user_folder import Folder

from capexp.captioning.captioner import Caption, Captioner
from capexp.tracking.store import database_uri

ROOT = Path(__file__).parents[1]
MODEL = "models:/capexp-scenes@champion"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def registered(vgg16: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder in which a model is registered with VGG16's weights; none others are at hand, and none are fetched."""
    folder = tmp_path_factory.mktemp("registered")
    small = ("--model.embedding_size", "48", "--model.lstm_units", "48", "--model.output_dropout", "0")
    training = ("--training.learning_rate", "0.01", "--training.batch_size", "128", "--training.epochs", "2")
    words = (*small, *training, "--features.weights", str(vgg16))
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("MLFLOW_")]:
            patch.delenv(name)
        patch.setenv("CAPEXP_OFFLINE", "1")
        patch.setenv("TORCH_HOME", str(folder / "torch"))
        patch.chdir(folder)
        Folder(folder, has_store=True).run("train", *words)
        patch.setenv("MLFLOW_TRACKING_URI", database_uri(folder / "mlflow.db"))
        yield folder


@pytest.fixture(scope="module")
def artifacts(registered: Path) -> Path:
    """The registered model's files."""
    mlflow.set_tracking_uri(database_uri(registered / "mlflow.db"))
    return Path(mlflow.artifacts.download_artifacts(MODEL, dst_path=str(registered / "artifacts")))


@pytest.fixture(scope="module")
def photos(scenes: Path) -> list[Path]:
    return sorted((scenes / "Scenes_Dataset").iterdir())[:20]


@pytest.fixture(scope="module")
def said(artifacts: Path, photos: list[Path]) -> list[Caption]:
    """What the bundle says of each photo in this process, one at a time, as the clients ask."""
    captioner = Captioner.load(artifacts / "artifacts/bundle")
    captions = [captioner.caption_photos([photo])[0] for photo in photos]
    assert len({str(caption) for caption in captions}) > 5
    return [caption for caption in captions if isinstance(caption, Caption)]


def test_served_over_http_each_photo_gets_its_record_and_each_fault_its_status(
    registered: Path, photos: list[Path], said: list[Caption]
) -> None:
    first, last = (base64.b64encode(photo.read_bytes()).decode() for photo in photos[:2])
    with served(MODEL, registered / "log") as (port, process):

        def ask(body: bytes | dict[str, Any], kind: str = "application/json") -> tuple[int, Any]:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            connection.request("POST", "/invocations", content, {"Content-Type": kind})
            answer = connection.getresponse()
            told = answer.read()
            return answer.status, json.loads(told) if answer.status == 200 else told

        def rows(*sent: object) -> dict[str, Any]:
            return {"dataframe_split": {"columns": ["photo"], "data": [[one] for one in sent]}}

        listening = [
            one.laddr.ip for child in process.children(recursive=True) for one in child.net_connections("inet")
        ]
        assert set(listening) == {"127.0.0.1"}
        status, answer = ask(rows(first, "bm8gcGljdHVyZQ==", str(photos[0]), last))
        assert status == 200
        records = answer["predictions"]
        assert [list(record) for record in records] == [["caption", "log_probability", "error"]] * 4
        assert [record["caption"] for record in records] == [said[0].text, None, None, said[1].text]
        assert records[0]["log_probability"] == pytest.approx(said[0].log_probability, abs=0.05)
        assert [record["log_probability"] is None for record in records] == [False, True, True, False]
        assert [records[0]["error"], records[3]["error"]] == [None, None]
        assert "not a picture" in records[1]["error"]
        assert "not base64" in records[2]["error"]

        status, wide = ask(rows(first) | {"params": {"method": "beam", "beam_width": 5}})
        assert status == 200
        assert wide["predictions"][0]["log_probability"] >= records[0]["log_probability"]
        status, agreed = ask(rows(first) | {"params": {"method": "consensus", "beam_width": 5}})
        assert status == 200
        assert agreed["predictions"][0]["log_probability"] <= wide["predictions"][0]["log_probability"] + 0.05

        refused: list[bytes | dict[str, Any]] = [
            *(rows(first) | {"params": params} for params in ({"method": "nucleus"}, {"beam_width": 0})),
            *(rows(first) | {"params": {"method": "beam", "beam_width": width}} for width in (9000, "wide", 2.5)),
            *(b"garbage", b"", b"\xff\xfe", {}, {"dataframe_split": {"data": 3}}),
            rows(*[first] * 65),
            {"dataframe_split": {"columns": ["picture"], "data": [[first]]}},
        ]
        statuses = [ask(body)[0] for body in refused]
        assert statuses == [400] * len(refused)
        for odd in (3.5, None, {"path": "/etc/passwd"}, ["/etc/passwd"]):
            status, answer = ask(rows(odd))
            assert status == 400 or "not base64" in answer["predictions"][0]["error"], odd
        assert ask({"inputs": []}) == (200, {"predictions": []})
        assert ask(b"[" * 10_000)[0] == 500  # MLflow's own parser
        assert ask(b"photo\n", "text/plain")[0] in (400, 415)
        assert ask(rows(first))[1]["predictions"][0]["caption"] == said[0].text, "the server lives on"


def test_under_load_all_are_answered_as_in_process_and_memory_does_not_grow(
    registered: Path, photos: list[Path], said: list[Caption]
) -> None:
    result = measure(MODEL, photos, requests=40, clients=8, params={})
    assert result["faults"] == []
    assert result["answered"] == 40
    assert list(result["captions"].values()) == [caption.text for caption in said]
    assert result["memory_end_mib"] - result["memory_warm_mib"] < 50, result["memory_mib_by_requests"]


ELSEWHERE = """
import base64, importlib.metadata, json, pathlib, sys
from packaging.requirements import Requirement  # mlflow's own requirement

model, photo = sys.argv[1:]

# All that the stated requirements bring, and what these require.
named, waiting = set(), [Requirement(line.strip()) for line in open(f"{model}/requirements.txt")]
while waiting:
    one = waiting.pop()
    if one.marker and not any(one.marker.evaluate({"extra": extra}) for extra in one.extras | {""}):
        continue
    name = one.name.lower().replace("_", "-").replace(".", "-")
    if name not in named:
        named.add(name)
        try:
            waiting += map(Requirement, importlib.metadata.requires(name) or [])
        except importlib.metadata.PackageNotFoundError:
            pass
blocked = {
    module
    for module, owners in importlib.metadata.packages_distributions().items()
    if not any(owner.lower().replace("_", "-").replace(".", "-") in named for owner in owners)
}
assert {"optuna", "pytest", "nltk"} <= blocked and not {"torch", "mlflow", "pandas", "PIL"} & blocked, blocked


class Without:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in blocked else self.finder.find_spec(name, path, target)


sys.meta_path[:] = map(Without, sys.meta_path)
watching, unpickled = False, []


def watch(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo"):
        raise PermissionError(f"no network here: {event} {arguments}")
    if watching and event == "pickle.find_class":
        unpickled.append(arguments)


sys.addaudithook(watch)
import mlflow, pandas
watching = True
loaded = mlflow.pyfunc.load_model(model)
records = loaded.predict(pandas.DataFrame({"photo": [base64.b64encode(open(photo, "rb").read()).decode()]}))
import capexp
assert pathlib.Path(capexp.__file__).is_relative_to(model), capexp.__file__
assert not unpickled, unpickled
print(json.dumps(records))
"""


def test_it_loads_elsewhere_with_its_stated_requirements_alone(
    artifacts: Path, photos: list[Path], said: list[Caption], tmp_path: Path
) -> None:
    """Of what is installed only the closure of requirements.txt can be imported; no path, no network, no pickle."""
    code = tmp_path / "elsewhere.py"
    code.write_text(ELSEWHERE)
    words = [sys.executable, "-I", str(code), str(artifacts), str(photos[0])]
    printed = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert printed.returncode == 0, printed.stderr
    (record,) = json.loads(printed.stdout.splitlines()[-1])
    assert record["caption"] == said[0].text
    assert record["error"] is None
    assert not [path for path in artifacts.rglob("*") if path.suffix in (".pkl", ".pickle", ".pth", ".pt")]
