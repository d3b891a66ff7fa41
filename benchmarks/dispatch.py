"""`python -m benchmarks.dispatch`: measures which backend serves which shape fastest, and writes `table.json` anew.

Every backend that this machine can run computes every loss, forward and backward through its public module, over a grid
of rows, classes and dtypes; the other devices' tables stay as they are. Under three minutes on two cores.
"""

import argparse
import hashlib
import json
import math
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ban_fast.backends import dispatch, table
from ban_fast.errors import first_line
from ban_fast.losses import CWTMLoss, DKPPLoss, KDLoss
from benchmarks import cuda, machine
from benchmarks.harness import Lap, calls_for, interleave, lap_of, quantiles, rounds_for

ROOT = Path(__file__).resolve().parent.parent
COMMAND = "python -m benchmarks.dispatch"

LOSSES = ("kd", "cwtm", "dkpp")
DTYPES = ("float32", "float64", "float16", "bfloat16")
Shape = tuple[int, int]
# Few rows to a large batch, ten classes to a vocabulary: a call is served as the nearest of these is.
ROWS = {"cpu": (16, 128, 1024), "cuda": (16, 128, 1024, 8192)}
CLASSES = {"cpu": (10, 100, 1000, 10000, 100000), "cuda": (10, 100, 1000, 10000, 131072)}
# The reference's DKPP takes 4 s of a CPU at [1024, 10000], and 20 GB of a GPU at [1024, 131072].
MOST_ELEMENTS = {"cpu": 1024 * 10000, "cuda": 1024 * 131072}

CELL_SECONDS = 0.1
"""For the rounds of a cell; harness.ROUNDS says how many at least."""
REPEATS = 5
"""Of those rounds, at most: as long as they don't agree."""
CLEAR = 4.0
"""A reference that is slower by this factor, and slow, is not called again."""

NOT_OF_LOSSES = {"images"}
"""Native sources that no loss is computed by."""

Cell = dict[str, Any]


