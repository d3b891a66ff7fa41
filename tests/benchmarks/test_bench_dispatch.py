"""The table behind backend="auto" is what `benchmarks.dispatch` measured, of the kernels that are there now."""

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ban_fast.backends import table
from benchmarks import dispatch as measured

DEVICES: dict[str, Any] = json.loads(table.FILE.read_text())["devices"]


def test_devices_are_known_and_the_cpu_is_measured() -> None:
    assert "cpu" in DEVICES
    assert set(DEVICES) <= {"cpu", "cuda"}
    assert table.measured("mps") is None


@pytest.mark.parametrize("device", DEVICES)
def test_the_table_was_measured_with_the_present_kernels(device: str) -> None:
    mend = f"the {device} table is of other kernels than these; run: {measured.COMMAND} --device {device}"
    assert DEVICES[device]["sources"] == measured.fingerprint(device), mend


@pytest.mark.parametrize("device", DEVICES)
def test_the_table_covers_every_loss_dtype_and_shape(device: str) -> None:
    there = [(cell["loss"], cell["dtype"], (cell["rows"], cell["classes"])) for cell in DEVICES[device]["cells"]]
    assert there == list(measured.grid(device))
    part = table.measured(device)
    assert part is not None
    assert part.backend("dkpp", torch.bfloat16, (0, 1)) in ("reference", "native", "triton")


@pytest.mark.parametrize("device", DEVICES)
def test_no_cell_names_a_backend_that_lost(device: str) -> None:
    for cell in DEVICES[device]["cells"]:
        assert cell["backend"] == measured.fastest(cell), cell
        assert cell["ms"][cell["backend"]] <= cell["ms"]["reference"], cell


def test_the_table_says_where_it_comes_from() -> None:
    for part in DEVICES.values():
        assert {"machine", "versions", "commit", "date", "load_at_start"} <= set(part)


def laps_of(**seconds: list[float]) -> dict[str, Any]:
    return measured.Laps(seconds).to_dict()


@pytest.mark.parametrize(
    ("native", "expected"),
    [
        ([0.5, 0.5, 0.5, 0.5, 0.5], "native"),
        ([1.0, 1.0, 1.0, 1.0, 1.0], "reference"),
        ([0.9, 1.1, 0.9, 1.1, 0.9], "reference"),  # faster by the median, and by chance
        ([0.9, 0.9, 9.0, 0.9, 0.9], "native"),  # one round among five is noise
        ([1.2, 1.2, 1.2, 1.2, 1.2], "reference"),
    ],
)
def test_the_reference_is_left_only_for_what_is_faster_beyond_noise(native: list[float], expected: str) -> None:
    assert measured.fastest(laps_of(reference=[1.0] * 5, native=native)) == expected


def test_the_fastest_of_those_wins() -> None:
    laps = laps_of(reference=[1.0] * 5, native=[0.4] * 5, triton=[0.3] * 5)
    assert measured.fastest(laps) == "triton"
    assert laps["reference_over"]["triton"] == [3.333, 3.333]


def test_a_reference_that_is_slow_beyond_doubt_is_called_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "CELL_SECONDS", 0.0)
    counts = {"reference": 0, "native": 0}

    def call(name: str) -> Callable[[], None]:
        def counted() -> None:
            counts[name] += 1

        return counted

    monkeypatch.setattr(measured, "_seconds", lambda call: (call(), 1.0 if counts["native"] == 0 else 0.1)[1])
    found = measured.laps({"reference": call("reference"), "native": call("native")}, "cpu")
    assert found.seconds == {"reference": [1.0], "native": [0.1]}
    assert counts == {"reference": 1, "native": 2}


