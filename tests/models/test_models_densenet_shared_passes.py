"""A dense block's native passes: as exact as eager torch, and the same bits on any number of threads."""

from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from ban_fast.backends import dense_eager, dense_passes
from ban_fast.backends.interface import acc_dtype

native = dense_passes._native()
pytestmark = pytest.mark.skipif(native is None, reason="ban_fast._native is not built with a dense block's passes")

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# 17 vectors and a tail, odd widths, less than a vector, a vector alone. 700 rows are eleven pieces of the narrow ones.
SIZES = [(700, 33), (700, 7), (1100, 1), (1, 33), (2, 12), (301, 279), (45, 16), (0, 5)]


class Case(NamedTuple):
    """Pixels that are the first channels of wider rows, and the vectors of a pass over them."""

    x: Tensor
    grad: Tensor
    wide_grad: Tensor
    """In acc, pitched."""
    scale: Tensor
    shift: Tensor
    mean: Tensor
    p: Tensor
    q: Tensor

    def in_float64(self) -> "Case":
        return Case(*(tensor.double() for tensor in self))


def case(rows: int, channels: int, dtype: torch.dtype, pitch: int = 0, offset: int = 0) -> Case:
    generator = torch.Generator().manual_seed(rows + channels)
    acc = acc_dtype(dtype)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def pitched(to: torch.dtype) -> Tensor:
        return normal(rows, offset + channels + pitch).to(to)[:, offset : offset + channels]

    vectors = [normal(channels).to(acc) for _ in range(5)]
    return Case(pitched(dtype) + 2 if not pitch else pitched(dtype), pitched(dtype), pitched(acc), *vectors)


def run(passes, given: Case, add: bool = True) -> Iterator[tuple[str, Tensor]]:
    """What every pass makes of it, by name. Arguments that a pass may overwrite are copies."""
    x, acc = given.x, acc_dtype(given.x.dtype)
    activation, corrected = torch.full_like(x, 7), torch.full_like(x, 7)
    passes.activate(x, given.scale, given.shift, activation)
    yield "activate", activation.clone()
    moments = torch.full((2, x.shape[1]), 7, dtype=acc)
    passes.moments(x, moments)
    yield "mean", moments[0]
    yield "sum of squared distances", moments[1]
    into = torch.empty_strided(given.wide_grad.shape, (x.shape[1] + 3, 1), dtype=acc).copy_(given.wide_grad)
    sums = torch.ones(2, x.shape[1] + 4, dtype=acc)[:, : x.shape[1]]
    passes.deposit(given.grad.clone(), activation, x, given.scale, given.mean, into, sums, add=add)
    yield "deposit", into
    yield "sum of dz", sums[0]
    yield "sum of dz times distance", sums[1]
    passes.correct(given.wide_grad, x, given.mean, given.p, given.q, corrected)
    yield "correct", corrected


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "channels"), SIZES)
@pytest.mark.parametrize("add", [False, True])
def test_against_float64(rows: int, channels: int, dtype: torch.dtype, add: bool):
    for pitch, offset in [(0, 0), (5, 3), (64, 16)]:
        given = case(rows, channels, dtype, pitch, offset)
        expected = dict(run(dense_eager, given.in_float64(), add))
        acc = acc_dtype(dtype)
        for name, got in run(native, given, add):
            # In the features' dtype: one rounding, of a value that acc has to a few. In acc: a few dozen, since it is
            # summed in pieces of 64 rows, and those in fp64.
            stored = name in ("activate", "correct")
            limit = (torch.finfo(dtype).eps if stored else 0) + 64 * torch.finfo(acc).eps
            scale = float(expected[name].abs().nan_to_num().max()) if expected[name].numel() else 0.0
            scale = max(scale, rows if name.startswith("sum") else 1.0)  # a sum that cancels keeps its terms' errors
            torch.testing.assert_close(
                got.double(),
                expected[name],
                rtol=0,
                atol=limit * scale,
                equal_nan=True,
                msg=lambda m, n=name: f"{n}: {m}",
            )


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype != torch.float64])
def test_no_further_from_float64_than_eager(dtype: torch.dtype):
    """Of many rows, where sums in one go would show: 20000 rows are 313 pieces."""
    given = case(20000, 13, dtype)
    exact, eager = dict(run(dense_eager, given.in_float64())), dict(run(dense_eager, given))
    for name, got in run(native, given):
        far, eager_far = ((value.double() - exact[name]).abs().max() for value in (got, eager[name]))
        # Twice: where both only round what they store, one ulp is as good as another.
        least = exact[name].abs().max() * torch.finfo(got.dtype).eps
        assert far <= 2 * eager_far + least, name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "channels"), [(5000, 12), (5000, 33), (1500, 216)])
