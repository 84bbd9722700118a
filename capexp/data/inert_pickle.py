"""Reads pickles of arrays, and Keras's tokenizers, as data: nothing that a file names is imported or called.

Unpickling runs what the file asks for, so a pickle from elsewhere may do anything. Python's ``pickle.Unpickler`` is not
made for such files: even if it finds no global, five bytes make it allocate gigabytes. This module therefore has an
interpreter of its own for the instructions of pickles (protocols 0 to 5; ``pickletools`` describes them). Its values
are numbers, texts, bytes, lists, tuples, dictionaries, and stand-ins for the few objects that it knows. Any other
object is refused by name.

Arrays are views of the file's content, which is in memory once. Memory and time are bounded by the file's size.
"""

import codecs
import itertools
import math
import pickle
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic_core import from_json

from capexp.errors import InputError

_MOST_INSTRUCTIONS = 20_000_000  # 20 to 30 for an array: enough for every photo of COCO several times over
_MOST_WIDE = 255  # bytes of a whole number
_LONG = 512  # bytes from which on texts and bytes stay views of the file
_NUMERIC = frozenset(f"{kind}{size}" for kind in "fiu" for size in (1, 2, 4, 8)) - {"f1"}
_BYTE_ORDERS: Final[Mapping[str, Literal["<", ">", "="]]] = {"<": "<", ">": ">", "|": "=", "=": "="}
_OPCODES = {value: name for name, value in vars(pickle).items() if name.isupper() and type(value) is bytes}


def read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """Read a pickled dict of photo ids and numeric arrays, such as the tutorial's ``features.pkl``.

    The arrays are read-only views of the file's content, in its byte order and layout.
    """
    content = _read(path, "file of features")
    table = _unpickle(path, content)
    if not isinstance(table, dict):
        raise InputError(f"{path}: holds {_kind(table)}, not a dict of photo ids and arrays; pickle such a dict")
    arrays = {}
    for key, value in table.items():
        name = _as_text(key)
        if name is None:
            raise InputError(f"{path}: a key of the dict is {_kind(key)}, not a photo's id; use texts")
        if not isinstance(value, _Array) or value.array is None:
            raise InputError(f"{path}: {name[:60]!r} has {_kind(value)}, not a NumPy array of numbers; save arrays")
        if name in arrays:
            raise InputError(f"{path}: {name[:60]!r} is there twice, as text and as bytes; delete one")
        arrays[name] = value.array
    return arrays


@dataclass(frozen=True)
class TokenizerRecord:
    """The words of a Keras ``Tokenizer`` and their numbers."""

    word_index: dict[str, int]
    """The number of each word, from 1."""
    num_words: int | None
    """If set, ``texts_to_sequences`` gives only the words with a lower number."""
    oov_token: str | None
    """The word that stands for all unknown words; it is in ``word_index`` too. None: they are left out."""


def read_tokenizer(path: Path) -> TokenizerRecord:
    """Read a Keras ``Tokenizer`` from its pickle or from its JSON (``Tokenizer.to_json()``)."""
    content = _read(path, "tokenizer")
    if content.lstrip()[:1] in (b"{", b'"'):
        fields = _tokenizer_json(path, content)
    else:
        record = _unpickle(path, content)
        if not isinstance(record, _Record):
            raise InputError(f"{path}: holds {_kind(record)}, not a Keras Tokenizer; pickle the tokenizer itself")
        fields = record.fields
    index = fields.get("word_index")
    if not isinstance(index, dict) or not index:
        raise InputError(f"{path}: the tokenizer knows no words (word_index); fit it on texts, then save it")
    words: dict[str, int] = {}
    for key, number in index.items():
        word = _as_text(key)
        if word is None or type(number) is not int or not 1 <= number < 2**31 or word in words:
            raise InputError(f"{path}: word_index is not a table of words and numbers from 1; save the tokenizer again")
        words[word] = number
    num_words, oov_token = fields.get("num_words"), fields.get("oov_token")
    if not (num_words is None or type(num_words) is int) or not (oov_token is None or _as_text(oov_token) in words):
        raise InputError(f"{path}: num_words or oov_token does not fit its words; save the tokenizer again")
    return TokenizerRecord(words, num_words, _as_text(oov_token))


