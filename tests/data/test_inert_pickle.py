"""Pickles are read as data: equal to what Python's own pickle gives, and nothing in them runs."""

import json
import os
import pickle
import pickletools
import resource
import struct
import subprocess
import sys
import time
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from capexp.data.inert_pickle import read_arrays, read_tokenizer
from capexp.errors import InputError

PROTOCOLS = range(6)
FEATURES: dict[str, NDArray[Any]] = {
    "1000268201_693b08cb0e": np.random.default_rng(1).random((1, 4096), np.float32),
    "a photo": np.arange(6, dtype=np.float64).reshape(2, 3),
    "big-endian": np.arange(600, dtype=">f4"),
    "Fortran": np.asfortranarray(np.arange(600, dtype=np.float16).reshape(20, 30)),
    "every other": np.arange(600)[::2],
    "bytes": np.frombuffer(bytes(range(256)) * 4, np.uint8),
    "none": np.empty((0, 4), np.float32),
    "scalar": np.array(3.5),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "file.pkl"


@contextmanager
def little_memory() -> Iterator[None]:
    """256 MiB more than what is taken already."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def refusal(path: Path, content: bytes, read: Callable[[Path], object] = read_arrays) -> str:
    path.write_bytes(content)
    with pytest.raises(InputError) as fault, little_memory():
        read(path)
    assert "\n" not in str(fault.value)
    assert str(fault.value).startswith(f"{path}: ")
    return str(fault.value).removeprefix(f"{path}: ")


def assert_equal(found: dict[str, NDArray[Any]], wanted: dict[str, NDArray[Any]]) -> None:
    assert list(found) == list(wanted)
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype, name
        assert np.array_equal(found[name], value), name
        assert found[name].flags.f_contiguous == value.flags.f_contiguous or name == "every other"


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("dumps", [pickle.dumps, pickle._dumps])  # type: ignore[attr-defined]
def test_arrays_of_every_protocol(path: Path, protocol: int, dumps: Callable[..., bytes]) -> None:
    path.write_bytes(dumps(FEATURES, protocol))
    assert_equal(read_arrays(path), FEATURES)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_without_pickles_own_optimisations(path: Path, protocol: int) -> None:
    path.write_bytes(pickletools.optimize(pickle.dumps(FEATURES, protocol)))
    assert_equal(read_arrays(path), FEATURES)


@pytest.mark.parametrize("protocol", [0, 1, 2, 3])
def test_spellings_of_numpy_1(path: Path, protocol: int) -> None:
    content = pickle.dumps(FEATURES, protocol)
    assert b"numpy._core" in content
    path.write_bytes(content.replace(b"numpy._core", b"numpy.core"))
    assert_equal(read_arrays(path), FEATURES)


def test_the_spelling_of_numpy_1_in_protocol_5(path: Path) -> None:
    content = pickle.dumps(FEATURES["a photo"], 5)
    name, older = (b"\x8c" + bytes([len(text)]) + text for text in (b"numpy._core.numeric", b"numpy.core.numeric"))
    assert name in content
    path.write_bytes(pickle.dumps({})[:0] + b"\x80\x05}\x8c\x01a" + content[11:-1].replace(name, older) + b"s.")
    assert_equal(read_arrays(path), {"a": FEATURES["a photo"]})


def test_what_python_2_writes(path: Path) -> None:
    raw = np.arange(3, dtype=">f4").tobytes()
    dtype = b"cnumpy\ndtype\n(S'f4'\nI0\nI1\ntR(I3\nS'>'\nNNNI-1\nI-1\nI0\ntb"
    state = b"(I1\n(I3\nt" + dtype + b"I00\n" + f"S{raw!r}".replace("Sb'", "S'").encode() + b"\ntb"
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR" + state
    path.write_bytes(b"(dp0\nS'a photo'\n" + array + b"sL7L\n" + array + b"s.")
    assert "a key of the dict is a int" in refusal(path, path.read_bytes())
    path.write_bytes(b"(dp0\nS'a photo'\n" + array + b"s.")
    assert_equal(read_arrays(path), {"a photo": np.arange(3, dtype=">f4")})
    binary = b"\x80\x02}U\x07a photo" + array.replace(b"S'b'\n", b"U\x01b") + b"s."
    path.write_bytes(binary)
    assert_equal(read_arrays(path), {"a photo": np.arange(3, dtype=">f4")})


def test_arrays_are_views_of_the_file(path: Path) -> None:
    path.write_bytes(pickle.dumps(FEATURES, 4))
    arrays = read_arrays(path)
    assert not any(array.flags.owndata or array.flags.writeable for array in arrays.values())


class Foreign:
    """Pickled, it would make a folder when it is loaded."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("read", [read_arrays, read_tokenizer])
def test_code_is_named_and_not_run(
    path: Path, protocol: int, read: Callable[[Path], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(path.parent)
    said = refusal(path, pickle.dumps({"a": FEATURES["a photo"], "b": Foreign()}, protocol), read)
    assert said.startswith(f"holds '{os.mkdir.__module__}.mkdir', which is not loaded, and nothing of it has run")
    assert "holds 'os.system'" in refusal(path, b"cos\nsystem\n(S'mkdir executed'\ntR.", read)
    assert not Path("executed").exists()


@pytest.mark.parametrize("name", ["builtins eval", "numpy load", "numpy.core.multiarray fromstring", "pickle loads"])
def test_only_what_is_needed_is_known(path: Path, name: str) -> None:
    module, function = name.split()
    assert f"'{module}.{function}'" in refusal(path, f"c{module}\n{function}\n.".encode())


def array_of(shape: tuple[int, ...], content: bytes, dtype: str = "f4") -> bytes:
    """A pickle of protocol 2 with a state that fits or does not."""
    sides = b"".join(b"\x8a\x08" + struct.pack("<q", side) for side in shape)
    head = b"\x80\x02}U\x01acnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85U\x01b\x87R(K\x01(" + sides
    kind = b"tcnumpy\ndtype\nU" + bytes([len(dtype)]) + dtype.encode() + b"\x89\x88\x87R\x89"
    return head + kind + b"T" + struct.pack("<I", len(content)) + content + b"tbs."


def test_a_shape_must_fit_the_bytes(path: Path) -> None:
    path.write_bytes(array_of((2, 2), b"\0" * 16))
    assert read_arrays(path)["a"].shape == (2, 2)
    assert "takes 137,438,953,472 bytes, and has 16" in refusal(path, array_of((2**20, 2**15), b"\0" * 16))
    for shape in [(2**40,), (-1, -4), (2**62, 2**62), (0, 2**62), (1,) * 40]:
        refusal(path, array_of(shape, b"\0" * 16))


@pytest.mark.parametrize("dtype", ["O8", "O", "S4", "U1", "V4", "c8", "b1", "M8[s]", "f16", "float32"])
def test_only_numbers(path: Path, dtype: str) -> None:
    assert f"dtype '{dtype}', not of numbers" in refusal(path, array_of((2, 2), b"\0" * 16, dtype))


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    "array",
    [np.array([{}, Foreign()]), np.zeros(2, "f4,i2"), np.array(["a"]), np.array([1j]), np.array([True])],
    ids=["objects", "records", "texts", "complex", "truth"],
)
def test_arrays_of_other_kinds_are_refused(path: Path, protocol: int, array: NDArray[Any]) -> None:
    content = pickle.dumps({"a": array}, protocol)
    assert "dtype" in (said := refusal(path, content)) or "executed" in said or "mkdir" in said
    assert not Path("executed").exists()


BOMBS = {
    "long bytes": b"\x80\x04\x8e" + struct.pack("<Q", 2**40),
    "long text": b"\x80\x04\x8d" + struct.pack("<Q", 2**62),
    "long bytearray": b"\x80\x05\x96" + struct.pack("<Q", 2**35),
    "long number": b"\x8b" + struct.pack("<I", 2**31 - 1),
    "negative length": b"T" + struct.pack("<i", -5) + b"abc.",
    "memo far away": b"Nr" + struct.pack("<I", 2**32 - 1) + b"\x94.",
    "memo further away": b"Np99999999999999999\n.",
    "number of many digits": b"I" + b"9" * 100_000 + b"\n.",
    "no end": b"N" * 1000,
    "lists in lists": b"]" * 100_000 + b"a" * 99_999 + b".",
    "tuples in tuples as a key": b"})" + b"\x85" * 500_000 + b"Ns.",
    "tuples in tuples as an order": (
        b"cnumpy.core.numeric\n_frombuffer\n(U\x01acnumpy\ndtype\nU\x02u1\x85R(K\x01t)" + b"\x85" * 500_000 + b"tR."
    ),
    "marks": b"(" * 100_000,
    "one text made bytes often": (
        b"X"
        + struct.pack("<I", 10**6)
        + b"x" * 10**6
        + b"q\0"
        + b"(c_codecs\nencode\nh\0U\x06latin1\x86R" * 2000
        + b"."
    ),
    "one list made a table often": (
        b"](" + b"(U\x01aNt" * 100_000 + b"eq\0" + b"ccollections\nOrderedDict\nh\0\x85R" * 100_000 + b"."
    ),
    "persistent id": b"Pid\n.",
    "binary persistent id": b"NQ.",
    "extension": b"\x82\x01.",
    "old class": b"(ios\nsystem\n.",
    "old class on the stack": b"(cos\nsystem\no.",
    "buffer out of band": b"\x80\x05\x97.",
    "a set": b"\x8f.",
}


SLOW_BOMBS = ("tuples in tuples as a key", "tuples in tuples as an order", "one list made a table often")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW_BOMBS else ()) for name in BOMBS]
)
def test_claims_of_memory_and_time_are_refused(path: Path, name: str) -> None:
    start = time.thread_time()
    refusal(path, BOMBS[name])
    assert time.thread_time() - start < 20  # of this thread alone: a second or two where it is not slow


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_cut_short_anywhere(path: Path, protocol: int) -> None:
    content = pickle.dumps({"a": np.arange(70.0), "b": np.arange(3)}, protocol)
    for end in range(0, len(content) - 1, 7):
        refusal(path, content[:end])
        refusal(path, content[:end], read_tokenizer)