def test_the_same_bits_on_any_number_of_threads(rows: int, channels: int, dtype: torch.dtype):
    given, before = case(rows, channels, dtype, 9), torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(dict(run(native, given)))
    finally:
        torch.set_num_threads(before)
    for name, alone in results[0].items():
        assert all(torch.equal(alone, other[name]) for other in results[1:]), name


def test_statistics_far_from_zero_keep_their_digits():
    """At 1e4 standard deviations squares of the values themselves would leave no digit of the variance."""
    x = (torch.randn(3000, 5, generator=torch.Generator().manual_seed(0)) + 1e4).float()
    got = torch.empty(2, 5)
    native.moments(x, got)
    mean, variance = x.double().mean(0), x.double().var(0, unbiased=False)
    torch.testing.assert_close(got[0].double(), mean, rtol=1e-7, atol=0)  # one rounding to fp32
    torch.testing.assert_close(got[1].double() / 3000, variance, rtol=1e-5, atol=0)


def test_first_rows_that_are_far_from_the_others():
    """Distances are taken from the first rows' mean: the worst that those can be."""
    x = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
    x[:4] += 1000
    got = torch.empty(2, 3)
    native.moments(x, got)
    distances = (x.double() - x.double().mean(0)).square().sum(0)
    torch.testing.assert_close(got[1].double(), distances, rtol=1e-5, atol=0)  # 16 times what a sum of 64 rounds to


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinities_are_passed_on_as_eager_does(dtype: torch.dtype):
    special = torch.tensor([[float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1.0, -1.0]]).to(dtype).repeat(3, 1)
    ones = torch.ones(7, dtype=acc_dtype(dtype))
    for passes in (dense_eager, native):
        out, sums, into = torch.empty_like(special), torch.zeros(2, 7).to(ones), torch.empty(3, 7).to(ones)
        passes.activate(special, ones, 0 * ones, out)
        assert torch.equal(out.isnan(), special.isnan()), passes
        assert torch.equal(out.nan_to_num(5), special.clamp(min=0).nan_to_num(5)), passes
        passes.deposit(torch.ones_like(out), out, torch.ones_like(special), 2 * ones, 0 * ones, into, sums, add=False)
        assert into[0].tolist() == [2, 2, 0, 0, 0, 2, 0], passes
        assert sums[0].tolist() == [3, 3, 0, 0, 0, 3, 0], passes


def test_nothing_beyond_the_channels_is_touched():
    for dtype in DTYPES:
        given = case(9, 21, dtype, 11)
        acc = acc_dtype(dtype)
        out, into = torch.full((9, 40), 3, dtype=dtype), torch.full((9, 40), 3, dtype=acc)
        native.activate(given.x, given.scale, given.shift, out[:, 4:25])
        native.deposit(
            given.grad,
            out[:, 4:25],
            given.x,
            given.scale,
            given.mean,
            into[:, 4:25],
            torch.zeros(2, 21).to(acc),
            add=True,
        )
        native.correct(given.wide_grad, given.x, given.mean, given.p, given.q, out[:, 4:25])
        for tensor in (out, into):
            assert (tensor[:, :4] == 3).all(), dtype
            assert (tensor[:, 25:] == 3).all(), dtype


def test_vectors_that_are_views():
    given = case(20, 6, torch.float32)
    spread = Case(given.x, given.grad, given.wide_grad, *(v.repeat_interleave(2)[::2] for v in given[3:]))
    assert not spread.scale.is_contiguous()
    expected = dict(run(native, given))
    for name, got in run(native, spread):
        assert torch.equal(got, expected[name]), name


def test_used_on_the_cpu_and_left_where_not_built(monkeypatch: pytest.MonkeyPatch):
    x = torch.empty(2, 3)
    assert dense_passes._passes(x) is native
    assert dense_passes._passes(x.to("meta")) is dense_eager
    monkeypatch.setattr(dense_passes, "_native", lambda: None)
    assert dense_passes._passes(x) is dense_eager
