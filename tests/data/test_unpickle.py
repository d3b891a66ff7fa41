"""The unpickler: plain data comes through, and nothing else so much as starts."""

import copyreg
import io
import os
import pickle
import pickletools
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ban_fast.data import unpickle
from ban_fast.errors import UserError

ARRAYS = [
    np.arange(24, dtype=np.uint8).reshape(2, 3, 4),
    np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    np.arange(5, dtype=">i4"),
    np.array([True, False]),
    np.zeros((0, 3), np.float32),
    np.array(7, np.int64),
]


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_data_comes_through(tmp_path: Path, protocol: int) -> None:
    value = {"a": [1, -(2**70), 2.5, None, True], b"b": (b"bytes", "text \u00e9"), 3: {"nested": []}}
    content = pickle.dumps(value, protocol)
    assert unpickle.read(write(tmp_path / "file", content)) == value


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("array", ARRAYS, ids=lambda a: f"{a.dtype}{a.shape}")
def test_arrays_come_through(tmp_path: Path, array: np.ndarray, protocol: int) -> None:
    for value in (array, {"x": array}):
        got = unpickle.read(write(tmp_path / "file", pickle.dumps(value, protocol)))
        got = got["x"] if isinstance(value, dict) else got
        assert got.dtype == array.dtype
        assert got.shape == array.shape
        assert np.array_equal(got, array)


