"""The dense block's kernels compile for sm_80 and sm_90 as they are launched, without a GPU; no register is spilled.

Registers are decided by the tile, the arithmetic, the alignment and the architecture: the grid holds every tile of
dense/config.py in each arithmetic, with channels that 16 bytes divide and with the paper's odd growth.
"""

import re
from collections.abc import Callable, Iterator

import pytest
import torch
import triton_aot
import triton_dense_cases as cases
from torch import Tensor

from ban_fast.backends.dense_shape import Norm
from ban_fast.backends.triton import dense
from ban_fast.backends.triton.dense import config, passes, products, statistics
from benchmarks import dense_kernels

MOST_SHARED = 101_376
"""Bytes of shared memory that a program can have on every GPU of compute capability 8.0 or more: 8.6, 8.9, 12.0."""
FLOAT, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16
PROJECT = ["project_kernel", "finish_kernel"]
GROW = ["place_kernel", "finish_kernel"]
UNIT = [*PROJECT, "activate_kernel", *GROW]
THROUGH = ["weight_kernel", "sum_kernel", "unproject_kernel", "settle_kernel"]
REMAKE = ["finish_kernel", "project_kernel"]
UNIT_BACK = ["activate_kernel", "correct_kernel", "deposit_kernel", "settle_kernel", "correct_kernel", *THROUGH]


@pytest.fixture(autouse=True, params=["ieee"])
def precision(request: pytest.FixtureRequest) -> Iterator[str]:
    """Of fp32 products."""
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = request.param
    yield request.param
    torch.backends.cudnn.conv.fp32_precision = before


def norm(channels: int) -> Norm:
    return Norm(torch.empty(channels), torch.empty(channels), None, None, 1e-5)


