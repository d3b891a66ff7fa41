"""The products of an output layer against float64, by each of the libraries that may compute them."""

import pytest
import torch
from torch import Tensor

from ban_fast.ops import products

# Of one row, one class and one feature; of whole pieces of classes and a last one; of no whole vector anywhere.
SHAPES = [(1, 1, 1), (3, 5, 7), (16, 2 * products.PIECE, 32), (33, 2 * products.PIECE + 301, 65)]
FP32 = 1e-6
"""Relative, of the whole matrix: sums of 2,301 fp32 terms of either sign came to 2e-7."""


@pytest.fixture(params=["onednn", "torch.mm"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    name: str = request.param
    if name == "onednn" and not products._has_onednn():
        pytest.skip("torch has no oneDNN, or this CPU no AVX-512")
    monkeypatch.setattr(products, "_by_onednn", lambda a: name == "onednn")
    return name


def matrix(*shape: int, strided: bool) -> Tensor:
    """With a column of another matrix beside each of its own where `strided`."""
    torch.manual_seed(sum(shape))
    return torch.randn(shape[0], 2 * shape[1])[:, ::2] if strided else torch.randn(shape)


def assert_near(value: Tensor, exact: Tensor) -> None:
    assert (value.double() - exact).norm() <= FP32 * exact.norm()


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize(("rows", "classes", "width"), SHAPES)
def test_products_are_those_of_float64(library: str, rows: int, classes: int, width: int, strided: bool) -> None:
    hidden, weight = matrix(rows, width, strided=strided), products.dense(matrix(classes, width, strided=strided))
    gradient, bias = matrix(rows, classes, strided=False), torch.randn(classes)
    for layer in (weight, weight.t().contiguous().t()):
        assert_near(
            products.times_transposed(hidden, layer, None, torch.float32), hidden.double() @ weight.double().t()
        )
        logits = products.times_transposed(hidden, layer, bias, torch.float32)
        assert logits.is_contiguous(), "so that their gradient can take their place"
        assert_near(logits, hidden.double() @ weight.double().t() + bias)
        grad_hidden = torch.full((rows, width), torch.nan)
        products.times(grad_hidden, gradient, layer)
        assert_near(grad_hidden, gradient.double() @ weight.double())
    sums = torch.full((classes, width), torch.nan)
    expected = gradient.double().t() @ hidden.double()
    products.transposed_times(sums, gradient, hidden, add=False)
    assert_near(sums, expected)
    products.transposed_times(sums, gradient, 2 * hidden, add=True)
    assert_near(sums, 3 * expected)


def test_only_what_is_apart_is_copied_and_only_for_onednn(library: str) -> None:
    whole = torch.randn(6, 4)
    assert products.dense(whole) is whole
    assert products.dense(whole.t()).data_ptr() == whole.data_ptr()
    apart = products.dense(whole[:, :3])
    assert apart.is_contiguous() == (library == "onednn")
    assert torch.equal(apart, whole[:, :3])


def test_who_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN for nothing but fp32 on a CPU, and not where its user has turned it off."""
    assert not products._by_onednn(torch.empty(1, 1, dtype=torch.float64))
    assert not products._by_onednn(torch.empty(1, 1, dtype=torch.bfloat16))
    assert not products._by_onednn(torch.empty(1, 1, device="meta"))
    assert products._by_onednn(torch.empty(1, 1)) == products._has_onednn()
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    assert not products._by_onednn(torch.empty(1, 1))