def test_python_2_wrote_byte_strings_and_the_old_module_name(tmp_path: Path) -> None:
    content = (
        b"\x80\x02}U\x04datacnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        b"(K\x01K\x03\x85cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        b"\x89U\x03\x01\x80\xfftbs."
    )
    got = unpickle.read(write(tmp_path / "file", content))
    assert got[b"data"].tolist() == [1, 128, 255]


def hostile(trap: Path) -> dict[str, bytes]:
    """Pickles that would create `trap`, by each way there is to name or call something."""
    made = str(trap).encode()
    text = b"X" + struct.pack("<I", len(made)) + made
    short = b"\x8c" + bytes([len(made)]) + made
    touch = b"\x94\x8c\x05posix\x8c\x06system\x93\x8c" + bytes([len(made) + 6]) + b"touch " + made
    return {
        "GLOBAL, REDUCE": b"\x80\x02cposix\nmkdir\n" + text + b"\x85R.",
        "GLOBAL, REDUCE, protocol 0": b"cos\nmkdir\n(V" + made + b"\ntR.",
        "STACK_GLOBAL": b"\x80\x04\x8c\x05posix\x8c\x05mkdir\x93" + short + b"\x85R.",
        "STACK_GLOBAL of a shell": b"\x80\x04(" + touch[1:] + b"\x85R.",
        "INST": b"(V" + made + b"\niposix\nmkdir\n.",
        "OBJ": b"(cposix\nmkdir\n" + text + b"o.",
        "NEWOBJ": b"\x80\x02cpathlib\nPath\n" + text + b"\x85\x81.",
        "NEWOBJ_EX": b"\x80\x04cpathlib\nPath\n" + text + b"\x85}\x92.",
        "BUILD": b"\x80\x02cnumpy\nndarray\n}X\x0c\x00\x00\x00__setstate__cposix\nmkdir\nsb" + text + b"b.",
        "BUILD on an admitted name": b"\x80\x02c_codecs\nencode\n}b.",
        "eval": b"\x80\x02cbuiltins\neval\nX\x01\x00\x00\x001\x85R.",
        "getattr": b"\x80\x04\x8c\x08builtins\x8c\x07getattr\x93.",
        "a dotted name": b"\x80\x04\x8c\x05numpy\x8c\x10ndarray.__init__\x93.",
        "a module of numpy": b"\x80\x02cnumpy\nload\n" + text + b"\x85R.",
        "numpy's own exec": b"\x80\x02cnumpy.testing._private.utils\nrunstring\n" + text + b"}\x86R.",
        "nested in containers": b"\x80\x02}X\x04\x00\x00\x00data](cposix\nmkdir\n" + text + b"\x85Res.",
        "a pickle in a pickle": b"\x80\x02c_pickle\nloads\nU\x05cos\nxq\x00\x85R.",
        "EXT1": b"\x80\x02\x82\xf0" + text + b"\x85R.",
        "EXT2": b"\x80\x02\x83\xf0\x00" + text + b"\x85R.",
        "EXT4": b"\x80\x02\x84\xf0\x00\x00\x00" + text + b"\x85R.",
        "PERSID": b"P" + made + b"\n.",
        "BINPERSID": b"\x80\x02" + text + b"Q.",
        "NEXT_BUFFER": b"\x80\x05\x97.",
        "a name that would colour the terminal": b"\x80\x04\x8c\x02os\x8c\x09\x1b[31m\nred\x93.",
        "another codec": b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x05\x00\x00\x00rot13\x86R.",
        "bytes of any length": b"\x80\x02c__builtin__\nbytes\nJ\xff\xff\xff\x7f\x85R.",
        "an array from raw memory": b"\x80\x02cnumpy\nndarray\nK\x05\x85X\x02\x00\x00\x00u1\x86R.",
    }


@pytest.mark.parametrize("way", hostile(Path("/x")))
def test_a_hostile_pickle_is_refused_and_does_not_run(tmp_path: Path, way: str) -> None:
    trap = tmp_path / "trap"
    path = write(tmp_path / "data_batch_1", hostile(trap)[way])
    with pytest.raises(UserError, match=r"refused .*data_batch_1: it contains .* don't trust") as caught:
        unpickle.read(path)
    assert str(caught.value).isprintable()
    assert not trap.exists()


def test_the_traps_work_on_an_open_unpickler(tmp_path: Path) -> None:
    """What is refused above would have run: else those tests would prove nothing."""
    for way in ("GLOBAL, REDUCE", "GLOBAL, REDUCE, protocol 0", "STACK_GLOBAL", "INST", "OBJ", "nested in containers"):
        trap = tmp_path / "trap"
        pickle.load(io.BytesIO(hostile(trap)[way]))
        assert trap.is_dir(), way
        trap.rmdir()


def test_a_registered_extension_is_refused_even_when_cached(tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    path = write(tmp_path / "file", hostile(trap)["EXT1"])
    copyreg.add_extension("posix", "mkdir", 0xF0)
    try:
        pickle.load(path.open("rb"))
        assert trap.is_dir()
        trap.rmdir()
        with pytest.raises(UserError, match=r"refused .* opcode EXT1"):
            unpickle.read(path)
        assert not trap.exists()
    finally:
        copyreg.remove_extension("posix", "mkdir", 0xF0)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    "value",
    [
        os.system,
        Path("x"),
        {1, 2},
        1j,
        np.array([{}], dtype=object),
        np.zeros(2, [("a", "u1")]),
        np.array(["text"]),
        np.array([1, 2], "M8[s]"),
        np.float32(1),
        ValueError("x"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_other_things_are_refused(tmp_path: Path, value: Any, protocol: int) -> None:
    with pytest.raises(UserError, match="refused"):
        unpickle.read(write(tmp_path / "file", pickle.dumps({"data": value}, protocol)))


def test_a_dtype_that_lies_about_its_flags(tmp_path: Path) -> None:
    # Real numpy takes bytes for pointers where a structured dtype's state denies that it holds objects.
    lie = (
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01K\x01\x85cnumpy\ndtype\n"
        b"U\x02V8K\x00K\x01\x87R(K\x03U\x01|NU\x01a\x85}U\x01acnumpy\ndtype\nU\x02O8K\x00K\x01\x87RK\x00\x86sK\x08K\x01K\x00tb"
        b"\x89U\x08AAAAAAAAtb."
    )
    pickletools.dis(lie, out=io.StringIO())  # well-formed: what refuses it is its meaning
    with pytest.raises(UserError, match=r"refused .* dtype 'V8'"):
        unpickle.read(write(tmp_path / "file", lie))


GOOD = pickle.dumps({"data": np.arange(100, dtype=np.uint8), "labels": list(range(100))}, 2)


@pytest.mark.parametrize("kept", range(0, len(GOOD), 7))
def test_a_file_cut_short_is_named(tmp_path: Path, kept: int) -> None:
    with pytest.raises(UserError, match="data_batch_1 is damaged or cut short") as caught:
        unpickle.read(write(tmp_path / "data_batch_1", GOOD[:kept]))
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:invalid escape sequence")
def test_damage_never_escapes_as_another_exception(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    outcomes = set()
    for _ in range(600):
        damaged = bytearray(GOOD)
        for position in random.integers(0, len(GOOD), 3):
            damaged[position] = random.integers(0, 256)
        try:
            unpickle.read(write(tmp_path / "file", bytes(damaged)))
            outcomes.add("read")
        except UserError as error:
            outcomes.add("refused" if "refused" in str(error) else "damaged")
    assert outcomes == {"read", "refused", "damaged"}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\x80\x02]r\xff\xff\xff\x7f.", "memo entry 2147483647"),  # would claim 16 GiB
        (b"]p1000000000\n.", "memo entry 1000000000"),
        (GOOD.replace(b"K\x01Kd\x85", b"K\x01Ke\x85"), r"shape \(101,\) has 100 bytes"),
        (b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n)R.", "without content"),
        (b"not a pickle", "damaged"),
        (b"<html>404</html>", "damaged"),
        (b"\x1f\x8b\x08\x00", "damaged"),
    ],
)
def test_content_that_cannot_be(tmp_path: Path, content: bytes, reason: str) -> None:
    with pytest.raises(UserError, match=reason) as caught:
        unpickle.read(write(tmp_path / "data_batch_1", content))
    assert "data_batch_1" in str(caught.value)


def test_a_file_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read .*nothing: No such file"):
        unpickle.read(tmp_path / "nothing")
    with pytest.raises(UserError, match="Is a directory"):
        unpickle.read(tmp_path)