@dataclass(frozen=True)
class Laps:
    """Seconds a call of every backend, round by round, in turn."""

    seconds: dict[str, list[float]]

    def reference_over(self, backend: str) -> list[float]:
        """The reference's time over this one's in the same round: what four rounds of five reach, and the median."""
        ratios = self._ratios(backend)
        return [ratios[len(ratios) // 5], quantiles(ratios)[1]]

    def decided(self) -> bool:
        """Whether every backend was faster than the reference, or slower, in four rounds of five."""
        found = [self._ratios(name) for name in self.seconds if name != "reference"]
        return all(ratios[len(ratios) // 5] > 1 or ratios[-1 - len(ratios) // 5] < 1 for ratios in found)

    def _ratios(self, backend: str) -> list[float]:
        pairs = zip(self.seconds["reference"], self.seconds[backend], strict=True)
        return sorted(reference / other for reference, other in pairs)

    def to_dict(self) -> Cell:
        others = [name for name in self.seconds if name != "reference"]
        return {
            "ms": {name: _rounded(1e3 * quantiles(laps)[1]) for name, laps in self.seconds.items()},
            "reference_over": {name: [_rounded(ratio) for ratio in self.reference_over(name)] for name in others},
        }


def fastest(cell: Cell) -> str:
    """The least median among the backends that beat the reference in four rounds of five; where none does, that."""
    faster = [name for name, (low, _) in cell["reference_over"].items() if low > 1]
    return min(faster, key=lambda name: float(cell["ms"][name]), default="reference")


def grid(device: str) -> Iterator[tuple[str, str, Shape]]:
    """Every (loss, dtype, (rows, classes)) that is measured on "cpu" or "cuda"."""
    for loss in LOSSES:
        for dtype in DTYPES:
            for rows in ROWS[device]:
                for classes in CLASSES[device]:
                    if rows * classes <= MOST_ELEMENTS[device]:
                        yield loss, dtype, (rows, classes)


def measure(device: str) -> dict[str, Any]:
    """A device's part of the table."""
    names = [name for name, problem in dispatch.available(device).items() if problem is None]
    if device == "cpu" and "triton" in names:
        names.remove("triton")  # interpreted
    if names == ["reference"]:
        raise SystemExit(f"nothing to choose among on {device!r}: {dispatch.available(device)}")
    described = machine.describe(device)
    found = {place: measure_cell(place, names, device) for place in grid(device)}
    for place, (_, decided) in found.items():
        if not decided:  # something else was running then
            found[place] = measure_cell(place, names, device)
    undecided = [f"{loss} {dtype} {list(shape)}" for (loss, dtype, shape), (_, decided) in found.items() if not decided]
    if undecided:
        print(f"left to the reference, since rounds did not agree: {', '.join(undecided)}", file=sys.stderr)
    return {
        "machine": machine.name(described),
        "versions": described["versions"],
        "commit": described["source"]["commit"],
        "modified": described["source"]["dirty"],
        "date": described["date"],
        "load_at_start": described["load_at_start"],
        "sources": fingerprint(device),
        "cells": [cell for cell, _ in found.values()],
    }


def measure_cell(place: tuple[str, str, Shape], names: Sequence[str], device: str) -> tuple[Cell, bool]:
    """A cell of the table, and whether its rounds agreed on who is faster."""
    loss, dtype, shape = place
    measured = laps({name: step(loss, name, device, getattr(torch, dtype), shape) for name in names}, device)
    cell: Cell = {"loss": loss, "dtype": dtype, "rows": shape[0], "classes": shape[1], **measured.to_dict()}
    return cell | {"backend": fastest(cell)}, measured.decided()


def step(loss: str, backend: str, device: str, dtype: torch.dtype, shape: Shape) -> Callable[[], object]:
    """Forward and backward of a loss at random logits."""
    generator = torch.Generator(device).manual_seed(0)
    student, teacher = (
        (2 * torch.randn(shape, generator=generator, device=device)).to(dtype).requires_grad_(leaf)
        for leaf in (True, False)
    )
    labels = torch.randint(shape[1], shape[:1], generator=generator, device=device)
    number = torch.zeros((), dtype=torch.int64, device=device) if device == "cuda" else 0
    kd, cwtm, dkpp = KDLoss(backend=backend), CWTMLoss(backend=backend), DKPPLoss(backend=backend)
    forward: dict[str, Callable[[], torch.Tensor]] = {
        "kd": lambda: kd(student, teacher),
        "cwtm": lambda: cwtm(student, teacher, labels),
        "dkpp": lambda: dkpp(student, teacher, step=number),
    }
    return lambda: torch.autograd.grad(forward[loss](), student)


def laps(steps: dict[str, Callable[[], object]], device: str) -> Laps:
    """Laps of the backends in turn, or one each where the reference is slower beyond doubt.

    Without those that fail, which is said; where the reference does, its error.
    """
    calls = {name: cuda.synchronized(call) if device == "cuda" else call for name, call in steps.items()}
    first: dict[str, float] = {}  # of others than the reference it may compile
    second: dict[str, float] = {}
    for name, call in calls.items():
        try:
            first[name] = _seconds(call)
            if name != "reference":
                second[name] = _seconds(call)
        except Exception as error:  # as where memory ends
            _leave_out(name, error)
            first.pop(name, None)
    if first["reference"] > max(CELL_SECONDS, CLEAR * max(second.values(), default=math.inf)):
        return Laps({name: [seconds] for name, seconds in (first | second).items()})
    second["reference"] = _seconds(calls["reference"])
    turns = {name: _lap(steps[name], second[name], device) for name in first}
    rounds = rounds_for(sum(calls_for(seconds) * seconds for seconds in second.values()), CELL_SECONDS)
    found = Laps({name: [] for name in first})
    for _ in range(REPEATS):
        times, failures = interleave(turns, rounds)
        for name, error in failures.items():
            _leave_out(name, error)
            del turns[name], found.seconds[name]
        for name, more in times.items():
            found.seconds[name].extend(more)
        if found.decided():
            break
    return found


def _leave_out(backend: str, error: Exception) -> None:
    """Say that a backend failed, and so is not chosen. Without the reference nothing can be judged."""
    if backend == "reference":
        raise error
    print(f"{backend} is left out of a cell: {first_line(error)}", file=sys.stderr)


def _lap(call: Callable[[], object], seconds: float, device: str) -> Lap:
    """A lap of calls that take so long, waited for on a GPU once."""
    count = calls_for(seconds)
    if device == "cpu":
        return lap_of(call, count)
    lap = lap_of(cuda.synchronized(call, count), 1)
    return lambda: lap() / count


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _rounded(number: float) -> float:
    return float(f"{number:.4g}")


def fingerprint(device: str) -> str:
    """A hash of the sources that a device's losses are computed by; comments and layout don't count."""
    digest = hashlib.sha256()
    for path in sources(device):
        comments = r"#.*" if path.suffix in (".py", ".txt") else r"//.*|/\*[\s\S]*?\*/"
        digest.update(path.name.encode())
        digest.update(b"".join(re.sub(comments, "", path.read_text()).encode().split()))
    return digest.hexdigest()[:16]


def sources(device: str) -> list[Path]:
    """Those files: the kernels, what they are compiled with, and the backends that call them."""
    patterns = ["CMakeLists.txt", "csrc/*.h", f"csrc/{device}/*"]
    patterns += [f"ban_fast/backends/{name}.py" for name in ("reference*", "permutation", "addresses")]
    if device == "cpu":
        patterns += ["csrc/python/*", "ban_fast/backends/native.py"]  # usual.cpp serves the usual KD below 1 MiB
    else:
        patterns += ["ban_fast/backends/native_cuda.py", "ban_fast/backends/triton/*.py"]
    found = (path for pattern in patterns for path in ROOT.glob(pattern))
    return sorted(path for path in found if path.is_file() and path.stem not in NOT_OF_LOSSES)


def write(path: Path, devices: dict[str, Any]) -> None:
    """The table, a line a cell."""
    parts = []
    for device, part in sorted(devices.items()):
        facts = "".join(f"   {json.dumps(key)}: {json.dumps(part[key])},\n" for key in part if key != "cells")
        cells = ",\n".join(f"    {json.dumps(cell)}" for cell in part["cells"])
        parts.append(f'  "{device}": {{\n{facts}   "cells": [\n{cells}\n   ]\n  }}')
    about = json.dumps(f"written by `{COMMAND}`; a device that is not here has never been measured")
    path.write_text(f'{{\n "about": {about},\n "devices": {{\n' + ",\n".join(parts) + "\n }\n}\n")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    parser.add_argument("--device", choices=list(ROWS), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=table.FILE, help="the table to bring up to date")
    options = parser.parse_args(arguments)
    devices = json.loads(options.output.read_text())["devices"] if options.output.exists() else {}
    start = time.monotonic()
    part = measure(options.device)
    write(options.output, devices | {options.device: part})
    count = {name: sum(cell["backend"] == name for cell in part["cells"]) for name in dispatch.BACKENDS}
    won = ", ".join(f"{name} {number}" for name, number in count.items() if number)
    print(f"{options.device}: {len(part['cells'])} cells in {time.monotonic() - start:.0f} s: {won}; {options.output}")
    if part["load_at_start"] > machine.BUSY:
        print(f"the machine was busy (load {part['load_at_start']:.1f}): measure again on a quiet one", file=sys.stderr)


if __name__ == "__main__":
    main()
