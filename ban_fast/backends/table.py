"""What backend="auto" follows: the times in `table.json`, written by `python -m benchmarks.dispatch` and by no hand."""

import json
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

FILE = Path(__file__).with_name("table.json")

SizeClass = tuple[int, int]
"""Bits of the number of rows and of classes: all from 64 to 127 classes are served alike."""


@dataclass(frozen=True)
class Table:
    """The fastest backend of every cell measured on one type of device."""

    machine: str
    date: str
    fastest: dict[tuple[str, str], dict[tuple[int, int], str]]
    """(loss, dtype) -> (rows, classes) -> backend."""

    def backend(self, loss: str, dtype: torch.dtype, size: SizeClass) -> str:
        """That of the measured shape nearest to the size class, by the logarithms of rows and classes."""
        cells = self.fastest[loss, str(dtype).removeprefix("torch.")]
        return cells[min(cells, key=lambda shape: _distance(shape, size))]


@cache
def measured(device_type: str) -> Table | None:
    """The table of a type of device, or None where none has been measured."""
    device: dict[str, Any] | None = json.loads(FILE.read_text())["devices"].get(device_type)
    if device is None:
        return None
    fastest: dict[tuple[str, str], dict[tuple[int, int], str]] = {}
    for cell in device["cells"]:
        fastest.setdefault((cell["loss"], cell["dtype"]), {})[cell["rows"], cell["classes"]] = cell["backend"]
    return Table(device["machine"], device["date"], fastest)


def _distance(shape: tuple[int, int], size: SizeClass) -> float:
    """Between a shape and a size class's middle, in octaves."""
    return sum(abs(math.log2(number) - (bits - 0.5)) for number, bits in zip(shape, size, strict=True))
