"""Everything a user can get wrong, row by row: one line that names the place, exit status 2, and nothing has changed.

``pytest tests/test_bad_input.py -rP`` prints each line.
"""

import io
import os
import pickle
import shlex
import shutil
import signal
import sqlite3
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import h5py
import mlflow
import numpy as np
import pytest
import torch
from cases import cases
from keras_files import Change, saved_model, tokenizer_json
from kinds import KINDS
from user_folder import Folder

from capexp import cli
from capexp.bundle import bundle as make_bundle
from capexp.caption import caption
from capexp.compare import compare
from capexp.evaluate import evaluate
from capexp.extract import extract
from capexp.tracking.store import database_uri
from capexp.train import train
from capexp.tune import tune

ROOT = Path(__file__).parents[1]
COMMANDS = {
    "train": train,
    "tune": tune,
    "evaluate": evaluate,
    "caption": caption,
    "compare": compare,
    "extract": extract,
    "bundle": make_bundle,
}
PHOTOS, TOKENS = "data/Scenes_Dataset", "data/Scenes.token.txt"
LISTS = {split: f"data/Scenes.{split}Images.txt" for split in ("train", "dev", "test")}
PHOTO, OTHER = f"{PHOTOS}/scene_0000.jpg", f"{PHOTOS}/scene_0002.jpg"  # of the train split


@pytest.fixture(scope="module")
def earlier(once: Callable[[str, Callable[[Path], None]], Path], scenes: Path) -> Path:
    """A user's folder with data, its features, and what an earlier run has left."""

    def train(folder: Path) -> None:
        shutil.copytree(scenes, folder / "data")
        data = ("--captions.root", "data", "--features.cache", "data/features")
        Folder(folder).run(
            "train", *data, "--training.epochs", "1", "--model.lstm_units", "16", "--model.embedding_size", "16"
        )

    return once("earlier run", train)


@pytest.fixture
def folder(earlier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of it, to be damaged; commands run in it."""
    there = tmp_path / "folder"
    shutil.copytree(earlier, there, copy_function=os.link)  # replaced, never written through
    for own in ("mlflow.db", *(str(path.relative_to(earlier)) for path in earlier.glob("data/features/*"))):
        (there / own).unlink()
        shutil.copy(earlier / own, there / own)
    monkeypatch.chdir(there)
    monkeypatch.setenv("CAPEXP_OFFLINE", "1")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
    mlflow.set_tracking_uri(database_uri(there / "mlflow.db"))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    environment = dict(os.environ)
    yield there
    os.environ.clear()
    os.environ.update(environment)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def replace(path: str, content: bytes) -> None:
    Path(path).unlink(missing_ok=True)
    Path(path).write_bytes(content)


def edit(path: str, change: Callable[[bytes], bytes]) -> Callable[[], None]:
    return lambda: replace(path, change(Path(path).read_bytes()))


def gone(path: str) -> Callable[[], None]:
    return lambda: shutil.rmtree(path) if Path(path).is_dir() else Path(path).unlink()


def both(*damages: Callable[[], None]) -> Callable[[], None]:
    def damage() -> None:
        for one in damages:
            one()

    return damage


def add(path: str, line: str) -> Callable[[], None]:
    return edit(path, lambda content: content + line.encode("utf-8", "surrogateescape"))


def huge(content: bytes) -> bytes:
    """A PNG that says it is 30,000 pixels wide and high, in a hundred bytes."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    )


def features(
    name: str,
    change: Callable[[bytes], bytes] = lambda content: content,
    value: float = 1.0,
    last: int = 8,
    lists: tuple[str, ...] = ("train", "dev"),
) -> None:
    """Writes the tutorial's features.pkl for the photos of some lists."""
    stems = [line.split(".")[0] for split in lists for line in Path(LISTS[split]).read_text().split()]
    table = {stem: np.full((1, 8), value, np.float32) for stem in sorted(stems)}
    replace(name, change(pickle.dumps(table | {max(table): np.ones((1, last), np.float32)})))


class Code:
    """Pickled, it would make a file when it is loaded."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.mkdir, ("executed",)


def save_weights(path: str, prefix: str) -> None:
    """Write VGG16's convolutions, all zeros, under names of the prefix."""
    import torchvision

    with torch.device("meta"):
        layers = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["D"])
    torch.save({f"{prefix}{name}": torch.zeros(of.shape).half() for name, of in layers.state_dict().items()}, path)


def hdf5(name: str) -> bytes:
    """An HDF5 file with one small array."""
    content = io.BytesIO()
    with h5py.File(content, "w") as file:
        file[name] = np.zeros((3, 3, 4), "f4")
    return content.getvalue()


def bundle(name: str) -> str:
    (found,) = Path().glob(f"checkpoints/*/ep*/{name}")
    return str(found)


def edit_state(epochs: int) -> None:
    """Makes the state one of more epochs."""
    (last,) = Path().glob("checkpoints/*/last.pt")
    state = torch.load(last, weights_only=True)
    state["history"] = [state["history"][0] | {"number": number + 1} for number in range(epochs)]
    bundle_of_first = Path(bundle("manifest.json")).parent
    shutil.copytree(bundle_of_first, bundle_of_first.with_name(f"ep00{epochs}-train1.000-dev1.000"))
    last.unlink()
    torch.save(state, last)


def cache() -> str:
    (found,) = Path().glob("data/features/*.features")
    return str(found)