def test_what_is_no_dict_of_arrays_is_told(path: Path) -> None:
    assert "holds a list" in refusal(path, pickle.dumps([1]))
    assert "'a' has a list, not a NumPy array" in refusal(path, pickle.dumps({"a": [1.0]}))
    assert "a key of the dict is a int" in refusal(path, pickle.dumps({1: np.ones(2)}))
    assert "not a pickle" in refusal(path, b"photo,caption\n")
    assert "not a pickle" in refusal(path, b"\x89HDF\r\n\x1a\n" + b"\0" * 100)
    path.unlink()
    with pytest.raises(InputError, match="no such file of features"):
        read_arrays(path)
    os.mkfifo(path)
    with pytest.raises(InputError, match="no such file of features"):
        read_arrays(path)


def test_ids_of_bytes(path: Path) -> None:
    path.write_bytes(pickle.dumps({b"a photo": np.ones(2)}))
    assert list(read_arrays(path)) == ["a photo"]
    assert "twice" in refusal(path, pickle.dumps({b"a": np.ones(2), "a": np.ones(2)}))
    assert "a key of the dict is a bytes" in refusal(path, pickle.dumps({b"\xff": np.ones(2)}))


class Tokenizer:
    """As Keras's, with its fields."""

    def __init__(self, words: dict[str, int]) -> None:
        self.word_counts = OrderedDict((word, 3) for word in words)
        self.word_docs: dict[str, int] = defaultdict(int, dict.fromkeys(words, 2))
        self.index_docs: dict[int, int] = defaultdict(int, dict.fromkeys(words.values(), 2))
        self.filters, self.split, self.lower = '!"#$%&()*+,-./:;<=>?@[\\]^_`{|}~\t\n', " ", True
        self.num_words, self.document_count, self.char_level, self.oov_token = None, 7, False, None
        self.word_index, self.index_word = words, {number: word for word, number in words.items()}
        self.analyzer = None