def _tokenizer_json(path: Path, content: bytes) -> Mapping[str, object]:
    """Return the fields of a tokenizer's JSON, in which the tables are texts of JSON again."""
    try:
        record = from_json(content)
        record = from_json(record) if isinstance(record, str) else record  # json.dump(tokenizer.to_json())
        fields = record.get("config") if isinstance(record, dict) else None
        if isinstance(fields, dict) and isinstance(fields.get("word_index"), str):
            return fields | {"word_index": from_json(fields["word_index"])}
    except ValueError as error:
        raise InputError(f"{path}: not a tokenizer: invalid JSON ({error}); write Tokenizer.to_json() again") from None
    raise InputError(f"{path}: not the JSON of a Keras Tokenizer; write what Tokenizer.to_json() returns")


def _read(path: Path, what: str) -> bytes:
    if not path.is_file():  # reading a pipe would wait for ever
        raise InputError(f"{path}: no such {what}; give its path")
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: the {what} cannot be read ({error.strerror})") from None


class _Refused(Exception):
    """The reason why a pickle is refused."""


def _unpickle(path: Path, content: bytes) -> Any:
    """Return the value of a pickle."""
    try:
        return _Interpreter(content).run()
    except _Refused as error:
        raise InputError(f"{path}: {error}") from None
    except (IndexError, KeyError, TypeError, ValueError, OverflowError, struct.error) as error:
        raise InputError(
            f"{path}: damaged, cut short, or not a pickle ({type(error).__name__}); get or make the file again"
        ) from None


def _kind(value: object) -> str:
    """Return what a value is, for messages."""
    names = {_Array: "an array", _Record: "a tokenizer", _Dtype: "a dtype", _Global: "a class", _LongText: "a text"}
    return names.get(type(value), f"a {type(value).__name__}")


def _as_text(value: object) -> str | None:
    """Return a text, or the text of the bytes that Python 2 had for it; None for any other value."""
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return None
    return value if isinstance(value, str) else None


@dataclass(frozen=True)
class _Global:
    """A class or function that a pickle names. It is only compared, never looked up."""

    name: str


@dataclass
class _Dtype:
    """Stands for a ``numpy.dtype`` of numbers."""

    value: np.dtype[Any]


@dataclass
class _Array:
    """Stands for a ``numpy.ndarray``; its array is None until its state is read."""

    array: NDArray[Any] | None = None


@dataclass
class _Record:
    """Stands for a Keras ``Tokenizer``."""

    fields: dict[str, Any]


@dataclass(frozen=True)
class _LongText:
    """A text that is decoded only where it is needed: the data of an array, in protocols 0 to 2."""

    content: memoryview
    encoding: str


_NDARRAY, _DTYPE, _RECONSTRUCT, _FROMBUFFER = map(_Global, ("ndarray", "dtype", "_reconstruct", "_frombuffer"))
_ENCODE, _BYTES, _INT, _OBJECT = map(_Global, ("encode", "bytes", "int", "object"))
_ORDERED, _DEFAULT, _RECONSTRUCTOR = map(_Global, ("OrderedDict", "defaultdict", "_reconstructor"))
_TOKENIZER = _Global("Tokenizer")
_GLOBALS: Final[Mapping[tuple[str, str], _Global]] = {
    ("numpy", "ndarray"): _NDARRAY,
    ("numpy", "dtype"): _DTYPE,
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,  # NumPy 1
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,  # NumPy 2
    ("numpy.core.numeric", "_frombuffer"): _FROMBUFFER,
    ("numpy._core.numeric", "_frombuffer"): _FROMBUFFER,
    ("_codecs", "encode"): _ENCODE,
    ("collections", "OrderedDict"): _ORDERED,
    ("collections", "defaultdict"): _DEFAULT,
    **{(module, value.name): value for module in ("builtins", "__builtin__") for value in (_INT, _OBJECT, _BYTES)},
    ("__builtin__", "long"): _INT,  # as Python 3 calls int in protocols 0 to 2
    **{(module, "_reconstructor"): _RECONSTRUCTOR for module in ("copyreg", "copy_reg")},
}
_KERAS_TEXT = re.compile(r"[\w.]*keras[\w.]*\.text(\.\w+)?")  # its module moved with every version


