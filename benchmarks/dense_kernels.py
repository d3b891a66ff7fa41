"""`python -m benchmarks.dense_kernels`: every kernel of a dense unit alone on a GPU, beside its bytes and FLOPs.

For the middle unit of each of a network's blocks: microseconds in a CUDA graph, with inputs that the L2 cache may still
hold, GB/s, TFLOP/s, and the part of an in-run copy's bandwidth. --tune adds what other tiles of the products take, for
--minutes, those near the present ones first: the fastest belongs into backends/triton/dense/config.py. --json keeps
what was found so far. No GPU has run it yet.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

from ban_fast import models
from ban_fast.backends.dense_shape import Norm
from ban_fast.backends.triton.dense import config, passes, products, statistics
from benchmarks import cuda, machine
from benchmarks.densenet import NETWORKS

Clock = Callable[[Callable[[], object]], float]
"""Seconds that a call takes on the GPU."""
TILES = [
    config.Tile(rows, channels, depth, warps, stages)
    for rows, channels in ((32, 64), (64, 32), (64, 64), (64, 128), (128, 32), (128, 64), (128, 128), (256, 64))
    for depth in (32, 64)
    for warps in (4, 8)
    for stages in (2, 3, 4)
]
"""What --tune tries, of each product of each unit: 3456 in all, of which ten minutes have time for some hundreds."""
CHOOSERS = {"project": "project_tile", "unproject": "unproject_tile", "weight gradient": "weight_tile"}
"""The products, and the functions of config.py that choose their tiles."""


class Work(NamedTuple):
    """A call, the bytes that it has to move and the FLOPs that it has to make."""

    call: Callable[[], object]
    bytes: int
    flops: int = 0


class Unit(NamedTuple):
    """The middle unit of a block: what it reads, makes between, and grows, of so many pixels."""

    pixels: int
    channels: int
    middle: int
    growth: int

    def __str__(self) -> str:
        return f"{self.pixels} pixels, {self.channels} -> {self.middle} -> {self.growth} channels"


def units(network: str, batch: int) -> list[Unit]:
    """Of 32x32 images."""
    with torch.device("meta"):
        blocks = models.create(network).blocks
    found = []
    for number, block in enumerate(blocks):
        unit = block[len(block) // 2]
        middle, growth = unit.grow.conv.in_channels, unit.grow.conv.out_channels
        found.append(Unit(batch * (32 >> number) ** 2, unit.reduce.conv.in_channels, middle, growth))
    return found


def kernels(unit: Unit, dtype: torch.dtype, device: str) -> dict[str, Work]:
    """Every kernel of a unit. Bytes are of maps alone: each read and written once.

    Values are random: a GPU that its power limits multiplies zeros faster. What a kernel writes no other reads,
    but for the gradients that `unproject` adds to.
    """
    rows, wide, middle, growth = unit
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, dtype=kind, device=device, generator=generator)

    def maps(channels: int, kind: torch.dtype = dtype) -> Tensor:
        pitch = -(-channels // 8) * 8
        return normal(rows, pitch, kind=kind)[:, :channels]

    def vectors_of(channels: int) -> Tensor:
        """[2, channels]: about 0 and about 1, as means and variances are, or shifts and scales."""
        return torch.stack([0.1 * normal(channels, kind=torch.float32), 1 + 0.1 * normal(channels, kind=torch.float32)])

    def norm(channels: int) -> Norm:
        bias, weight = vectors_of(channels)
        return Norm(weight, bias, None, None, 1e-5)

    x, gradients, between = maps(wide), maps(wide, torch.float32), normal(rows, middle)
    given, made, grown = normal(rows, middle), normal(rows, middle), normal(rows, growth)
    placed, corrected = maps(growth), normal(rows, growth)
    total = torch.full((), float(rows), device=device)
    vectors, inner = vectors_of(wide), vectors_of(middle)
    affine, terms, inner_terms = vectors.flip(0), vectors_of(wide), vectors_of(middle)
    weight = normal(middle, wide, 1, 1) / wide**0.5
    outer_norm, inner_norm, flops = norm(wide), norm(middle), 2 * rows * wide * middle
    moments = products.project(x, affine, weight, made, measured=True)
    sums = products.unproject(between, weight, x, outer_norm, vectors, gradients, add=True)
    last = slice(wide - growth, wide)
    size = x.element_size()
    pixel = rows * size
    return {
        "project": Work(
            lambda: products.project(x, affine, weight, made, measured=True), pixel * (wide + middle), flops
        ),
        "finish": Work(lambda: statistics.finish(moments, torch.empty_like(inner), None, ""), 0),
        "activate": Work(lambda: passes.activate(between, inner_norm, inner), 2 * pixel * middle),
        "place": Work(lambda: passes.place(grown, placed, measured=True), 2 * pixel * growth),
        "correct": Work(
            lambda: passes.correct(gradients[:, last], x[:, last], vectors[:, last], terms[:, last], total, corrected),
            rows * growth * (4 + 2 * size),
        ),
        "deposit": Work(lambda: passes.deposit(given, between, inner_norm, inner), 2 * pixel * middle),
        "correct between": Work(
            lambda: passes.correct(given, between, inner, inner_terms, total, made, inner_norm), 3 * pixel * middle
        ),
        "weight gradient": Work(
            lambda: products.weight_gradient(between, x, outer_norm, vectors, weight), pixel * (wide + middle), flops
        ),
        "unproject": Work(
            lambda: products.unproject(between, weight, x, outer_norm, vectors, gradients, add=True),
            pixel * (wide + middle) + 8 * rows * wide,
            flops,
        ),
        "settle": Work(lambda: statistics.settle(sums, outer_norm, vectors, terms, add=False), 0),
    }


def table(unit: Unit, work: dict[str, Work], clock: Clock, copy: float) -> str:
    """Markdown: a kernel a line. `copy`: bytes a second, reads and writes together."""
    lines = [f"{unit}\n", "| kernel | us | GB/s | of a copy | TFLOP/s |", "|---|---:|---:|---:|---:|"]
    for name, (call, moved, flops) in work.items():
        seconds = clock(call)
        rate = moved / seconds
        cells = [f"{seconds * 1e6:.1f}", f"{rate / 1e9:.0f}", f"{rate / copy:.2f}", f"{flops / seconds / 1e12:.1f}"]
        lines.append("| " + " | ".join([name, *(cells if moved else [cells[0], "", "", ""])]) + " |")
    return "\n".join(lines)


def tuned(work: Work, chooser: str, clock: Clock, tiles: list[config.Tile]) -> list[tuple[float, config.Tile]]:
    """Seconds by tile, the fastest first; tiles that a program has no room for, or no compiler makes, are left out.

    cuda.Lost where one leaves a device that nothing runs on.
    """
    found = []
    for tile in tiles:
        with patch.object(config, chooser, lambda *_, tile=tile: tile):
            try:
                found.append((clock(work.call), tile))
            except Exception as error:
                if not cuda.usable():
                    raise cuda.Lost(f"{tile}: {error}") from error
    return sorted(found)


def present(work: Work, chooser: str) -> config.Tile:
    """The tile that a product has now."""
    choose, seen = getattr(config, chooser), []
    with patch.object(config, chooser, lambda *given: seen.append(choose(*given)) or seen[-1]):
        work.call()
    found: config.Tile = seen[-1]
    return found


def nearest(tile: config.Tile, tiles: list[config.Tile]) -> list[config.Tile]:
    """That one, then the others by how many halvings and doublings they are away."""

    def distance(other: config.Tile) -> float:
        return sum(abs(math.log2(one / two)) for one, two in zip(tile, other, strict=True))

    return [tile, *sorted((other for other in tiles if other != tile), key=distance)]


def tune(
    places: dict[str, dict[str, Work]],
    clock: Clock,
    ends: float,
    found: dict[str, list[Any]],
    save: Callable[[], None],
) -> bool:
    """Into `found`, seconds of each product's tiles, the fastest first: of every product of every place the nearest to
    its present one, then the next; a tile is compiled once for all places. False where `ends` came first."""
    works = {
        f"{place}: {name}": (work[name], chooser)
        for place, work in places.items()
        for name, chooser in CHOOSERS.items()
    }
    orders = {name: nearest(present(*each), TILES) for name, each in works.items()}
    for rank in range(max(map(len, orders.values()))):
        for name, (work, chooser) in works.items():
            if time.monotonic() > ends:
                return False
            found[name] = sorted([*found.get(name, []), *tuned(work, chooser, clock, orders[name][rank : rank + 1])])
        save()
    return True


def graph_clock(call: Callable[[], object]) -> float:
    from triton.testing import do_bench_cudagraph

    return float(do_bench_cudagraph(call)) / 1e3


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.dense_kernels", description=__doc__)
    parser.add_argument("--network", action="append", choices=NETWORKS, help="default: all of them")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--fp32", action="store_true", help="in place of bf16")
    parser.add_argument("--tune", action="store_true", help="try other tiles of the products")
    parser.add_argument("--minutes", type=float, default=8.0, help="end --tune by then")
    parser.add_argument("--json", type=Path, help="keep what --tune has found so far there")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("it needs a CUDA device")
    ends = time.monotonic() + 60 * options.minutes
    source = torch.empty(1 << 28, device="cuda")
    copy = 2 * source.nbytes / graph_clock(source.clone)
    del source
    places: dict[str, dict[str, Work]] = {}
    for network in options.network or NETWORKS:
        print(f"## {network}, batch {options.batch}\n")
        for unit in units(network, options.batch):
            work = kernels(unit, torch.float32 if options.fp32 else torch.bfloat16, "cuda")
            print(f"{table(unit, work, graph_clock, copy)}\n", flush=True)
            if options.tune:
                places[f"{network}, {unit}"] = work
    if not options.tune:
        return
    found: dict[str, list[Any]] = {}
    described = machine.describe("cuda")

    def save() -> None:
        if options.json is not None:
            tiles = {name: [[seconds, list(tile)] for seconds, tile in each] for name, each in found.items()}
            machine.write(options.json, json.dumps(described | {"tiles": tiles}, indent=1) + "\n")

    done = tune(places, graph_clock, ends, found, save)
    save()
    for name, each in found.items():
        for seconds, tile in each[:3]:
            print(f"{name}: {seconds * 1e6:.1f} us with {tile}", flush=True)
    if not done:
        tried = sum(map(len, found.values()))
        print(f"{tried} of {len(found) * (len(TILES) + 1)} tried in {options.minutes:.3g} minutes")


if __name__ == "__main__":
    main()
