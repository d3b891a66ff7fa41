"""A dense block's kernels against float64."""

import itertools
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import triton.language as tl
import triton_dense_cases as cases
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves
from triton_dense_cases import Widths

import ban_fast.ops.dense_block  # noqa: F401 (it registers the operators)
from ban_fast.backends import dense_block, dense_dispatch
from ban_fast.backends.dense_interface import Need
from ban_fast.backends.dense_shape import Norm
from ban_fast.backends.triton import dense
from ban_fast.backends.triton.dense import block, passes, products, statistics
from ban_fast.models import DenseNet

CLOSE = 4e-6
"""Of fp32: sums of up to a few hundred terms, each rounded to 6e-8, through up to seven convolutions each way."""


@pytest.fixture(autouse=True)
def nothing_is_initialised() -> Iterator[None]:
    """`torch.empty` gives NaN: no kernel may use what it did not get, beyond its channels or elsewhere. And fp32 is
    multiplied in IEEE arithmetic."""
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.conv.fp32_precision = before


BLOCKS = {
    "two units and a transition": Widths(),
    "odd growth, one image, the mean": Widths(entry=9, growth=33, bottleneck=1, exit=0, batch=1, height=5, width=3),
    "one unit, widths that nothing divides": Widths(units=1, entry=7, growth=5, exit=3, batch=3),
    "no unit, the mean": Widths(units=0, entry=20, exit=0),
    "no unit, a transition": Widths(units=0, entry=20, exit=7),
    "growth 1": Widths(units=3, entry=2, growth=1, bottleneck=1, exit=1, batch=1, height=4),
    "weights' gradients in parts": Widths(units=1, entry=6, growth=4, batch=2, height=16, width=16),
}
SLOW = {
    "odd growth as in the paper": Widths(units=3, entry=66, growth=33, exit=82, batch=2, height=9, width=9),
    "several tiles of every kind": Widths(units=2, entry=140, growth=24, exit=70, batch=5, height=8, width=8),
    "deep": Widths(units=10, entry=24, growth=12, exit=72, batch=2, height=4, width=4),
}


def assert_close(found: cases.Answer, expected: cases.Answer, close: float = CLOSE) -> None:
    wrong = {name: error for name, error in cases.errors(found, expected).items() if not error <= close}
    assert not wrong