WORDS = {"startseq": 1, "endseq": 2, "in": 3, "été": 4, "dog": 5}
KERAS = ["keras_preprocessing.text", "keras.preprocessing.text", "keras.src.legacy.preprocessing.text",
         "keras.src.preprocessing.text", "tensorflow.keras.preprocessing.text",
         "tensorflow.python.keras.preprocessing.text", "tf_keras.src.preprocessing.text"]  # fmt: skip


def tokenizer_of(module: str, protocol: int, monkeypatch: pytest.MonkeyPatch) -> bytes:
    monkeypatch.setattr(Tokenizer, "__module__", module)
    kind = type(sys)(module)
    kind.Tokenizer = Tokenizer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module, kind)
    for end in range(len(module)):
        if module[end] == ".":
            monkeypatch.setitem(sys.modules, module[:end], type(sys)(module[:end]))
    return pickle.dumps(Tokenizer(WORDS), protocol)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("module", KERAS)
def test_tokenizers_of_every_keras(path: Path, module: str, protocol: int, monkeypatch: pytest.MonkeyPatch) -> None:
    path.write_bytes(tokenizer_of(module, protocol, monkeypatch))
    monkeypatch.undo()
    record = read_tokenizer(path)
    assert record.word_index == WORDS
    assert record.num_words is None and record.oov_token is None
    assert "holds a tokenizer, not a dict" in refusal(path, path.read_bytes())