@pytest.mark.parametrize("call", [1, 2, 3, 9])
def test_a_backend_that_fails_is_not_chosen(
    call: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """At whichever call; the reference's error ends it, as without it nothing can be judged."""
    monkeypatch.setattr(measured, "CELL_SECONDS", 1e-3)
    monkeypatch.setattr(measured, "CLEAR", math.inf)  # the reference has rounds too

    def failing(call: int) -> Callable[[], None]:
        numbers = itertools.count(1)

        def count() -> None:
            if next(numbers) >= call:
                raise RuntimeError("out of memory\nand more")

        return count

    found = measured.laps({"reference": lambda: None, "native": failing(call), "triton": lambda: None}, "cpu")
    assert set(found.seconds) == {"reference", "triton"}
    assert capsys.readouterr().err == "native is left out of a cell: out of memory\n"
    alone = measured.laps({"reference": lambda: None, "native": failing(call)}, "cpu")
    assert measured.fastest(alone.to_dict()) == "reference"
    with pytest.raises(RuntimeError, match="out of memory"):
        measured.laps({"reference": failing(call), "native": lambda: None}, "cpu")


@pytest.mark.parametrize(("native", "rounds"), [([0.5] * 25, 5), ([0.5, 2.0, 0.5, 2.0, 0.5] * 5, 25)])
def test_rounds_that_do_not_agree_are_repeated(
    native: list[float], rounds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    remaining = iter(native)

    def interleave(turns: dict[str, Any], rounds: int) -> tuple[dict[str, list[float]], dict[str, Exception]]:
        return {"reference": [1.0] * rounds, "native": [next(remaining) for _ in range(rounds)]}, {}

    monkeypatch.setattr(measured, "interleave", interleave)
    monkeypatch.setattr(measured, "rounds_for", lambda length, seconds: 5)
    found = measured.laps({"reference": lambda: None, "native": lambda: None}, "cpu")
    assert len(found.seconds["native"]) == len(found.seconds["reference"]) == rounds


def test_a_cell_without_a_decision_is_measured_once_more(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And named where that does not help."""
    places = [("kd", "float32", (16, 10)), ("kd", "float32", (16, 100)), ("kd", "float32", (16, 1000))]
    answers = iter([True, False, False, True, False])
    monkeypatch.setattr(measured, "grid", lambda device: iter(places))
    monkeypatch.setattr(measured, "measure_cell", lambda place, *_: ({"shape": place[2]}, next(answers)))
    cells = measured.measure("cpu")["cells"]
    assert [cell["shape"] for cell in cells] == [(16, 10), (16, 100), (16, 1000)]
    assert next(answers, None) is None
    said = capsys.readouterr().err
    assert said == "left to the reference, since rounds did not agree: kd float32 [16, 1000]\n"


def test_comments_and_layout_leave_the_fingerprint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [tmp_path / "a.py", tmp_path / "b.cpp", tmp_path / "CMakeLists.txt"]
    monkeypatch.setattr(measured, "sources", lambda device: files)

    def fingerprint(python: str, cpp: str, cmake: str = "set(FLAGS -O3)\n") -> str:
        for file, text in zip(files, (python, cpp, cmake), strict=True):
            file.write_text(text)
        return measured.fingerprint("cpu")

    first = fingerprint("x = 1\n", "int x = 1;\n")
    assert fingerprint("x = 1  # why\n", "/* two\nlines */ int x =\n 1; // one\n") == first
    assert fingerprint("x = 1\n", "int x = 1;\n", "# fast\nset(FLAGS\n  -O3)\n") == first
    assert fingerprint("x = 1\n", "int x = 1;\n", "set(FLAGS -O2)\n") != first
    assert fingerprint("x = 2\n", "int x = 1;\n") != first
    assert fingerprint("x = 1\n", "int x = 2;\n") != first


def test_the_fingerprint_is_of_the_kernels_of_that_device() -> None:
    cpu, cuda = ({str(path.relative_to(measured.ROOT)) for path in measured.sources(d)} for d in ("cpu", "cuda"))
    assert {"csrc/row_math.h", "csrc/cpu/kd_rows.cpp", "ban_fast/backends/native.py"} <= cpu
    assert {"csrc/row_math.h", "ban_fast/backends/triton/distill_kernel.py"} <= cuda
    assert {"ban_fast/backends/reference.py", "CMakeLists.txt"} <= cpu & cuda
    assert "csrc/python/usual.cpp" in cpu - cuda
    assert not [path for path in cpu if "cuda" in path or "triton" in path or "images" in path]
    assert not [path for path in cuda if "/cpu/" in path]


def test_a_table_is_written_and_read_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a device that is measured leaves the others' parts alone."""
    monkeypatch.setattr(measured, "ROWS", {"cpu": (2,)})
    monkeypatch.setattr(measured, "CLASSES", {"cpu": (3,)})
    monkeypatch.setattr(measured, "CELL_SECONDS", 0.0)
    path = tmp_path / "table.json"
    measured.write(path, {"cuda": DEVICES["cpu"]})
    measured.main(["--device", "cpu", "--output", str(path)])
    devices = json.loads(path.read_text())["devices"]
    assert devices["cuda"] == DEVICES["cpu"]
    assert [(cell["loss"], cell["dtype"]) for cell in devices["cpu"]["cells"]] == [
        (loss, dtype) for loss in measured.LOSSES for dtype in measured.DTYPES
    ]
    assert devices["cpu"]["sources"] == measured.fingerprint("cpu")


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(128, 10), (128, 100), (300, 3000)])
@pytest.mark.parametrize("loss", measured.LOSSES)
def test_auto_is_not_slower_than_the_reference(loss: str, shape: tuple[int, int]) -> None:
    """In the best round, 2.5 to 600 times faster than the reference: a busy machine does not spoil them all."""
    steps = {name: measured.step(loss, name, "cpu", torch.float32, shape) for name in ("reference", "auto")}
    seconds = measured.laps(steps, "cpu").seconds
    assert min(seconds["auto"]) < min(seconds["reference"])
