"""Pickles of plain data: containers, strings, numbers and numpy arrays. Anything else is refused before it can run.

Three locks, each enough for the attacks known: the file's opcodes are checked against a list before one of them is
executed; a name is looked up in a table of ours and never imported; and what stands in the table are stand-ins, so that
not even numpy's own `__setstate__` (which trusts a dtype's flags) sees what the file says.
"""

import pickle
import pickletools
import reprlib
from collections.abc import Callable
from io import BytesIO
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError

_PLAIN_DATA = """
    PROTO FRAME STOP MARK POP POP_MARK DUP
    NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT
    STRING BINSTRING SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8
    UNICODE SHORT_BINUNICODE BINUNICODE BINUNICODE8
    LIST EMPTY_LIST APPEND APPENDS TUPLE EMPTY_TUPLE TUPLE1 TUPLE2 TUPLE3 DICT EMPTY_DICT SETITEM SETITEMS
    GET BINGET LONG_BINGET PUT BINPUT LONG_BINPUT MEMOIZE GLOBAL STACK_GLOBAL REDUCE BUILD
"""
_OPCODES = frozenset(_PLAIN_DATA.split())
"""Without INST, OBJ and NEWOBJ, which make instances; EXT, PERSID and NEXT_BUFFER, which point outside the file."""

_DTYPES = frozenset(("b1", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f2", "f4", "f8"))


def read(path: Path) -> Any:
    """What the pickle at `path` holds; arrays are read-only. Python 2's byte strings are bytes.

    Arrays are made where the outermost value is one, or a value of the outermost dictionary.

    Raises:
        UserError: naming `path`: unreadable, cut short, damaged, or with anything in it that is not plain data.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    try:
        _check_opcodes(content)
        value = _Unpickler(BytesIO(content), encoding="bytes").load()
        return {key: _plain(item) for key, item in value.items()} if isinstance(value, dict) else _plain(value)
    except _Refused as refusal:
        raise UserError(
            f"refused {path}: it contains {refusal}, which no dataset needs; don't trust this file"
        ) from None
    # Damaged bytes surface as nearly any exception: the unpickler runs what they happen to spell.
    except Exception as error:
        raise UserError(
            f"{path} is damaged or cut short ({type(error).__name__}: {_line(error)}); replace it"
        ) from None


class _Refused(Exception):
    """Not damage but danger; the message says what was found."""


class _Dtype:
    """Stands in for numpy.dtype: only plain numbers."""

    __slots__ = ("dtype",)

    def __init__(self, code: Any, *_flags: Any) -> None:
        code = code.decode("latin-1") if isinstance(code, bytes) else code
        if code not in _DTYPES:
            raise _Refused(f"an array of dtype {_short(code)}")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: Any) -> None:
        _version, order, subdtype, names, fields = state[:5]
        if subdtype is not None or names is not None or fields is not None:
            raise _Refused("a structured array")
        self.dtype = self.dtype.newbyteorder(order.decode("latin-1") if isinstance(order, bytes) else order)


class _Array:
    """Stands in for numpy.ndarray until its content is known."""

    __slots__ = ("array",)

    def __init__(self) -> None:
        self.array: NDArray[Any] | None = None

    def __setstate__(self, state: Any) -> None:
        shape, dtype, fortran, data = state[-4:]
        self._fill(data, dtype, shape, "F" if fortran else "C")

    def _fill(self, data: Any, dtype: Any, shape: Any, order: Any) -> "_Array":
        if not (isinstance(dtype, _Dtype) and isinstance(data, (bytes, bytearray))):
            raise _Refused("an array of objects")
        if not all(type(n) is int and n >= 0 for n in shape) or len(data) != prod(shape) * dtype.dtype.itemsize:
            raise ValueError(f"an array of shape {shape} has {len(data)} bytes")
        self.array = np.frombuffer(data, dtype.dtype).reshape(shape, order=order)
        self.array.flags.writeable = False
        return self


class _Name:
    """Stands in for a function or class that the file names. Made anew for each mention, and closed to BUILD."""

    __slots__ = ("_make",)

    def __init__(self, make: Callable[..., Any]) -> None:
        self._make = make

    def __call__(self, *args: Any) -> Any:
        return self._make(*args)

    def __setstate__(self, state: Any) -> None:
        raise _Refused("an attempt to change a function")


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _NAMES:
            raise _Refused(f"a call of {_short(f'{module}.{name}')}")
        return _Name(_NAMES[module, name])


def _reconstruct(*_args: Any) -> _Array:
    return _Array()


def _frombuffer(data: Any, dtype: Any, shape: Any, order: Any) -> _Array:
    return _Array()._fill(data, dtype, shape, order)


def _ndarray(*_args: Any) -> _Array:
    raise _Refused("an array made from raw memory")


def _no_bytes(*args: Any) -> bytes:
    # How Python 3 writes b"" in protocol 2.
    if args:
        raise _Refused("a call of bytes")
    return b""


def _encode(text: Any, encoding: Any) -> bytes:
    # How Python 3 writes bytes in protocol 2.
    if not isinstance(text, str) or encoding not in ("latin1", b"latin1", "latin-1"):
        raise _Refused(f"a call of _codecs.encode to {_short(encoding)}")
    return text.encode("latin-1")


_NAMES: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "ndarray"): _ndarray,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _encode,
    ("__builtin__", "bytes"): _no_bytes,
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy.core.numeric", "_frombuffer"): _frombuffer,
    ("numpy._core.numeric", "_frombuffer"): _frombuffer,
}


def _check_opcodes(content: bytes) -> None:
    for count, (opcode, argument, position) in enumerate(pickletools.genops(content)):
        if opcode.name not in _OPCODES:
            raise _Refused(f"the pickle opcode {opcode.name} at byte {position}")
        # The unpickler would allocate memory for as many entries as the largest index says.
        if opcode.name in ("PUT", "LONG_BINPUT") and isinstance(argument, int) and argument > count:
            raise ValueError(f"memo entry {argument} at byte {position}")


def _plain(value: Any) -> Any:
    if isinstance(value, _Array):
        if value.array is None:
            raise ValueError("an array without content")
        return value.array
    return value


def _line(error: Exception) -> str:
    text = "".join(c if c.isprintable() else " " for c in str(error)[:200])
    return " ".join(text.split()) or "no detail"


def _short(value: Any) -> str:
    """What the file says, harmless to a terminal and on one line."""
    return reprlib.repr(value)
