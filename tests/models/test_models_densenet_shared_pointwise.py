"""A dense block's 1x1 convolutions of normalised rows in native code, against its passes one by one in float64."""

from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from ban_fast.backends import dense_block, dense_eager, dense_passes
from ban_fast.backends.dense_interface import Need
from ban_fast.backends.dense_shape import Norm

native = dense_passes._native()
pytestmark = pytest.mark.skipif(
    native is None or not native.multiplies(torch.float32, 1), reason="ban_fast._native was not built, or has no fma"
)

DTYPES = (torch.float32, torch.float64)
# Rows: of one block and of some with a rest, of one piece and of several, none. Channels and outputs: less than a
# vector, three panels and a rest, the paper's 33 and 132, one alone.
SIZES = [
    (64, 24, 48),
    (700, 33, 132),
    (1, 5, 3),
    (63, 1, 1),
    (1000, 150, 75),
    (260, 100, 16),
    (129, 17, 200),
    (0, 7, 4),
]


class Case(NamedTuple):
    """Rows that are the first channels of wider ones."""

    x: Tensor
    grad: Tensor
    into: Tensor
    scale: Tensor
    shift: Tensor
    mean: Tensor
    weight: Tensor

    def in_float64(self) -> "Case":
        return Case(*(tensor.double() for tensor in self))


def case(rows: int, channels: int, outputs: int, dtype: torch.dtype) -> Case:
    generator = torch.Generator().manual_seed(rows + channels + outputs)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    vectors = [normal(channels) for _ in range(3)]
    pitched = normal(rows, channels + 5)[:, 2 : channels + 2], normal(rows, outputs + 3)[:, :outputs]
    return Case(*pitched, normal(rows, channels + 1)[:, :channels], *vectors, normal(outputs, channels))


def fused(given: Case, *, add: bool = True, weight: bool = True) -> Iterator[tuple[str, Tensor]]:
    rows, channels = given.x.shape
    outputs = len(given.weight)
    out = torch.full((rows, outputs + 2), 7, dtype=given.x.dtype)
    dense_passes.pointwise(given.x, given.scale, given.shift, given.weight, out[:, :outputs])
    assert (out[:, outputs:] == 7).all()
    yield "out", out[:, :outputs]
    into = torch.full((rows, channels + 3), 7, dtype=given.x.dtype)
    into[:, :channels] = given.into
    sums = torch.ones(2, channels + 4, dtype=given.x.dtype)[:, :channels]
    weight_grad = torch.ones(given.weight.shape, dtype=given.x.dtype) if weight else None
    vectors = given.scale, given.shift, given.mean, given.weight
    dense_passes.pointwise_backward(given.grad, given.x, *vectors, into[:, :channels], sums, weight_grad, add=add)
    assert (into[:, channels:] == 7).all()
    yield "into", into[:, :channels]
    yield "sum of dz", sums[0]
    yield "sum of dz times distance", sums[1]
    if weight_grad is not None:
        yield "gradient of the weight", weight_grad


def one_by_one(given: Case, *, add: bool = True, weight: bool = True) -> Iterator[tuple[str, Tensor]]:
    activation = torch.empty_like(given.x, memory_format=torch.contiguous_format)
    dense_eager.activate(given.x, given.scale, given.shift, activation)
    yield "out", activation @ given.weight.t()
    weight_grad = 1 + given.grad.t() @ activation
    into, sums = given.into.clone(), torch.ones(2, given.x.shape[1], dtype=given.x.dtype)
    grad = given.grad @ given.weight
    dense_eager.deposit(grad, activation, given.x, given.scale, given.mean, into, sums, add=add)
    yield "into", into
    yield "sum of dz", sums[0]
    yield "sum of dz times distance", sums[1]
    if weight:
        yield "gradient of the weight", weight_grad


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "channels", "outputs"), SIZES)
@pytest.mark.parametrize("add", [False, True])
def test_against_float64(rows: int, channels: int, outputs: int, dtype: torch.dtype, add: bool):
    given = case(rows, channels, outputs, dtype)
    expected = dict(one_by_one(given.in_float64(), add=add))
    for name, got in fused(given, add=add):
        exact = expected.pop(name)
        scale = max(float(exact.abs().max()), 1.0) if exact.numel() else 1.0
        if name.startswith("sum"):  # one that cancels keeps its terms' errors
            scale = max(scale, rows * outputs**0.5)
        # Sums of up to 200 terms, one after the other: an ulp for each is never reached.
        torch.testing.assert_close(
            got.double(), exact, rtol=0, atol=64 * torch.finfo(dtype).eps * scale, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert not expected


def test_no_further_from_float64_than_a_librarys_products():
    """Of many rows, where sums in one go would show: 20000 rows are 64 pieces."""
    given = case(20000, 60, 48, torch.float32)
    exact, eager = dict(one_by_one(given.in_float64())), dict(one_by_one(given))
    for name, got in fused(given):
        far, eager_far = ((value.double() - exact[name]).norm() for value in (got, eager[name]))
        assert far <= 1.5 * eager_far, name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "channels", "outputs"), [(5000, 33, 132), (3000, 150, 48)])