@dataclass(frozen=True)
class Row:
    """What is done to the folder, what is typed, and what the line must hold."""

    says: tuple[str, ...]
    damage: Callable[[], None] = lambda: None
    arguments: str = ""
    command: str = "train"
    weights: bool = False
    """Whether the fault shows only with VGG16's weights at hand."""


FILE = "--features.file "


def keras_model(change: Change = lambda layers, weights: None, **fields: object) -> Callable[[], None]:
    """A model as Keras saves the tutorial's, and its tokenizer."""

    def write() -> None:
        replace("model.h5", saved_model(change=change))
        replace("tokenizer.json", tokenizer_json(**fields).encode())  # type: ignore[arg-type]

    return write


KERAS = "--keras model.h5 --tokenizer tokenizer.json --output tutorial"


def first_line(content: bytes) -> bytes:
    return content.splitlines()[0] + b"\n"


ROWS = {
    "captions file missing": Row((f"{TOKENS}: no such captions file",), gone(TOKENS)),
    "list missing": Row((f"{LISTS['dev']}: no such list",), gone(LISTS["dev"])),
    "photo folder missing": Row((f"{PHOTOS}: no such folder",), gone(PHOTOS)),
    "root missing": Row(("elsewhere: no such folder", "captions.root"), arguments="--captions.root elsewhere"),
    "photos without captions": Row(
        (LISTS["train"], "599 of its train photos have no captions", "and 596 more"),
        edit(TOKENS, lambda content: b"".join(content.splitlines(True)[: 2 * 5])),
    ),
    "captions of a listed id missing": Row(
        (LISTS["dev"], "2 of its dev photos have no captions", "x.jpg, y.jpg"), add(LISTS["dev"], "x.jpg\ny.jpg\n")
    ),
    "photo missing": Row((LISTS["train"], "are not in", "scene_0000.jpg"), gone(PHOTO)),
    "photos missing": Row(("2 of its", "scene_0000.jpg, scene_0002.jpg"), both(gone(PHOTO), gone(OTHER))),
    "no key": Row((f"{TOKENS}, line 4001", "'a dog runs'"), add(TOKENS, "a dog runs\n")),
    "no tab": Row((f"{TOKENS}, line 4001", "<TAB>"), add(TOKENS, "scene_0001.jpg#9 a dog\n")),
    "empty caption": Row((f"{TOKENS}, line 4001",), add(TOKENS, "scene_0001.jpg#9\t \n")),
    "captions not UTF-8": Row((f"{TOKENS}, line 4001", "0xe9"), add(TOKENS, "scene_0001.jpg#9\tcaf\udce9\n")),
    "list not UTF-8": Row((f"{LISTS['train']}, line 601", "0xff"), add(LISTS["train"], "\udcff\n")),
    "photo in two splits": Row(
        ("share 1 photos", LISTS["train"], LISTS["dev"]),
        lambda: add(LISTS["dev"], first_line(Path(LISTS["train"]).read_bytes()).decode())(),
    ),
    "photo in train and test": Row(
        ("share 1 photos", LISTS["train"], LISTS["test"]),
        lambda: add(LISTS["test"], first_line(Path(LISTS["train"]).read_bytes()).decode())(),
    ),
    "photo twice in a list": Row(
        (f"{LISTS['dev']}, line 101", "on line 1 already"), edit(LISTS["dev"], lambda c: c + first_line(c))
    ),
    "empty split": Row((f"{LISTS['dev']}: the list is empty",), edit(LISTS["dev"], lambda content: b"\n")),
    "path out of the folder": Row(("line 601", "'../x.jpg' is empty or leaves"), add(LISTS["train"], "../x.jpg\n")),
    "absolute path": Row(("line 601", "'/etc/passwd' is empty or leaves"), add(LISTS["train"], "/etc/passwd\n")),
    "captions are no JSON": Row(
        ("broken.json: the file: invalid JSON",),
        lambda: replace("data/broken.json", b'{"images": ['),
        "--captions.captions broken.json",
    ),
    "a table without captions": Row(
        ("table.csv, line 1: none of image, size is a name for captions",),
        lambda: replace("data/table.csv", b"image,size\na.jpg,7\n"),
        "--captions.captions table.csv",
    ),
    "a row with a comma too many": Row(
        ("table.csv, line 3: 3 fields, where the header has 2; quote captions that hold a comma",),
        lambda: replace("data/table.csv", b"image,caption\na.jpg,A dog\na.jpg,A dog, and a cat\n"),
        "--captions.captions table.csv",
    ),
    "a quotation mark that is never closed": Row(
        ("table.csv, line 2: not a valid row of a table",),
        lambda: replace("data/table.csv", b'image,caption\na.jpg,"A dog\nb.jpg,A cat\n'),
        "--captions.captions table.csv",
    ),
    "a field of a megabyte": Row(
        ("table.tsv, line 2: not a valid row", "field limit"),
        lambda: replace("data/table.tsv", b"image\tcaption\na.jpg\t" + b"dog " * 250_000),
        "--captions.captions table.tsv",
    ),
    "a table of another form than is said": Row(
        ("read as a table (csv), but", "is no header; begin with a line such as image,caption"),
        arguments="--captions.format csv",
    ),
    "a form that does not exist": Row(("captions.format xml", "'auto', 'flickr8k'"), arguments="--captions.format xml"),
    "a table's photo out of the folder": Row(
        ("table.csv, line 2: '/etc/passwd' is empty or leaves the photo folder",),
        lambda: replace("data/table.csv", b"path;text\n/etc/passwd;A dog\n"),
        "--captions.captions table.csv",
    ),
    "a Windows path in a list": Row(
        ("line 601", "is a Windows path; write 'Scenes_Dataset/x.jpg'"), add(LISTS["train"], "Scenes_Dataset\\x.jpg\n")
    ),
    "records that are no JSON": Row(
        ("metadata.jsonl: line 2: read as JSON records (json), but it is invalid JSON",),
        lambda: replace("data/metadata.jsonl", b'{"file_name": "a.jpg", "text": "A"}\n{"file_name": "b.jpg", "te\n'),
        "--captions.captions metadata.jsonl",
    ),
    "records a thousand deep": Row(
        ("deep.json: the list: read as JSON records (json), but it is invalid JSON: recursion limit",),
        lambda: replace("data/deep.json", b"[" * 1000),
        "--captions.captions deep.json",
    ),
    "neither this nor that": Row(
        ("prose.txt, line 1: 'Once upon a time' begins no known format of captions",),
        lambda: replace("data/prose.txt", b"Once upon a time\n, 3 dogs ... ran.\n"),
        "--captions.captions prose.txt",
    ),
    "a photo that may be two": Row(
        ("'scene_0001' may be scene_0001.jpg or scene_0001.png; write the ending",),
        both(add(TOKENS, "scene_0001.png#0\ta dog\n"), add(LISTS["train"], "scene_0001\n")),
    ),
    "too few photos to draw from": Row(
        ("2 photos are too few to draw dev and test photos from", "captions.test_fraction = 0"),
        lambda: replace("data/few.csv", b"image,caption\na.jpg,A dog\nb.jpg,A cat\n"),
        "--captions.captions few.csv --captions.splits random",
    ),
    "fractions that leave nothing": Row(
        ("captions.dev_fraction = 0.6 and captions.test_fraction = 0.5 leave no train photos",),
        arguments="--captions.dev_fraction 0.6 --captions.test_fraction 0.5",
    ),
    "a split's captions file missing": Row(
        ("elsewhere.json: no such captions file",), arguments="--captions.splits files --captions.train elsewhere.json"
    ),
    "characters with the tutorial's cleaning": Row(
        ("vocabulary.tokens = 'characters': tutorial cleaning drops them",),
        arguments="--vocabulary.cleaning tutorial --vocabulary.tokens characters",
    ),
    "picture cut short": Row(
        (PHOTO, "cannot be read as a picture"), edit(PHOTO, lambda content: content[:2000]), weights=True
    ),
    "picture of other bytes": Row(
        (PHOTO, "not a picture in a format"), edit(PHOTO, lambda content: b"?" * 5000), weights=True
    ),
    "picture of no bytes": Row((PHOTO, "cannot be read"), edit(PHOTO, lambda content: b""), weights=True),
    "decompression bomb": Row((PHOTO, "pixels", "scale it down"), edit(PHOTO, huge), weights=True),
    "several bad pictures": Row(
        ("3 photos cannot be read as pictures", "scene_0000.jpg", "scene_0002.jpg", "scene_0003.jpg"),
        both(edit(PHOTO, lambda content: b""), edit(OTHER, huge), edit(f"{PHOTOS}/scene_0003.jpg", lambda c: c[:99])),
        weights=True,
    ),
    "weights missing": Row(("none.pth", "no such file"), arguments="--features.weights none.pth"),
    "weights cut short": Row(
        ("cut.pth: damaged",),
        lambda: replace("cut.pth", Path(os.environ["WEIGHTS"]).read_bytes()[:9_000_000]),
        "--features.weights cut.pth",
        weights=True,
    ),
    "weights that are none": Row(
        ("text.pth: damaged",), lambda: replace("text.pth", b"weights"), "--features.weights text.pth"
    ),
    "weights with code": Row(
        ("evil.pth: damaged, or holds more than tensors",),
        lambda: replace("evil.pth", pickle.dumps(Code())),
        "--features.weights evil.pth",
    ),
    "no file of features": Row(("features.file = 'none.pkl': no such file",), arguments="--features.file none.pkl"),
    "features cut short": Row(
        ("cut.pkl: ", "damaged or cut short"),
        lambda: features("cut.pkl", lambda content: content[:-20]),
        FILE + "cut.pkl",
    ),
    "features of another kind": Row(
        ("text.pkl: begins with b'features', no known format of features",),
        lambda: replace("text.pkl", b"features"),
        FILE + "text.pkl",
    ),
    "features with code": Row(
        ("evil.pkl: ", "posix.mkdir"), lambda: replace("evil.pkl", pickle.dumps({"a": Code()})), FILE + "evil.pkl"
    ),
    "features that are not finite": Row(
        ("features.pkl: 'scene_0000': holds values that are not finite",),
        lambda: features("features.pkl", value=float("nan")),
        FILE + "features.pkl",
    ),
    "features of another length": Row(
        ("features.pkl: 'scene_0799': an array (1, 9), where the first is (1, 8)",),
        lambda: features("features.pkl", last=9),
        FILE + "features.pkl",
    ),
    "features without a photo": Row(
        ("features.pkl: has no features of 100 of the 100 photos of dev: ", " and 97 more", "leave these photos out"),
        lambda: features("features.pkl", lists=("train",)),
        FILE + "features.pkl",
    ),
    "features of two photos of one stem": Row(
        ("'scene_0000.png'", "'scene_0000.jpg'", "would both have the features of 'scene_0000'"),
        both(
            lambda: features("features.pkl"),
            add(LISTS["train"], "scene_0000.png\n"),
            add(TOKENS, "scene_0000.png#0\tA dog\n"),
        ),
        FILE + "features.pkl",
    ),
    "features of mirrored photos": Row(
        ("features.mirror", "has no mirrored photos"), arguments=FILE + "x.pkl --features.mirror true"
    ),
    "crops of features": Row(("features.crops = 2", "has no crops"), arguments=FILE + "x.pkl --features.crops 2"),
    "too many crops": Row(("features.crops 100", "less than or equal to 99"), arguments="--features.crops 100"),
    "photos that would not be opened": Row(
        ("--decode", "features.file"), lambda: features("features.pkl"), FILE + "features.pkl --dry-run --decode"
    ),
    "a file of features for a captioner of photos": Row(
        ("the captioner takes features of VGG16", "or features.file"),
        lambda: features("features.pkl"),
        "--model {bundle} " + FILE + "features.pkl",
        command="evaluate",
    ),
    "weights of no encoder": Row(
        ("features.weights = 'unknown'", "set features.file"), arguments="--features.weights unknown"
    ),
    "weights of an unknown net": Row(
        ("own.pth: VGG16's weights of an unknown net", "set features.net = 'caffe'", "or 'torchvision'"),
        lambda: save_weights("own.pth", "my."),
        "--features.weights own.pth",
    ),
    "convolutions alone for fc2": Row(
        ("convolutions.pth: holds no fully connected layers", "features.layer = 'fc2'", "KERAS", "conv5_3"),
        lambda: save_weights("convolutions.pth", "features."),
        "--features.layer fc2 --features.pool none --features.weights convolutions.pth",
    ),
    "named weights of another net": Row(
        ("features.net = 'torchvision': KERAS is the caffe net",),
        arguments="--features.weights KERAS --features.net torchvision",
    ),
    "Keras's weights not to be had": Row(
        ("features.weights = 'KERAS'", "CAPEXP_OFFLINE"), arguments="--features.weights KERAS"
    ),
    "Keras's weights cut short": Row(
        ("cut.h5: a damaged HDF5 file",),
        lambda: replace("cut.h5", hdf5("block1_conv1/block1_conv1/kernel")[:3000]),
        "--features.weights cut.h5",
    ),
    "Keras's weights of another net": Row(
        ("other.h5: not VGG16's weights", "without Keras's group block1_conv1"),
        lambda: replace("other.h5", hdf5("conv1/conv1/kernel:0")),
        "--features.weights other.h5",
    ),
    "Keras's weights of another size": Row(
        ("small.h5: not VGG16's weights (block1_conv1's kernel is missing or has another shape)",),
        lambda: replace("small.h5", hdf5("block1_conv1/block1_conv1_W_1:0")),
        "--features.weights small.h5",
    ),
    "no such net": Row(("features.net keras", "'caffe'"), arguments="--features.net keras"),
    "no such resizing": Row(("features.resize bicubic", "'nearest'"), arguments="--features.resize bicubic"),
    "weights not to be had": Row(
        ("IMAGENET1K_FEATURES", "CAPEXP_OFFLINE"), edit(PHOTO, lambda content: Path(OTHER).read_bytes() + b"\0")
    ),
    "cache cut in its header": Row((".features: not a feature cache", "delete it"), lambda: os.truncate(cache(), 1000)),
    "cache of another encoder": Row(
        ("features of another encoder", "delete it"),
        lambda: edit(cache(), lambda content: content.replace(b"bilinear", b"bicubic!"))(),
    ),
    "cache that is none": Row(("not a feature cache",), lambda: replace(cache(), b"x" * 9000)),
    "unknown setting": Row(
        ("unknown setting 'training.epoch'", "did you mean training.epochs?"), arguments="--training.epoch 3"
    ),
    "unknown section": Row(("unknown setting 'trainig.epochs'",), arguments="--trainig.epochs 3"),
    "wrong type": Row(("training.epochs three",), arguments="--training.epochs three"),
    "0 epochs": Row(("training.epochs",), arguments="--training.epochs 0"),
    "dropout of 1.5": Row(("model.dropout",), arguments="--model.dropout 1.5"),
    "negative size": Row(("model.lstm_units",), arguments="--model.lstm_units -4"),
    "learning rate is no number": Row(("training.learning_rate",), arguments="--training.learning_rate nan"),
    "flag without value": Row(("--training.epochs needs a value",), arguments="--training.epochs"),
    "unknown experiment": Row(("--experiment nothing",), arguments="--experiment nothing"),
    "experiment is no TOML": Row(
        ("mine.toml: not TOML",), lambda: replace("mine.toml", b"name = "), "--experiment mine.toml"
    ),
    "device that is not there": Row(("training.device = 'cuda:99'",), arguments="--training.device cuda:99"),
    "empty vocabulary": Row(("vocabulary.minimum_count",), arguments="--vocabulary.minimum_count 1000000"),
    "fewer neighbours than none": Row(("decoding.neighbours",), arguments="--decoding.neighbours -1"),
    "neighbours of no weight": Row(("decoding.neighbour_weight",), arguments="--decoding.neighbour_weight 0"),
    "neighbours of a bundle without": Row(
        ("decoding.neighbours = 5: the captioner's bundle holds no captions", "set it to 0"),
        arguments="--model {bundle} --decoding.neighbours 5 " + PHOTO,
        command="caption",
    ),
    "beam of no width": Row(("decoding.beam_width",), arguments="--decoding.beam_width 0"),
    "beam wider than the vocabulary": Row(
        ("decoding.beam_width = 9000: only", "lower it"),
        arguments="--model {bundle} --decoding.method beam --decoding.beam_width 9000",
        command="evaluate",
    ),
    "beam wider than the vocabulary, in training": Row(
        ("decoding.beam_width = 9000: only", "lower it"),
        arguments="--decoding.method beam --decoding.beam_width 9000",
    ),
    "unknown way of decoding": Row(
        ("decoding.method nucleus",), arguments="--model {bundle} --decoding.method nucleus", command="evaluate"
    ),
    "cache that is a file": Row(("a file; name a folder",), arguments=f"--features.cache {TOKENS}"),
    "resume of no run": Row(("--resume needs the id of a run",), arguments="--resume="),
    "resume without its captioner": Row(
        ("no state to resume from", "its captioner (ep001...) is missing"),
        lambda: gone(str(Path(bundle("manifest.json")).parent))(),
        "--training.epochs 2 --resume {run}",
    ),
    "unknown run to resume": Row(("run 0123: no such run", "mlflow ui"), arguments="--resume 0123"),
    "resume where nothing was tracked": Row(
        ("nothing was tracked here",), both(gone("mlflow.db"), gone("mlruns"), gone("checkpoints")), "--resume 0123"
    ),
    "search of what is no setting": Row(
        ("unknown setting 'model.width'",),
        arguments='--trials 1 --tune.search {"model.width":{"low":1,"high":2}}',
        command="tune",
    ),
    "study of no trials": Row(
        ("--tune.trials 0: ", "greater than or equal to 1"), arguments="--trials 0", command="tune"
    ),
    "study of no dimension": Row(("at least 1 item",), arguments="--tune.search {}", command="tune"),
    "search of the seed": Row(
        ("tune.search: seed: ", "do not compare"), arguments='--tune.search {"seed":{"low":1,"high":2}}', command="tune"
    ),
    "search in endless steps": Row(
        ("step = 1e-300 from 0.1 to 0.5; give one of 1 to 1,000,000 steps",),
        arguments='--tune.search {"model.dropout":{"low":0.1,"high":0.5,"step":1e-300}}',
        command="tune",
    ),
    "no such pruner": Row(("--tune.pruner racing: ", "'median'"), arguments="--tune.pruner racing", command="tune"),
    "no workers": Row(("--workers 0: at least 1",), arguments="--workers 0", command="tune"),
    "no time": Row(("--timeout 0: ",), arguments="--timeout 0", command="tune"),
    "study in no folder": Row(("--study 'a/b'",), arguments="--study a/b", command="tune"),
    "best into no folder": Row(
        ("--write-best no/best.toml: no folder no",), arguments="--write-best no/best.toml", command="tune"
    ),
    "storage that is away": Row(
        ("--storage postgresql://127.0.0.1:9/studies: ", "Connection refused"),
        arguments="--storage postgresql://me:geheim@127.0.0.1:9/studies",
        command="tune",
    ),
    "storage that is no address": Row(
        ("--storage: not a URL; give postgresql://USER@HOST:PORT/DATABASE",),
        arguments="--storage postgresql://me:geheim@127.0.0.1:port/studies",
        command="tune",
    ),
    "storage for one machine": Row(
        ("--storage sqlite:///studies.db: not a PostgreSQL database",),
        arguments="--storage sqlite:///studies.db",
        command="tune",
    ),
    "bundle with a file missing": Row(
        ("decoder.safetensors: missing from the bundle",),
        lambda: gone(bundle("decoder.safetensors"))(),
        "--model {bundle}",
        "evaluate",
    ),
    "bundle with a file altered": Row(
        ("vocabulary.json: altered since it was saved",),
        lambda: edit(bundle("vocabulary.json"), lambda content: content.replace(b"tree", b"bush"))(),
        "--model {bundle} " + PHOTO,
        "caption",
    ),
    "bundle without its manifest": Row(
        ("not a captioner's bundle",), lambda: gone(bundle("manifest.json"))(), "--model {bundle} " + PHOTO, "caption"
    ),
    "no such model": Row(("--model nowhere",), arguments="--model nowhere", command="evaluate"),
    "no such registered model": Row(
        ("--model models:/none@champion", "not found"), arguments="--model models:/none@champion", command="evaluate"
    ),
    "no such version": Row(
        ("models:/capexp-scenes/77", "not found"), arguments="--model models:/capexp-scenes/77", command="evaluate"
    ),
    "no such photos": Row(
        ("nowhere.jpg, *.gif, checkpoints (a folder without pictures): no such photo",),
        both(gone("checkpoints"), lambda: Path("checkpoints").mkdir()),
        "--model models:/capexp-scenes@champion nowhere.jpg *.gif checkpoints",
        "caption",
    ),
    "bundle without VGG16": Row(
        ("IMAGENET1K_FEATURES", "CAPEXP_OFFLINE"), arguments="--model {bundle} " + PHOTO, command="caption"
    ),
    "split that has no list": Row(
        (f"{LISTS['test']}: no such list",), gone(LISTS["test"]), "--model {bundle} --split test", "evaluate"
    ),
    "output is a folder": Row(
        ("--output data: a folder",), arguments="--model {bundle} --output data", command="evaluate"
    ),
    "comparison with nothing": Row(("--model nowhere",), arguments="{bundle} nowhere", command="compare"),
    "experiment without a name": Row(("--experiment : neither a file nor",), arguments="--experiment="),
    "name of 600 letters": Row(("--name xxx", "should match pattern"), arguments=f"--name {'x' * 600}"),
    "number of 5,000 digits": Row(
        ("mine.toml: not TOML",), lambda: replace("mine.toml", b"seed = " + b"9" * 5000), "--experiment mine.toml"
    ),
    "lists in lists": Row(
        ("mine.toml: not TOML", "recursion"),
        lambda: replace("mine.toml", b"seed = " + b"[" * 5000 + b"]" * 5000),
        "--experiment mine.toml",
    ),
    "tables in tables": Row(
        ("mine.toml: not TOML", "too deep"),
        lambda: replace("mine.toml", b"[zz]\n" + b"a." * 3000 + b"a = 1"),
        "--experiment mine.toml",
    ),
    "number of 6,000 hexadecimal digits": Row(
        ("mine.toml: not TOML", "seed is a number of more than 64 bits"),
        lambda: replace("mine.toml", b"seed = 0x" + b"f" * 6000),
        "--experiment mine.toml",
    ),
    "date": Row(
        ("mine.toml: not TOML", "seed = 1979-05-27 is a date"),
        lambda: replace("mine.toml", b"seed = 1979-05-27"),
        "--experiment mine.toml",
    ),
    "home of nobody": Row(
        ("features.weights = '~nosuchuser/x'", "no such user"),
        lambda: replace("mine.toml", b'[features]\nweights = "~nosuchuser/x"'),
        "--experiment mine.toml",
    ),
    "setting without a section": Row(("unknown setting 'foo'", "training.*"), arguments="--foo 3"),
    "device of too high a number": Row(
        ("training.device = 'cuda:99999999999999999999'",), arguments="--training.device cuda:99999999999999999999"
    ),
    "fewer epochs than are done": Row(
        ("--training.epochs 1: run", "has done 3 already"),
        lambda: edit_state(3),
        "--training.epochs 1 --resume {run}",
    ),
    "output is a link to itself": Row(
        ("--output loop.json: a link that leads to itself",),
        lambda: Path("loop.json").symlink_to("loop.json"),
        "--model {bundle} --output loop.json",
        "evaluate",
    ),
    "weights without a name": Row(
        ("features.weights = '': no such file",),
        arguments="--model {bundle} --features.weights= " + PHOTO,
        command="caption",
    ),
    "image without a name": Row(
        ("bare.json, images.0: has no file_name",),
        lambda: replace("data/bare.json", b'{"images": [{"id": 7}], "annotations": []}'),
        "--captions.captions bare.json",
    ),
    "photo in two splits, spelled in two ways": Row(
        ("share 1 photos: scene_0000.jpg", LISTS["train"], LISTS["dev"]), add(LISTS["dev"], ".//scene_0000.jpg\n")
    ),
    "path with a zero byte": Row(
        ("mine.toml: captions.photos = 'a\\x00b'", "control characters"),
        lambda: replace(
            "mine.toml", (ROOT / "experiments/scenes.toml").read_bytes().replace(b"Scenes_Dataset", b"a\\u0000b")
        ),
        "--experiment mine.toml",
    ),
    "path that is not UTF-8": Row(("captions.root = ", "control characters"), arguments="--captions.root caf\udce9"),
    "captions file that is a pipe": Row(
        (f"{TOKENS}: the captions file is no file",), both(gone(TOKENS), lambda: os.mkfifo(TOKENS))
    ),
    "list that is a pipe": Row(
        (f"{LISTS['dev']}: the list of photos is no file",), both(gone(LISTS["dev"]), lambda: os.mkfifo(LISTS["dev"]))
    ),
    "photo that is a pipe": Row(
        ("pipe.jpg (no file): no such photo",), lambda: os.mkfifo("pipe.jpg"), "--model {bundle} pipe.jpg", "caption"
    ),
    "listed photo that is a pipe": Row(
        (LISTS["train"], "are not in", "scene_0000.jpg"), both(gone(PHOTO), lambda: os.mkfifo(PHOTO))
    ),
    "two images with one id": Row(
        ("two.json, images.1: id 7 is already used by a.jpg",),
        lambda: replace(
            "data/two.json",
            b'{"images": [{"id": 7, "file_name": "a.jpg"}, {"id": 7, "file_name": "b.jpg"}], "annotations": []}',
        ),
        "--captions.captions two.json",
    ),
    "one seed": Row(("--seeds 1: fewer than two seeds",), arguments="--seeds 1"),
    "seeds of a run at one": Row(("leave --seeds out",), arguments="--seeds 2 --resume {run}"),
    "database that is a folder": Row(
        ("mlflow.db: MLflow's database is to be a file",), both(gone("mlflow.db"), lambda: Path("mlflow.db").mkdir())
    ),
    "artifacts that are a file": Row(
        ("mlruns: MLflow's artifacts go into a folder",), both(gone("mlruns"), lambda: Path("mlruns").touch())
    ),
    "database that is none": Row(
        ("mlflow.db", "file is not a database"),
        lambda: replace("mlflow.db", b"junk" * 5000),
        "--model models:/capexp-scenes@champion " + PHOTO,
        "caption",
    ),
    "database that is none, in training": Row(
        ("mlflow.db", "file is not a database"), lambda: replace("mlflow.db", b"junk" * 5000)
    ),
    "states that are junk": Row(
        ("no state to resume from", "last.pt: not a whole training state", "start a new run"),
        lambda: replace(str(next(Path().glob("checkpoints/*/last.pt"))), b"junk"),
        "--training.epochs 2 --resume {run}",
    ),
    "no Keras model": Row(("model.h5: no such model",), arguments=KERAS, command="bundle"),
    "a Keras model cut short": Row(
        ("model.h5: a damaged HDF5 file",),
        both(keras_model(), edit("model.h5", lambda content: content[:5000])),
        KERAS,
        "bundle",
    ),
    "a Keras model of another architecture": Row(
        ("model.h5: another architecture: layer 'lstm' is GRU", "needed is the tutorial's network"),
        keras_model(lambda layers, weights: layers["lstm"].update(kind="GRU")),
        KERAS,
        "bundle",
    ),
    "a Keras model of other features": Row(
        ("model.h5: reads 2,048 values for a photo, the features have 1 x 4,096", "--features.file"),
        both(keras_model(), lambda: replace("model.h5", saved_model(features=2048))),
        KERAS,
        "bundle",
    ),
    "a tokenizer of another model": Row(
        ("model.h5: the model knows 6 words, the tokenizer 2", "trained with"),
        keras_model(words=("startseq", "endseq")),
        KERAS,
        "bundle",
    ),
    "a tokenizer with code": Row(
        ("tokenizer.json: holds 'posix.mkdir', which is not loaded",),
        both(keras_model(), lambda: replace("tokenizer.json", pickle.dumps(Code()))),
        KERAS,
        "bundle",
    ),
    "no tokenizer": Row(
        ("tokenizer.json: no such tokenizer",), both(keras_model(), gone("tokenizer.json")), KERAS, "bundle"
    ),
    "a bundle over another file": Row(
        ("--output data: exists already; name a new folder",),
        keras_model(),
        KERAS.replace("tutorial", "data"),
        "bundle",
    ),
    "a bundle in no folder": Row(
        ("--output no/tutorial: no folder no; make it first",),
        keras_model(),
        KERAS.replace("tutorial", "no/tutorial"),
        "bundle",
    ),
    "a bundle without VGG16": Row(("features.weights = 'KERAS'", "CAPEXP_OFFLINE"), keras_model(), KERAS, "bundle"),
    "output into no folder": Row(
        ("--output no/scores.json", "make it first"),
        arguments="--model {bundle} --output no/scores.json",
        command="evaluate",
    ),
}
DATA = "--captions.root data --features.cache data/features"


