"""`python -m benchmarks.dense_kernels`: every kernel of a dense unit alone on a GPU, beside its bytes and FLOPs.

For the middle unit of each of a network's blocks: microseconds in a CUDA graph, with inputs that the L2 cache may still
hold, GB/s, TFLOP/s, and the part of an in-run copy's bandwidth. --tune adds what other tiles of the products take: the
fastest belongs into backends/triton/dense/config.py. No GPU has run it yet.
"""

import argparse
from collections.abc import Callable
from typing import NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

from ban_fast import models
from ban_fast.backends.dense_shape import Norm
from ban_fast.backends.triton.dense import config, passes, products, statistics
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
"""What --tune tries."""
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
    """Every kernel of a unit. Bytes are of maps alone: each read and written once."""
    rows, wide, middle, growth = unit

    def maps(channels: int, kind: torch.dtype = dtype) -> Tensor:
        pitch = -(-channels // 8) * 8
        return torch.zeros(rows, pitch, dtype=kind, device=device)[:, :channels]

    def norm(channels: int) -> Norm:
        ones = torch.ones(channels, device=device)
        return Norm(ones, ones, None, None, 1e-5)

    x, gradients, between = maps(wide), maps(wide, torch.float32), torch.zeros(rows, middle, dtype=dtype, device=device)
    grown, total = torch.zeros(rows, growth, dtype=dtype, device=device), torch.ones((), device=device)
    vectors, inner = (torch.ones(2, channels, device=device) for channels in (wide, middle))
    weight = torch.zeros(middle, wide, 1, 1, dtype=dtype, device=device)
    outer_norm, inner_norm, flops = norm(wide), norm(middle), 2 * rows * wide * middle
    moments = products.project(x, vectors, weight, between, measured=True)
    sums = products.unproject(between, weight, x, outer_norm, vectors, gradients, add=True)
    last = slice(wide - growth, wide)
    size = x.element_size()
    pixel = rows * size
    return {
        "project": Work(
            lambda: products.project(x, vectors, weight, between, measured=True), pixel * (wide + middle), flops
        ),
        "finish": Work(lambda: statistics.finish(moments, inner, None, ""), 0),
        "activate": Work(lambda: passes.activate(between, inner_norm, inner), 2 * pixel * middle),
        "place": Work(lambda: passes.place(grown, x[:, last], measured=True), 2 * pixel * growth),
        "correct": Work(
            lambda: passes.correct(gradients[:, last], x[:, last], vectors[:, last], vectors[:, last], total, grown),
            rows * growth * (4 + 2 * size),
        ),
        "deposit": Work(lambda: passes.deposit(between, between, inner_norm, inner), 2 * pixel * middle),
        "correct between": Work(
            lambda: passes.correct(between, between, inner, inner, total, between, inner_norm), 3 * pixel * middle
        ),
        "weight gradient": Work(
            lambda: products.weight_gradient(between, x, outer_norm, vectors, weight), pixel * (wide + middle), flops
        ),
        "unproject": Work(
            lambda: products.unproject(between, weight, x, outer_norm, vectors, gradients, add=True),
            pixel * (wide + middle) + 8 * rows * wide,
            flops,
        ),
        "settle": Work(lambda: statistics.settle(sums, outer_norm, vectors, vectors, add=True), 0),
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
    """Seconds by tile, the fastest first; tiles for which a program has no room are left out."""
    from triton.runtime.errors import OutOfResources

    found = []
    for tile in tiles:
        with patch.object(config, chooser, lambda *_, tile=tile: tile):
            try:
                found.append((clock(work.call), tile))
            except OutOfResources:
                continue
    return sorted(found)


def graph_clock(call: Callable[[], object]) -> float:
    from triton.testing import do_bench_cudagraph

    return float(do_bench_cudagraph(call)) / 1e3


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.dense_kernels", description=__doc__)
    parser.add_argument("--network", action="append", choices=NETWORKS, help="default: all of them")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--fp32", action="store_true", help="in place of bf16")
    parser.add_argument("--tune", action="store_true", help="try other tiles of the products")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("it needs a CUDA device")
    source = torch.empty(1 << 28, device="cuda")
    copy = 2 * source.nbytes / graph_clock(source.clone)
    del source
    for network in options.network or NETWORKS:
        print(f"## {network}, batch {options.batch}\n")
        for unit in units(network, options.batch):
            work = kernels(unit, torch.float32 if options.fp32 else torch.bfloat16, "cuda")
            print(f"{table(unit, work, graph_clock, copy)}\n", flush=True)
            for name, chooser in CHOOSERS.items() if options.tune else ():
                for seconds, tile in tuned(work[name], chooser, graph_clock, TILES)[:3]:
                    print(f"{name}: {seconds * 1e6:.1f} us with {tile}", flush=True)
                print()


if __name__ == "__main__":
    main()