def test_the_same_bits_on_any_number_of_threads(rows: int, channels: int, outputs: int, dtype: torch.dtype):
    given, before = case(rows, channels, outputs, dtype), torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(dict(fused(given)))
    finally:
        torch.set_num_threads(before)
    for name, alone in results[0].items():
        assert all(torch.equal(alone, other[name]) for other in results[1:]), name


def test_weights_whose_gradients_leave_room_for_few_pieces():
    """Pieces of 1.6 million weights are 10 at most, not 64."""
    given = case(3000, 1300, 1290, torch.float32)
    expected = dict(one_by_one(given.in_float64()))
    for name, got in fused(given):
        scale = float(expected[name].abs().max()) * (given.x.shape[0] if name.startswith("sum") else 1)
        torch.testing.assert_close(got.double(), expected[name], rtol=0, atol=1e-5 * scale)


def test_a_frozen_weight_has_no_gradient_and_changes_nothing_else():
    given = case(300, 40, 20, torch.float32)
    with_weight, without = dict(fused(given)), dict(fused(given, weight=False))
    with_weight.pop("gradient of the weight")
    assert with_weight.keys() == without.keys()
    for name, got in without.items():
        assert torch.equal(got, with_weight[name]), name


def test_a_nan_reaches_what_depends_on_it_alone():
    given = case(70, 20, 9, torch.float32)
    given.x[3, 4] = float("nan")
    got = dict(fused(given))
    assert got["out"][3].isnan().all()
    assert not got["out"][torch.arange(70) != 3].isnan().any()
    assert got["sum of dz"].isfinite().all()  # what a NaN let through is the gradient itself
    assert got["sum of dz times distance"].isnan().tolist() == [i == 4 for i in range(20)]
    assert got["gradient of the weight"].isnan().any(0).tolist() == [i == 4 for i in range(20)]


def test_views_of_vectors_and_weights():
    given = case(40, 6, 5, torch.float32)
    spread = given._replace(
        **{name: getattr(given, name).repeat_interleave(2)[::2] for name in ("scale", "shift", "mean")},
        weight=given.weight.t().contiguous().t(),
    )
    assert not spread.weight.is_contiguous()
    expected = dict(fused(given))
    for name, got in fused(spread):
        assert torch.equal(got, expected[name]), name


def test_only_where_native_code_multiplies(monkeypatch: pytest.MonkeyPatch):
    assert [dense_passes.multiplies(torch.empty(2, 3, dtype=dtype), 6) for dtype in DTYPES] == [True, True]
    assert not dense_passes.multiplies(torch.empty(2, 3), 10**6)
    assert not dense_passes.multiplies(torch.empty(2, 3, dtype=torch.bfloat16), 6)
    assert not dense_passes.multiplies(torch.empty(2, 3, device="meta"), 6)
    monkeypatch.setattr(dense_passes, "_native", lambda: None)
    assert not dense_passes.multiplies(torch.empty(2, 3), 6)


@pytest.mark.parametrize(
    "weight",
    [torch.zeros(16, 8, 1, 1), torch.zeros(16, 20, 1, 1), torch.zeros(16, 12, 1), torch.zeros(16, 12, 1, 1).double()],
    ids=["narrow", "wide", "three dimensions", "another dtype"],
)
def test_weights_that_do_not_fit_are_refused(weight: Tensor):
    """As conv2d does: native code would read and write beyond them."""
    norms = [Norm(torch.ones(12), torch.zeros(12), None, None, 1e-5)]
    with pytest.raises(RuntimeError, match=r"(?i)expected|should be the same"):
        dense_block.forward(torch.randn(2, 12, 4, 4), [weight], norms, group="", keep=True)


def test_weights_that_are_views():
    """A weight of any strides gives what its copy does."""
    x, wide = torch.randn(3, 12, 4, 4), torch.randn(12, 32, 1, 1)
    norms = [Norm(torch.ones(12), torch.zeros(12), None, None, 1e-5)]
    for weight in (
        wide.transpose(0, 1)[::2],
        wide[:, :16].transpose(0, 1),
        torch.randn(1, 12, 1, 1).expand(16, -1, -1, -1),
    ):
        y, saved = dense_block.forward(x, [weight], norms, group="", keep=True)
        expected, _ = dense_block.forward(x, [weight.contiguous()], norms, group="", keep=True)
        torch.testing.assert_close(y, expected)
        need = Need(True, [True], [True])
        got = dense_block.backward(torch.ones_like(y), saved, [weight], norms, need, group="")
        same = dense_block.backward(torch.ones_like(y), saved, [weight.contiguous()], norms, need, group="")
        torch.testing.assert_close(got.x, same.x)
        torch.testing.assert_close(got.convs[0], same.convs[0])