class _Interpreter:
    """Interprets the instructions of one pickle."""

    def __init__(self, content: bytes) -> None:
        self._content, self._view, self._at = content, memoryview(content), 0
        self._stack: list[Any] = []
        self._marks: list[int] = []  # heights of the stack
        self._memo: dict[int, Any] = {}
        # Few instructions can ask for much, again and again. All that arrays, their bytes and tables of an honest file
        # take together is in the file; its bytes may be counted for each of the three.
        self._left = 3 * len(content)

    def run(self) -> Any:
        """Interpret all instructions; return the value at their end."""
        content, instructions = self._content, _INSTRUCTIONS
        for _ in itertools.repeat(None, _MOST_INSTRUCTIONS):
            code = content[self._at]
            self._at += 1
            if code == pickle.STOP[0]:
                return self._pop()
            instruction = instructions.get(code)
            if instruction is None:
                name = _OPCODES.get(bytes([code]))
                if name is None:
                    raise _Refused("not a pickle; give one of a dict of arrays, or of a Keras Tokenizer")
                raise _Refused(f"a pickle with the instruction {name}, which is not read; pickle plain arrays")
            instruction(self)
        raise _Refused(f"a pickle of more than {_MOST_INSTRUCTIONS:,} instructions; split it into several")

    # Bytes and texts of the file.

    def _take(self, size: int) -> bytes:
        """Return the next ``size`` bytes; a size that the file claims is checked before anything is allocated."""
        return bytes(self._take_view(size))

    def _take_view(self, size: int) -> memoryview:
        end = self._at + size
        if not 0 <= size <= len(self._content) - self._at:
            raise _Refused("damaged or cut short: a value is longer than the rest of the file; get the file again")
        view = self._view[self._at : end]
        self._at = end
        return view

    def _take_number(self, size: int) -> int:
        if size == 1:  # by far the most frequent
            self._at += 1
            return self._content[self._at - 1]
        return int.from_bytes(self._take_view(size), "little")

    def _take_line(self) -> memoryview:
        end = self._content.index(b"\n", self._at)
        view = self._view[self._at : end]
        self._at = end + 1
        return view

    def _spend(self, count: int) -> None:
        """Count bytes or entries that an instruction copies."""
        self._left -= count
        if self._left < 0:
            raise _Refused("what it describes is larger than the file; save each array once")

    # The stack.

    def _pop(self) -> Any:
        if self._marks and len(self._stack) <= self._marks[-1]:
            raise IndexError
        return self._stack.pop()

    def _pop_to_mark(self) -> list[Any]:
        mark = self._marks.pop()
        values = self._stack[mark:]
        del self._stack[mark:]
        return values

    # Instructions.

    def _push_bytes(self, size: int) -> None:
        view = self._take_view(size)
        self._stack.append(view if size >= _LONG else bytes(view))

    def _push_text(self, size: int) -> None:
        self._push_decoded(self._take_view(size), "utf-8")

    def _push_decoded(self, view: memoryview, encoding: str) -> None:
        text = _LongText(view, encoding)
        self._stack.append(text if len(view) >= _LONG else _decoded(text))

    def _push_line_of_text(self) -> None:
        self._push_decoded(self._take_line(), "raw-unicode-escape")

    def _push_quoted(self) -> None:
        line = bytes(self._take_line()).strip()
        if len(line) < 2 or line[0] != line[-1] or line[:1] not in (b"'", b'"'):
            raise ValueError
        self._stack.append(codecs.escape_decode(line[1:-1])[0])

    def _push_number(self) -> None:
        line = bytes(self._take_line())
        if len(line) > _MOST_WIDE:
            raise ValueError
        self._stack.append({b"00": False, b"01": True}[line] if line in (b"00", b"01") else int(line.rstrip(b"L")))

    def _push_float(self) -> None:
        line = bytes(self._take_line())
        if len(line) > _MOST_WIDE:
            raise ValueError
        self._stack.append(float(line))

    def _push_wide(self, size: int) -> None:
        if size > _MOST_WIDE:
            raise ValueError
        self._stack.append(int.from_bytes(self._take_view(size), "little", signed=True))

    def _push_binary_float(self) -> None:
        self._stack.append(struct.unpack(">d", self._take(8))[0])

    def _mark(self) -> None:
        self._marks.append(len(self._stack))

    def _discard(self) -> None:
        if self._marks and self._marks[-1] == len(self._stack):
            self._marks.pop()
        else:
            self._pop()

    def _duplicate(self) -> None:
        self._stack.append(self._stack[-1])

    def _put(self, key: int) -> None:
        self._memo[key] = self._stack[-1]

    def _get(self, key: int) -> None:
        self._stack.append(self._memo[key])

    def _push_tuple(self, size: int) -> None:
        values = [self._pop() for _ in range(size)]
        self._stack.append(tuple(values[::-1]))

    def _append(self) -> None:
        value = self._pop()
        self._extend([value])

    def _discard_to_mark(self) -> None:
        self._pop_to_mark()

    def _extend(self, values: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) is not list:
            raise TypeError
        target += values

    def _set_item(self) -> None:
        value, key = self._pop(), self._pop()
        self._set_items([key, value])

    def _set_items(self, values: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) is not dict or len(values) % 2:
            raise TypeError
        _fill(target, values[::2], values[1::2])

    def _push_dictionary(self) -> None:
        values = self._pop_to_mark()
        self._stack.append({})
        self._set_items(values)

    def _find(self, module: object, name: object) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise TypeError
        known = _GLOBALS.get((module, name))
        if known is None and name == "Tokenizer" and _KERAS_TEXT.fullmatch(module):
            known = _TOKENIZER
        if known is None:
            raise _Refused(
                f"holds {f'{module}.{name}'[:80]!r}, which is not loaded, and nothing of it has run; "
                "only dicts of NumPy arrays of numbers and Keras Tokenizers are read"
            )
        self._stack.append(known)

    def _find_named(self) -> None:
        module, name = bytes(self._take_line()), bytes(self._take_line())
        self._find(module.decode(), name.decode())

    def _find_on_stack(self) -> None:
        name, module = self._pop(), self._pop()
        self._find(module, name)

    def _call(self) -> None:
        """Make the stand-in for what a function of the pickle would return."""
        arguments, function = self._pop(), self._pop()
        if not isinstance(function, _Global) or not isinstance(arguments, tuple):
            raise TypeError
        self._stack.append(self._made(function, arguments))

    def _made(self, function: _Global, arguments: tuple[Any, ...]) -> Any:
        if function is _RECONSTRUCT and arguments[0] is _NDARRAY:
            return _Array()
        if function is _FROMBUFFER:
            content, dtype, shape, order = arguments
            if type(order) is not str or order not in ("C", "F"):
                raise ValueError
            return _Array(self._array(content, dtype, shape, order == "F"))
        if function is _DTYPE:
            name = _as_text(arguments[0]) or "?"
            if name not in _NUMERIC:
                raise _Refused(f"holds an array of dtype {name[:20]!r}, not of numbers; save arrays of float32")
            return _Dtype(np.dtype(name))
        if function is _ENCODE:
            return self._encoded(*arguments)
        if function is _BYTES and arguments == ():
            return b""
        if function is _ORDERED and len(arguments) <= 1:
            pairs = arguments[0] if arguments else []
            self._spend(len(pairs))
            table: dict[Any, Any] = {}
            _fill(table, [key for key, _ in pairs], [value for _, value in pairs])
            return table
        if function is _DEFAULT and arguments in ((), (_INT,)):
            return {}
        if function is _RECONSTRUCTOR and arguments == (_TOKENIZER, _OBJECT, None):
            return _Record({})
        raise TypeError

    def _make_new(self) -> None:
        arguments, kind = self._pop(), self._pop()
        if kind is not _TOKENIZER or arguments != ():
            raise TypeError
        self._stack.append(_Record({}))

    def _set_state(self) -> None:
        """Set the state of the stand-in on top of the stack."""
        state, target = self._pop(), self._stack[-1]
        if isinstance(target, _Array):
            _, shape, dtype, is_fortran, content = state
            target.array = self._array(content, dtype, shape, is_fortran)
        elif isinstance(target, _Dtype):
            order, subtype, names, fields = state[1:5]
            if subtype is not None or names is not None or fields is not None:
                raise _Refused("holds an array of records, not of numbers; save arrays of float32")
            target.value = target.value.newbyteorder(_BYTE_ORDERS[_as_text(order) or ""])
        elif isinstance(target, _Record):
            self._spend(len(state))
            if not isinstance(state, dict):
                raise ValueError
            fields = {_as_text(key): value for key, value in state.items()}
            target.fields = {name: value for name, value in fields.items() if name is not None}
        else:
            raise TypeError

    def _array(self, content: object, dtype: object, shape: object, is_fortran: object) -> NDArray[Any]:
        """Return a view of an array's content, which must be of exactly the size that its shape says."""
        if not isinstance(content, bytes | memoryview) or not isinstance(dtype, _Dtype) or type(shape) is not tuple:
            raise _Refused("holds an array that is not one of numbers; save arrays of float32")
        if len(shape) > 8 or not all(type(side) is int and 0 <= side < 2**31 for side in shape):
            raise ValueError
        size = math.prod(shape) * dtype.value.itemsize
        if size != len(content):
            raise _Refused(
                f"damaged: an array of shape {shape} takes {size:,} bytes, and has {len(content):,}; get the file again"
            )
        self._spend(size)
        flat = np.frombuffer(content, dtype.value)
        return flat.reshape(shape[::-1]).transpose() if is_fortran else flat.reshape(shape)

    def _encoded(self, text: object, encoding: object) -> bytes:
        """Return the bytes of a text in Latin-1: so Python 3 writes bytes in protocols 0 to 2."""
        if encoding not in ("latin1", "latin-1"):
            raise TypeError
        if isinstance(text, _LongText):
            self._spend(len(text.content))
            return _decoded(text).encode("latin-1")
        if not isinstance(text, str):
            raise TypeError
        self._spend(len(text))
        return text.encode("latin-1")