def test_a_tokenizer_of_another_package_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = tokenizer_of("mine.text", 2, monkeypatch)
    assert "'mine.text.Tokenizer'" in refusal(path, content, read_tokenizer)


def test_a_tokenizer_as_json(path: Path) -> None:
    fields = {"num_words": None, "oov_token": "dog", "word_index": json.dumps(WORDS), "word_counts": "{}"}
    text = json.dumps({"class_name": "Tokenizer", "config": fields})
    for content in (text, json.dumps(text)):
        path.write_text(content)
        record = read_tokenizer(path)
        assert record.word_index == WORDS
        assert record.oov_token == "dog"
    for broken in (text[:-5], json.dumps(WORDS), '{"config": {"word_index": "{"}}', '"x"', "{" * 10_000, '"' * 3):
        refusal(path, broken.encode(), read_tokenizer)


@pytest.mark.parametrize("words", [{}, {"a": 0}, {"a": 2**40}, {"a": True}, {"a": "1"}, {"a": 1, b"a": 2}, [1], None])
def test_a_tokenizer_that_is_none_is_refused(path: Path, words: Any) -> None:
    state = pickle.dumps({"word_index": words}, 2)[2:-1]
    refusal(path, b"\x80\x02ckeras.preprocessing.text\nTokenizer\n)\x81" + state + b"b.", read_tokenizer)


def test_objects_of_python_2(path: Path) -> None:
    # protocol 0 of Python 2: copy_reg, texts that are bytes, an OrderedDict made of a list of lists
    content = (
        b"ccopy_reg\n_reconstructor\n(ckeras_preprocessing.text\nTokenizer\nc__builtin__\nobject\nNtR(dS'word_index'\n"
        b"ccollections\nOrderedDict\n((lp1\n(lS'dog'\naI1\naa(lS'cat'\naI2\naatRsS'word_docs'\n"
        b"ccollections\ndefaultdict\n(c__builtin__\nint\ntRS'dog'\nI3\nssS'num_words'\nNsb."
    )
    path.write_bytes(content)
    assert read_tokenizer(path).word_index == {"dog": 1, "cat": 2}


MEASURED = """
import sys, time
from pathlib import Path
def peak():  # ru_maxrss counts the process too that has started this one
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024
path = Path(sys.argv[2])
if sys.argv[1] == "pickle":
    import pickle, numpy
    def read():
        with path.open("rb") as file:
            return pickle.load(file)
else:
    from capexp.data.inert_pickle import read_arrays
    def read():
        return read_arrays(path)
before = peak()
start = time.process_time()
arrays = read()
print(time.process_time() - start, peak() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_time_and_memory_of_8000_photos(path: Path, protocol: int) -> None:
    """``pytest -m slow -s tests/data/test_inert_pickle.py`` prints the figures."""
    rows = np.random.default_rng(1).random((8000, 4096), np.float32)
    with path.open("wb") as file:
        pickle.dump({f"photo_{i}": row[None].copy() for i, row in enumerate(rows)}, file, protocol)
    runs: dict[str, list[list[float]]] = {"pickle": [], "inert": []}
    for _ in range(3):  # in turn: other work on the machine slows down both
        for reader, figures in runs.items():
            done = subprocess.run(
                [sys.executable, "-c", MEASURED, reader, str(path)], check=True, capture_output=True, text=True
            )
            figures.append([float(value) for value in done.stdout.split()])
    measured = {reader: np.min(figures, 0) for reader, figures in runs.items()}
    size = path.stat().st_size / 2**20
    for reader, (seconds, memory) in measured.items():
        print(f"\nprotocol {protocol}, file {size:.0f} MiB, {reader}: {seconds:.2f} s, peak +{memory:.0f} MiB", end="")
    assert measured["inert"][0] < 5 * measured["pickle"][0]  # twice as a rule
    assert measured["inert"][1] < 1.2 * max(measured["pickle"][1], path.stat().st_size / 2**20 * 2)