def snapshot(folder: Path) -> dict[str, tuple[int, int, int]]:
    """All files but MLflow's database and locks, with what changes when a file is written or replaced."""
    files = [Path(parent, name) for parent, _, names in os.walk(folder) for name in names]
    return {
        str(path): (status.st_ino, status.st_size, content)
        for path in files
        if not path.name.startswith("mlflow.db") and path.suffix != ".lock"
        for status in [path.lstat()]
        # The cache is opened to append what then cannot be computed.
        for content in [zlib.crc32(path.read_bytes()) if path.suffix == ".features" else status.st_mtime_ns]
    }


def runs() -> list[tuple[str, str]]:
    if not Path("mlflow.db").is_file() or not Path("mlflow.db").read_bytes().startswith(b"SQLite"):
        return []
    with closing(sqlite3.connect("mlflow.db")) as database:  # MLflow would take longer than most of the commands
        return database.execute("select run_uuid, status || lifecycle_stage from runs order by 1").fetchall()


@pytest.mark.parametrize("name", ROWS)
def test_each_fault_is_one_line_and_changes_nothing(
    folder: Path, name: str, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    row = ROWS[name]
    arguments = row.arguments
    if "{bundle}" in arguments:
        arguments = arguments.format(bundle=Path(bundle("manifest.json")).parent)
    arguments = arguments.replace("{run}", next(Path("checkpoints").iterdir()).name if "{run}" in arguments else "")
    if row.command not in ("caption", "bundle") and "--captions.root" not in arguments and "--resume" not in arguments:
        arguments = f"{DATA} {arguments}"
    if row.weights:
        weights = str(request.getfixturevalue("vgg16"))
        os.environ["WEIGHTS"] = weights
        arguments = arguments if "--features.weights" in arguments else f"{arguments} --features.weights {weights}"
    row.damage()
    before, tracked = snapshot(folder), runs()
    with pytest.raises(SystemExit) as ended:
        cli.main(row.command, lambda: COMMANDS[row.command](arguments.split()))
    err = capsys.readouterr().err
    assert ended.value.code == 2, err
    *above, line = err.splitlines()
    assert line.startswith(f"capexp.{row.command}: ")
    assert all("features" in other for other in above if other.strip()), (
        "nothing but the progress of features stands above it"
    )
    for part in row.says:
        assert part in line
    assert "geheim" not in err
    assert snapshot(folder) == before
    assert runs() == tracked
    assert not Path("executed").exists(), "code in a pickle was run"
    print(line.replace(str(folder), "."))


def on_a_disk_of(size: str, where: Path, options: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs Python where ``where`` is a file system of its own, of so many bytes."""
    own = ("unshare", "--user", "--map-root-user", "--mount")
    if subprocess.run([*own, "mount", "-t", "tmpfs", "tmpfs", str(where)], capture_output=True).returncode:
        pytest.skip("this system lets nobody mount a small disk of their own (unshare)")
    mounted = f'mount -t tmpfs -o size={size} tmpfs "$0"; {options} cd "$1"; shift; exec "$@"'
    folder = str(where if where.name == "all" else where.parent)
    return subprocess.run(
        [*own, "sh", "-c", mounted, str(where), folder, sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": ""}, capture_output=True, text=True,
    )  # fmt: skip


TRAIN = ("-m", "capexp.train", "--training.epochs", "1", "--model.lstm_units", "64", "--model.embedding_size", "64")
READ_ONLY = 'mount -o remount,ro "$0";'
DISKS = {
    "no room in the folder": ("200k", "all", "", ("MiB are free, a run needs about", "free space")),
    "no room for checkpoints": ("1m", "checkpoints", "", ("checkpoints: 1 MiB are free", "free space")),
    "no room for artifacts": ("64k", "mlruns", "", ("mlruns", "No space left on device", "--resume")),
    "folder cannot be written": ("1m", "all", READ_ONLY, ("checkpoints: cannot be written (Read-only file system)",)),
    "checkpoints cannot be written": ("1m", "checkpoints", READ_ONLY, ("checkpoints: cannot be written (Read-only",)),
    "artifacts cannot be written": ("1m", "mlruns", READ_ONLY, ("mlruns: MLflow's artifacts cannot be written",)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", cases(*(name for name in DISKS if name != "folder cannot be written"), of=DISKS))
def test_a_disk_that_does_not_take_it_is_told_in_one_line(tmp_path: Path, name: str) -> None:
    size, where, options, says = DISKS[name]
    (tmp_path / where).mkdir()
    printed = on_a_disk_of(size, tmp_path / where, options, *TRAIN)
    assert printed.returncode == 2, printed.stderr
    *before, line = printed.stderr.splitlines()
    if name == "no room for artifacts":  # a picture may find no room before the captioner does
        before = [other for other in before if "the entries that are not sent yet are kept in" not in other]
    assert not before
    for part in says:
        assert part in line
    assert not list(tmp_path.glob("checkpoints/*/ep*")) or name == "no room for artifacts"
    print(line.replace(str(tmp_path), "."))


@pytest.mark.slow
def test_features_that_find_no_room_are_told_in_one_line(tmp_path: Path, vgg16: Path) -> None:
    (tmp_path / "cache").mkdir()
    printed = on_a_disk_of(
        "64k", tmp_path / "cache", "",
        "-m", "capexp.extract", "--split", "dev", "--features.cache", "cache", "--features.weights", str(vgg16),
        "--features.size", "96",
    )  # fmt: skip
    assert printed.returncode == 2, printed.stderr
    line = printed.stderr.splitlines()[-1]
    assert "No space left on device; free space or set features.cache" in line
    print(line)


FILLING = """
import runpy, sys, threading, time
from pathlib import Path

leaves, module = sys.argv[1:3]
del sys.argv[1:3]

def fill():
    while not list(Path().glob(f"{leaves}/ep*")):
        time.sleep(0.01)
    with open("fill", "wb", 0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass

threading.Thread(target=fill, daemon=True).start()
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", cases("seeds", of=("single", "seeds", "study")))
def test_a_disk_that_fills_up_during_a_run_is_told_in_one_line_and_the_run_goes_on_later(
    tmp_path: Path, name: str
) -> None:
    (tmp_path / "all").mkdir()
    kind = KINDS[name]
    command, *words = kind.begin(training__epochs=3)
    again = shlex.join([sys.executable, "-m", f"capexp.{command}", *words])
    if name in ("single", "seeds"):  # an ensemble begun again finds its members
        again = f"{shlex.quote(sys.executable)} -m capexp.train --resume $(ls checkpoints)"
    first = shlex.join([sys.executable, "-c", FILLING, kind.leaves, f"capexp.{command}", *words])
    both = f"{first}; echo status $? >&2; rm fill; exec {again}"
    program = f"import subprocess, sys; sys.exit(subprocess.run({both!r}, shell=True).returncode)"
    printed = on_a_disk_of("60m", tmp_path / "all", "", "-c", program)
    assert printed.returncode == 0, printed.stderr
    said, _, _ = printed.stderr.partition("status 2\n")
    (line,) = [line for line in said.splitlines() if line.startswith("capexp.")]
    assert line == said.splitlines()[-1]
    assert "full" in line or "No space left" in line
    assert "Traceback" not in said
    assert "registered  capexp-scenes version 1 @champion" in printed.stdout


FILLED = """
import os, shutil, sys
from pathlib import Path
import torch
from capexp.errors import InputError
from capexp.training.checkpoints import Checkpoints, TrainingState

checkpoints = Checkpoints(Path("."), 1)
history = [{"number": 1, "improved": True}]
shutil.copytree(sys.argv[1], "ep001-train1.000-dev1.000")
checkpoints.save_state(TrainingState({"weight": torch.ones(50_000)}, {}, history))
try:
    checkpoints.save_state(TrainingState({"weight": torch.zeros(500_000)}, {}, history))
except InputError as error:
    print(error)
assert checkpoints.latest().decoder["weight"].sum() == 50_000
assert sorted(os.listdir()) == ["ep001-train1.000-dev1.000", "last.pt"], os.listdir()
"""


@pytest.mark.slow
def test_the_last_good_state_stays_when_the_next_finds_no_room(tmp_path: Path) -> None:
    (tmp_path / "all").mkdir()
    printed = on_a_disk_of("1m", tmp_path / "all", "", "-c", FILLED, str(ROOT / "tests/captioning/golden-1/bundle"))
    assert printed.returncode == 0, printed.stderr
    assert "last.pt: cannot be written (No space left on device)" in printed.stdout