@pytest.mark.parametrize("name", [*BLOCKS, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_against_float64(name: str, device: torch.device) -> None:
    given = cases.block((BLOCKS | SLOW)[name])
    assert_close(cases.answer(dense, given.to(device, torch.float32)), cases.truth(given))


FIXED = [(0, 1, 2, 3, 4), (1, 3), *(pytest.param(norms, marks=pytest.mark.slow) for norms in ((0, 2, 4), (2,), (1, 4)))]


@pytest.mark.parametrize("fixed", FIXED)
def test_norms_by_running_statistics(fixed: tuple[int, ...], device: torch.device) -> None:
    given = cases.block(Widths(growth=5, batch=1, fixed=fixed))
    assert_close(cases.answer(dense, given.to(device, torch.float32)), cases.truth(given))


NEEDS = {
    "nothing but x": Need(True, [False] * 5, [False] * 5),
    "all but x": Need(False, [True] * 5, [True] * 5),
    "the second unit's 3x3": Need(False, [False, False, False, True, False], [False] * 5),
    "the exit's norm": Need(False, [False] * 5, [False, False, False, False, True]),
    "some": Need(False, [False, True, False, True, True], [True, False, False, True, False]),
}


@pytest.mark.parametrize("name", NEEDS)
def test_only_what_is_needed(name: str, device: torch.device) -> None:
    given = cases.block(Widths(growth=3, batch=1))
    assert_close(cases.answer(dense, given.to(device, torch.float32), NEEDS[name]), cases.truth(given, NEEDS[name]))


def test_images_that_are_not_channels_last(device: torch.device) -> None:
    given = cases.block(Widths(units=1, growth=3))
    moved = given.to(device, torch.float32)
    moved = moved._replace(x=moved.x.contiguous(), grad=moved.grad.expand_as(moved.grad))
    assert_close(cases.answer(dense, moved), cases.truth(given))


@pytest.fixture
def bf16_as_on_a_gpu(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter keeps bf16 as its bits: it cuts fp32 off to them, and multiplies matrices as integers."""
    if device.type == "cuda":
        return
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    cast, dot = builder.cast_impl, builder.create_dot

    def nearest(self: Any, value: Any, to: Any) -> Any:
        if (value.dtype.scalar, to.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, value, to)
        bits = torch.from_numpy(value.data).bfloat16().view(torch.uint16).numpy()
        return interpreter.TensorHandle(bits, to.scalar)

    def product(self: Any, a: Any, b: Any, *others: Any) -> Any:
        if a.dtype.scalar == tl.bfloat16:
            a, b = (cast(self, matrix, tl.float32) for matrix in (a, b))
        return dot(self, a, b, *others)

    monkeypatch.setattr(builder, "cast_impl", nearest)
    monkeypatch.setattr(builder, "create_dot", product)


@pytest.mark.usefixtures("bf16_as_on_a_gpu")
@pytest.mark.parametrize(
    ("exit_width", "dtype"),
    [
        (0, torch.bfloat16),
        (10, torch.float16),
        pytest.param(0, torch.float16, marks=pytest.mark.slow),
        pytest.param(10, torch.bfloat16, marks=pytest.mark.slow),
    ],
)
def test_half_precision(exit_width: int, dtype: torch.dtype, device: torch.device) -> None:
    """No further from float64 than eager torch's passes, but for chance: 1.2 times, averaged."""
    given = cases.block(Widths(exit=exit_width), dtype)
    expected = cases.truth(given)
    found = cases.errors(cases.answer(dense, given.to(device, dtype)), expected)
    eager = cases.errors(cases.answer(dense_block, given), expected)
    assert sum(eager.values()) / len(eager) < 0.1  # well conditioned: what follows says something
    assert sum(found.values()) < 1.2 * sum(eager.values())


def test_what_one_implementation_saved_another_reads(device: torch.device) -> None:
    given = cases.block(Widths(growth=5)).to(device, torch.float32)
    expected = cases.truth(given)
    for first, second in ((dense, dense_block), (dense_block, dense)):
        y, saved = first.forward(given.x, given.convs, given.norms, group="", keep=True)
        gradients = second.backward(given.grad, saved, given.convs, given.norms, cases.everything(given), group="")
        assert_close(cases.Answer(y, saved, gradients), expected)


@pytest.mark.parametrize(("rows", "channels"), [(1, 3), (63, 5), (64, 8), (700, 33), (17_000, 2)])
def test_moments_of_many_tiles(rows: int, channels: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Far from zero, where squares of the values themselves would leave no digit of the variance."""
    monkeypatch.setattr(statistics, "_TILES", 32)
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, channels, generator=generator) + 1000
    found, known = torch.full((2, 4 + channels), 7.0, device=device), 4
    out = torch.full((rows, channels + 3), 7.0, device=device)
    partials = passes.place(x.to(device), out[:, 2 : 2 + channels], measured=True)
    assert statistics.finish(partials, found, None, "") == (None, None)
    assert torch.equal(out[:, 2 : 2 + channels].cpu(), x)
    assert (out[:, :2] == 7).all()
    assert (out[:, 2 + channels :] == 7).all()
    assert (found[:, :known] == 7).all()
    mean, variance = x.double().mean(0), x.double().var(0, unbiased=False)
    torch.testing.assert_close(found[0, known:].cpu().double(), mean, rtol=2e-7, atol=0)  # three roundings to fp32
    # Distances of 1 are rounded to 3e-5 of themselves at 1000, at random.
    torch.testing.assert_close(found[1, known:].cpu().double(), variance, rtol=1e-4, atol=1e-8)


def test_the_next_norm_s_scale_and_shift(device: torch.device) -> None:
    """From channels known before and new ones, by the batch; or by running statistics."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 9, generator=generator)
    vectors = torch.randn(4, 20, generator=generator).abs() + 0.1
    for running in (False, True):
        batch = vectors[:2].clone()
        batch[0, 11:], batch[1, 11:] = x.mean(0), x.var(0, unbiased=False)
        mean, var = vectors[2:] if running else batch
        scale = vectors[0] / (var + 0.1).sqrt()
        expected = torch.stack((scale, vectors[1] - mean * scale))
        given = vectors[:2].to(device, copy=True)
        own = (vectors[2].to(device), vectors[3].to(device)) if running else (None, None)
        norm = Norm(vectors[0].to(device), vectors[1].to(device), *own, 0.1)
        partials = passes.place(x.to(device), torch.empty(50, 9, device=device), measured=True)
        affine, _ = statistics.finish(partials, given, norm, "")
        assert affine is not None
        torch.testing.assert_close(given.cpu(), batch, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(affine.cpu(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("tiles", [1, 1024, 2500])
def test_sums_of_many_tiles(tiles: int, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(tiles)
    parts, gamma, var = (torch.randn(shape, generator=generator) for shape in ((tiles, 2, 11), (11,), (11,)))
    var = var.abs() + 0.1
    s0, s1 = parts.double().sum(0)
    inverse = (var.double() + 1e-3).rsqrt()
    norm = Norm(gamma.to(device), gamma.to(device), None, None, 1e-3)
    partials = statistics.Partials(parts.to(device), 64, 64 * tiles)
    given = torch.stack((var, var)).to(device)
    for add in (False, True):
        terms = torch.ones(2, 15, device=device)[:, :11]
        found = statistics.settle(partials, norm, given, terms, add=add)
        expected = torch.stack((gamma * inverse * s0, gamma * inverse**3 * s1)) + float(add)
        limit = 1e-6 * tiles**0.5  # sums of so many terms of size 1, which cancel
        torch.testing.assert_close(found.cpu().double(), torch.stack((s1 * inverse, s0)), rtol=1e-6, atol=4 * limit)
        torch.testing.assert_close(
            terms.cpu().double(), expected, rtol=1e-6, atol=40 * limit
        )  # times up to 1 / 0.1^1.5


def test_a_fixed_norm_takes_nothing_off(device: torch.device) -> None:
    """What others take off stays; where nobody was before, it is 0."""
    one = torch.ones(5, device=device)
    norm = Norm(one, one, one, one, 1e-3)
    for add, expected in ((False, 0), (True, 3)):
        terms = torch.full((2, 5), 3.0, device=device)
        statistics.settle(statistics.Partials(torch.ones(3, 2, 5, device=device), 64, 192), norm, terms, terms, add=add)
        assert (terms == expected).all()


def test_nan_and_infinities_pass_as_in_eager_torch(device: torch.device) -> None:
    values = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1.0, -1.0])
    x = values.repeat(3, 1).to(device)
    ones = torch.ones(7, device=device)
    norm = Norm(ones, 0 * ones, 0 * ones, ones, 0.0)
    a = passes.activate(x, norm, torch.zeros(2, 7, device=device))
    torch.testing.assert_close(a.cpu(), values.repeat(3, 1).relu(), equal_nan=True, rtol=0, atol=0)
    into = torch.empty(3, 7, device=device)
    partials = passes.deposit(torch.ones_like(x), x, norm, torch.zeros(2, 7, device=device), into)
    assert into[0].tolist() == [1, 1, 0, 0, 0, 1, 0]
    assert partials.values.sum(0)[0].tolist() == [3, 3, 0, 0, 0, 3, 0]


@pytest.mark.parametrize("kind", ["part of a wider matrix", "transposed"])
def test_weights_laid_out_otherwise(kind: str, device: torch.device) -> None:
    given = cases.block(Widths(units=1, entry=5, growth=1, bottleneck=2, exit=0, batch=1, height=2, width=4))
    weight = given.convs[0]
    if kind == "transposed":
        other = weight.reshape(weight.shape[0], -1).t().contiguous().t()[..., None, None]
    else:
        wider = weight.new_full((weight.shape[0], 8, 1, 1), float("nan"))
        wider[:, : weight.shape[1]] = weight
        other = wider[:, : weight.shape[1]]
    found = cases.answer(dense, given._replace(convs=[other, *given.convs[1:]]).to(device, torch.float32))
    assert_close(found, cases.truth(given))


def test_an_evaluation_keeps_one_hidden_map_at_a_time(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    given = cases.block(Widths(units=4)).to(device, torch.float32)
    made: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []
    unit = block._Forward.unit

    def noting(self: block._Forward, number: int) -> torch.Tensor:
        alive.append(sum(each() is not None for each in made))
        hidden = unit(self, number)
        made.append(weakref.ref(hidden))
        return hidden

    monkeypatch.setattr(block._Forward, "unit", noting)
    dense.forward(given.x, given.convs, given.norms, group="", keep=False)
    assert alive == [0, 0, 0, 0]


def test_tiles_cover_all_that_is_split() -> None:
    """The split of a weight's gradient over pixels: no pixel twice, none left out, none beyond the last part."""
    from ban_fast.backends.triton.dense import config

    tile = config.Tile(64, 64, 32, 4, 3)
    for tiles, pixels, processors in itertools.product((1, 5, 400), (1, 31, 256, 1000, 4097, 131_072), (2, 132)):
        parts, each = config.splits(tiles, pixels, tile, processors)
        assert each % tile.depth == 0
        assert (parts - 1) * each < pixels <= parts * each
        assert parts * tiles <= max(tiles, 2 * processors)


@pytest.mark.slow
@pytest.mark.parametrize("exit_width", [0, 10])
def test_the_layout_is_what_compiled_graphs_are_told(exit_width: int, device: torch.device) -> None:
    """The operators' fakes give the strides that the kernels' results have."""
    given = cases.block(Widths(growth=5, exit=exit_width)).to(device, torch.float32)
    need = cases.everything(given)
    found = cases.answer(dense, given, need)
    columns = [list(column) for column in zip(*given.norms, strict=True)]
    with FakeTensorMode(allow_non_fake_inputs=True):
        y, *saved = torch.ops.ban_fast.dense_block(given.x, given.convs, *columns, group="", keep=True)
        gradients = torch.ops.ban_fast.dense_block_backward(given.grad, *saved, given.convs, *columns, *need, group="")
    real = [found.y, *found.saved, found.gradients.x, *found.gradients.convs, *found.gradients.norms]
    for a, b in zip(tree_leaves(real), tree_leaves([y, *saved, *gradients]), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        wide = [i for i, size in enumerate(a.shape) if size > 1]
        assert [a.stride(i) for i in wide] == [b.stride(i) for i in wide], a.shape


@pytest.mark.slow
def test_a_network_trains_as_plain_does(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through models and operators: two steps' logits, then weights and running statistics."""
    monkeypatch.setattr(dense_dispatch, "_serving", lambda x: dense if x.dtype == torch.float32 else dense_block)
    results = []
    for memory, dtype in (("plain", torch.float64), ("shared", torch.float32)):
        torch.manual_seed(0)
        network = DenseNet([2, 1], [4, 5], 8, num_classes=5, memory=memory).to(device, dtype)
        optimizer = torch.optim.SGD(network.parameters(), 0.05)
        for seed in range(2):
            x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(seed)).to(device, dtype)
            logits = network(x)
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(logits, torch.arange(4, device=device)).backward()
            optimizer.step()
        results.append([logits.detach(), *network.state_dict().values()])
    for exact, found in zip(*results, strict=True):
        # Some roundings of 6e-8 of values up to 1, through four layers of batch norm over 64 to 256 values, twice.
        torch.testing.assert_close(found.to(exact.dtype), exact, rtol=1e-4, atol=2e-5)


def test_tf32_rounds_to_nearest(device: torch.device) -> None:
    """Tensor cores cut fp32 off after 10 bits: sums of positive products would be 7e-4 too small, all of them."""
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    generator = torch.Generator().manual_seed(0)
    x, weight, grad = (1 + torch.rand(shape, generator=generator) for shape in ((90, 50), (40, 50), (90, 40)))
    one, statistics_of_none = torch.ones(50, device=device), torch.tensor([0.0, 1.0])[:, None].expand(2, 50).to(device)
    identity = Norm(one, 0 * one, None, None, 0.0)
    made, into = torch.empty(90, 40, device=device), torch.empty(90, 56, device=device)[:, :50]
    on_device = weight[..., None, None].to(device)
    products.project(x.to(device), torch.stack((one, 0 * one)), on_device, made, measured=False)
    products.unproject(grad.to(device), on_device, x.to(device), identity, statistics_of_none, into, add=False)
    gradient = products.weight_gradient(grad.to(device), x.to(device), identity, statistics_of_none, on_device)
    x, weight, grad = x.double(), weight.double(), grad.double()
    for found, exact in ((made, x @ weight.T), (into, grad @ weight), (gradient[..., 0, 0], grad.T @ x)):
        relative = found.cpu().double() / exact - 1
        assert 1e-6 < relative.abs().max() < 4e-4  # TF32's 2^-11 of each factor, averaged; not fp32's
        assert relative.mean().abs() < 3e-5