def _decoded(text: _LongText) -> str:
    return str(text.content, text.encoding, "surrogatepass" if text.encoding == "utf-8" else "strict")


def _fill(table: dict[Any, Any], keys: list[Any], values: list[Any]) -> None:
    """Put pairs into a dictionary. Only keys that are quickly hashed are taken: a deep tuple overflows the stack."""
    for key, value in zip(keys, values, strict=True):
        if type(key) not in (str, bytes) and not (type(key) is int and abs(key) < 2**63):
            raise _Refused(f"a key of a dict is {_kind(key)}; use texts")
        table[key] = value


Instruction = Callable[[_Interpreter], None]


def _push(value: object) -> Instruction:
    return lambda it: it._stack.append(value)


def _sized(method: Callable[[_Interpreter, int], None], size: int) -> Instruction:
    """Return the instruction that reads a number of ``size`` bytes for a method."""
    return lambda it: method(it, it._take_number(size))


def _to_mark(method: Callable[[_Interpreter, list[Any]], None]) -> Instruction:
    return lambda it: method(it, it._pop_to_mark())


_I = _Interpreter
_INSTRUCTIONS: Final[Mapping[int, Instruction]] = {
    code[0]: instruction
    for code, instruction in {
        pickle.PROTO: lambda it: it._take_view(1),
        pickle.FRAME: lambda it: it._take_view(8),
        # Plain values.
        pickle.NONE: _push(None),
        pickle.NEWTRUE: _push(True),
        pickle.NEWFALSE: _push(False),
        pickle.INT: _I._push_number,
        pickle.LONG: _I._push_number,
        pickle.BININT: lambda it: it._stack.append(int.from_bytes(it._take_view(4), "little", signed=True)),
        pickle.BININT1: lambda it: it._stack.append(it._take_number(1)),
        pickle.BININT2: lambda it: it._stack.append(it._take_number(2)),
        pickle.LONG1: _sized(_I._push_wide, 1),
        pickle.LONG4: _sized(_I._push_wide, 4),
        pickle.FLOAT: _I._push_float,
        pickle.BINFLOAT: _I._push_binary_float,
        pickle.STRING: _I._push_quoted,
        pickle.BINSTRING: _sized(_I._push_bytes, 4),
        pickle.SHORT_BINSTRING: _sized(_I._push_bytes, 1),
        pickle.BINBYTES: _sized(_I._push_bytes, 4),
        pickle.SHORT_BINBYTES: _sized(_I._push_bytes, 1),
        pickle.BINBYTES8: _sized(_I._push_bytes, 8),
        pickle.BYTEARRAY8: _sized(_I._push_bytes, 8),
        pickle.UNICODE: _I._push_line_of_text,
        pickle.BINUNICODE: _sized(_I._push_text, 4),
        pickle.SHORT_BINUNICODE: _sized(_I._push_text, 1),
        pickle.BINUNICODE8: _sized(_I._push_text, 8),
        # Containers.
        pickle.EMPTY_LIST: lambda it: it._stack.append([]),
        pickle.EMPTY_DICT: lambda it: it._stack.append({}),
        pickle.EMPTY_TUPLE: _push(()),
        pickle.LIST: lambda it: it._stack.append(it._pop_to_mark()),
        pickle.DICT: _I._push_dictionary,
        pickle.TUPLE: lambda it: it._stack.append(tuple(it._pop_to_mark())),
        pickle.TUPLE1: lambda it: it._push_tuple(1),
        pickle.TUPLE2: lambda it: it._push_tuple(2),
        pickle.TUPLE3: lambda it: it._push_tuple(3),
        pickle.APPEND: _I._append,
        pickle.APPENDS: _to_mark(_I._extend),
        pickle.SETITEM: _I._set_item,
        pickle.SETITEMS: _to_mark(_I._set_items),
        # Stack and memo.
        pickle.MARK: _I._mark,
        pickle.POP: _I._discard,
        pickle.POP_MARK: _I._discard_to_mark,
        pickle.DUP: _I._duplicate,
        pickle.PUT: lambda it: it._put(int(bytes(it._take_line()[:20]))),
        pickle.BINPUT: _sized(_I._put, 1),
        pickle.LONG_BINPUT: _sized(_I._put, 4),
        pickle.MEMOIZE: lambda it: it._put(len(it._memo)),
        pickle.GET: lambda it: it._get(int(bytes(it._take_line()[:20]))),
        pickle.BINGET: _sized(_I._get, 1),
        pickle.LONG_BINGET: _sized(_I._get, 4),
        # Objects, of which only stand-ins are made.
        pickle.GLOBAL: _I._find_named,
        pickle.STACK_GLOBAL: _I._find_on_stack,
        pickle.REDUCE: _I._call,
        pickle.NEWOBJ: _I._make_new,
        pickle.BUILD: _I._set_state,
    }.items()
}