def pitched(rows: int, channels: int, dtype: torch.dtype) -> Tensor:
    """The first channels of a feature buffer. Empty memory that nobody touches costs nothing."""
    return torch.empty(rows, -(-channels // 8) * 8, dtype=dtype)[:, :channels]


def launch(rows: int, channels: int, middle: int, dtype: torch.dtype) -> None:
    """Every kernel of a unit and of both exits, for `rows` pixels: `channels` read, `middle` between."""
    x, gradients, between = pitched(rows, channels, dtype), pitched(rows, channels, FLOAT), pitched(rows, middle, dtype)
    between = torch.empty(rows, middle, dtype=dtype)
    vectors, inner, total = torch.empty(2, channels), torch.empty(2, middle), torch.empty(())
    weight = torch.empty(middle, channels, 1, 1, dtype=dtype)
    grown = channels // 2
    moments = products.project(x, vectors, weight, between, measured=True)
    statistics.finish(moments, inner, None, "")
    passes.activate(between, norm(middle), inner)
    moments = passes.place(between[:, :grown], x[:, channels - grown :], measured=True)
    statistics.finish(moments, vectors, norm(channels), "")
    passes.average(x, norm(channels), vectors, rows // 64)
    passes.deposit(torch.empty(rows // 64, channels, dtype=dtype), x, norm(channels), vectors, gradients)
    passes.correct(gradients, x, vectors, vectors, total, torch.empty(rows, channels, dtype=dtype))
    passes.deposit(between, between, norm(middle), inner)
    passes.correct(between, between, inner, inner, total, between, norm(middle))
    sums = products.unproject(between, weight, x, norm(channels), vectors, gradients, add=True)
    statistics.settle(sums, norm(channels), vectors, vectors, add=True)
    products.unproject(between, weight, x, norm(channels), vectors, gradients, add=False)
    products.weight_gradient(between, x, norm(channels), vectors, weight)


def proven(capability: int, name: str, call: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Compiles what the call launches, prints what that takes, and fails on a spill. Returns the kernels' names."""
    monkeypatch.setattr(products, "multiprocessors", lambda device: 132)
    with triton_aot.compiling(capability, monkeypatch) as kernels:
        call()
    for kernel in kernels:
        registers, spilled = kernel.resources()
        print(
            f"sm_{capability} {name}: {kernel.name} {kernel.options.get('num_warps', 4)} warps, {registers} registers, "
            f"{spilled} bytes spilled, {kernel.shared} bytes shared"
        )
        assert spilled == 0, (name, capability, kernel.name, kernel.options)
        assert kernel.shared <= MOST_SHARED, (name, kernel.name, kernel.shared)
        # Triton's interpreter cuts bf16 off, which no test there can tell from a mistake.
        conversions = set(re.findall(r"cvt\.(\w+)\.(?:satfinite\.)?bf16x?2?\.f32", kernel.ptx))
        assert conversions <= {"rn"}, (name, kernel.name, conversions)
    return {kernel.name for kernel in kernels}


EVERY = {*UNIT, *UNIT_BACK, "average_kernel"}


def test_a_quick_look(monkeypatch: pytest.MonkeyPatch) -> None:
    found = proven(90, "bf16", lambda: launch(64 * 1024, 304, 320, BRAIN), monkeypatch)
    assert found == EVERY


MANY, FEW = 64 * 1024, 64 * 64
GRID = [
    (BRAIN, MANY, 304, 320),  # densenet-80-80's first block
    (HALF, MANY, 303, 132),  # the odd growth of 112-33
    (BRAIN, MANY, 168, 48),  # 100-12: a narrow product
    (BRAIN, FEW, 180, 48),  # a weight whose rows 8 bytes divide
    (HALF, MANY, 165, 33),  # and an odd one
    (BRAIN, FEW, 303, 132),
    (HALF, FEW, 304, 320),
    (FLOAT, MANY, 304, 320),
    (FLOAT, FEW, 303, 132),
]


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("precision", ["ieee", "tf32"], indirect=True)
def test_nothing_spills(capability: int, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for dtype, rows, channels, middle in GRID:
        if dtype == FLOAT or precision == "ieee":  # halves have one arithmetic
            name = f"{dtype} {precision} [{rows}, {channels}] {middle}"
            found = proven(capability, name, lambda a=(rows, channels, middle, dtype): launch(*a), monkeypatch)
            assert found == EVERY


def test_the_grid_holds_every_tile() -> None:
    tiles = set()
    for dtype, rows, _, middle in GRID:
        for how in (config.IEEE, config.TF32):
            tiles |= {config.project_tile(rows, middle, dtype, how), config.unproject_tile(rows, dtype, how)}
            tiles.add(config.weight_tile(dtype, how))
    for dtype in (FLOAT, HALF, BRAIN):
        for how in (config.IEEE, config.TF32):
            for rows in (1, 16_384, 16_385, 1 << 20):
                for channels in (1, 64, 65, 128, 1000):
                    assert config.project_tile(rows, channels, dtype, how) in tiles
                assert config.unproject_tile(rows, dtype, how) in tiles
            assert config.weight_tile(dtype, how) in tiles


@pytest.mark.slow
@pytest.mark.parametrize(("exit_width", "leave"), [(10, ["project_kernel"]), (0, ["average_kernel"])])
@pytest.mark.parametrize(("entry", "remade"), [(20, 0), (16, 1), (12, 2)])
def test_the_launches_are_those_that_are_claimed(
    entry: int, remade: int, exit_width: int, leave: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the two units backward comes to the second first, and makes again what the first ones made."""
    given = cases.block(cases.Widths(entry=entry, growth=4, exit=exit_width, batch=8, height=16, width=16))
    with triton_aot.compiling(90, monkeypatch) as kernels:
        _, saved = dense.forward(given.x, given.convs, given.norms, group="", keep=True)
        forward = [kernel.name for kernel in kernels]
        dense.backward(given.grad, saved, given.convs, given.norms, cases.everything(given), group="")
    assert forward == [*GROW, *UNIT, *UNIT, *leave]
    back = THROUGH if exit_width else ["deposit_kernel", "settle_kernel"]
    second, first = ([*(REMAKE if unit < remade else ()), *UNIT_BACK] for unit in (1, 0))
    assert [kernel.name for kernel in kernels[len(forward) :]] == [*back, *second, *first, "correct_kernel"]


def instructions(ptx: str, pattern: str) -> int:
    return len(re.findall(pattern, ptx))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["ieee", "tf32"], indirect=True)
def test_fp32_is_multiplied_as_torch_s_convolutions_are(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, out = (torch.empty(shape) for shape in ((128, 64), (64, 64), (128, 64)))
    with triton_aot.compiling(80, monkeypatch) as kernels:
        products.project(x, torch.empty(2, 64), weight[..., None, None], out, measured=False)
        products.weight_gradient(out, x, norm(64), torch.empty(2, 64), weight[..., None, None])
        products.unproject(out, weight[..., None, None], x, norm(64), torch.empty(2, 64), out, add=False)
    for kernel in kernels:
        assert (instructions(kernel.ptx, r"mma\.sync\S+\.tf32\.tf32") > 0) == (precision == "tf32"), kernel.name


def test_halves_use_tensor_cores_and_wide_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also at widths that 16 bytes do not divide: features are pitched, weights packed."""
    for width in (296, 297):
        x, out = pitched(4096, width, BRAIN), pitched(4096, 64, BRAIN)
        weight = torch.empty(64, width, 1, 1, dtype=BRAIN)
        with triton_aot.compiling(90, monkeypatch) as kernels:
            products.project(x, torch.empty(2, width), weight, out, measured=True)
        (kernel,) = kernels
        assert instructions(kernel.ptx, r"wgmma\.mma_async\S+f32\.bf16\.bf16") > 0
        copies = re.findall(r"cp\.async\.c[ag]\.shared\.global\s+\[[^]]*\], \[[^]]*\], (0x[0-9a-f]+|\d+)", kernel.ptx)
        assert {int(size, 0) for size in copies} == {16, 4}, width  # 4: of scale and shift, a thread each
        assert instructions(kernel.ptx, r"st\.global\.v4") > 0


def test_a_block_s_widths_do_not_compile_kernels_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve units' 1x1 convolutions and their gradients: two kernels each, whatever the widths."""
    with triton_aot.compiling(90, monkeypatch) as kernels:
        for unit in range(12):
            width = 24 + 12 * unit
            x, weight = pitched(4096, width, BRAIN), torch.empty(48, width, 1, 1, dtype=BRAIN)
            between, vectors = torch.empty(4096, 48, dtype=BRAIN), torch.empty(2, width)
            products.project(x, vectors, weight, between, measured=True)
            products.unproject(between, weight, x, norm(width), vectors, pitched(4096, width, FLOAT), add=True)
            products.weight_gradient(between, x, norm(width), vectors, weight)
    by_name: dict[str, set[str]] = {}
    for kernel in kernels:
        by_name.setdefault(kernel.name, set()).add(triton_aot.specialisation(kernel))
    assert {name: len(kinds) for name, kinds in by_name.items()} == {
        "project_kernel": 2,  # rows of the weight at places that 16 bytes divide, or 8
        "unproject_kernel": 2,
        "weight_kernel": 2,  # the gradient itself, or parts of it in fp32
        "sum_kernel": 1,
    }


def test_the_benchmark_launches_every_kernel_of_a_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that says 1 ms: `benchmarks.dense_kernels`, and its trial of other tiles."""
    unit = dense_kernels.Unit(4096, 168, 48, 12)
    launched = []

    def clock(call: Callable[[], object]) -> float:
        before = len(kernels)
        call()
        launched.append([kernel.name for kernel in kernels[before:]])
        return 1e-3 / len(launched)

    with triton_aot.compiling(90, monkeypatch) as kernels:
        work = dense_kernels.kernels(unit, BRAIN, "cpu")
        table = dense_kernels.table(unit, work, lambda call: 1e3 * clock(call), 1e9)
        assert {name for names in launched for name in names} == EVERY - {"average_kernel", "sum_kernel"}
        tiles = [config.Tile(64, 32, 32, 4, 2), config.Tile(32, 64, 32, 4, 2)]
        tried = dense_kernels.tuned(work["project"], "project_tile", clock, tiles)
    assert table.splitlines()[0] == "4096 pixels, 168 -> 48 -> 12 channels"
    assert "| project | 1000000.0 | 0 | 0.00 | 0.0 |" in table  # the first, after 1 s: 1.8 MB and 66 MFLOP
    assert [tile for _, tile in tried] == tiles[::-1]
    assert [kernel.options["CHANNELS"] for kernel in kernels[-2:]] == [32, 64]


def test_the_benchmark_s_units_are_the_networks() -> None:
    found = dense_kernels.units("densenet-80-80", 128)
    assert [unit.pixels for unit in found] == [131_072, 32_768, 8_192]
    assert {(unit.middle, unit.growth) for unit in found} == {(320, 80)}
    assert found[0].channels == 160 + 80 * 6
