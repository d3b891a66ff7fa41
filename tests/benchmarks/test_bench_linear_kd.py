"""The benchmark of fused_linear_kd: providers that agree, the clock's rounds, the table and its verdict."""

import math
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from ban_fast.losses import fused_linear_kd
from ban_fast.ops import linear_kd_chunks, products
from benchmarks import linear_kd
from benchmarks.linear_kd import ALONE, LIGER, OURS, OWN_PRODUCTS, PRODUCTS, Case, table, verdict

CPU = torch.device("cpu")
CASES = [Case(rows=40, width=8, classes=300, dtype=dtype) for dtype in ("fp32", "bf16")]
BY_HIDDEN = Case(rows=40, width=8, classes=300, dtype="bf16", teacher_width=12)


@pytest.mark.parametrize("case", [*CASES, BY_HIDDEN], ids=lambda case: case.title)
def test_every_provider_computes_the_loss(case: Case) -> None:
    found = linear_kd.errors(case, CPU)
    assert set(found) == set(linear_kd.steps()) - set(ALONE)
    for name, wrong in found.items():
        assert wrong["random"] < (1e-5 if case.dtype == "fp32" else 2e-2), name
    assert found[OURS]["near"] < (1e-3 if case.dtype == "fp32" else 3e-3)  # 1e-6 and 1.7e-3 at random, near costs fp32
    if case.dtype == "bf16":
        assert found["eager kl_div"]["near"] > 10 * found[OURS]["near"]


@pytest.mark.parametrize("case", [*CASES, BY_HIDDEN], ids=lambda case: case.title)
def test_products_alone_are_all_of_them(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways the same products; its own as many times as the loss itself makes them, over several chunks."""
    inputs = linear_kd.make_inputs(case, "random", CPU)
    plain, own = (linear_kd.steps()[name](inputs)[1:] for name in ALONE)
    for value, expected in zip(own, plain, strict=True):
        rounding = 1e-6 if case.dtype == "fp32" else 2e-2  # torch.mm rounds the logits to bf16
        assert (value - expected).norm() < rounding * value.norm()
    monkeypatch.setitem(linear_kd_chunks.CHUNK_BYTES, "cpu", 16 * 300 * 4)
    calls: list[str] = []
    for name in ("times_transposed", "times", "transposed_times"):
        real = getattr(products, name)
        monkeypatch.setattr(products, name, lambda *a, _n=name, _r=real, **k: (calls.append(_n), _r(*a, **k))[1])
    made = []
    for name in (OWN_PRODUCTS, OURS):
        calls.clear()
        linear_kd.steps()[name](inputs)
        made.append(sorted(calls))
    assert made[0] == made[1]
    assert len(made[0]) > 6


def test_rounds_and_memory() -> None:
    laps = linear_kd.times(CASES[0], CPU, seconds=0.0)
    assert list(laps) == list(linear_kd.steps())
    assert all(len(each) == linear_kd.LEAST_ROUNDS for each in laps.values())
    assert all(seconds > 0 for each in laps.values() for seconds in each)


def test_a_request_goes_to_a_process_and_back() -> None:
    request = {"what": "times", "case": linear_kd.asdict(CASES[0]), "device": "cpu", "seconds": 0.0}
    assert list(linear_kd.ask(request, {"MALLOC_MMAP_MAX_": "0"})) == list(linear_kd.steps())


def test_the_table_and_its_verdict() -> None:
    record = {
        "title": "T",
        "ms": {
            "default malloc": {PRODUCTS: [9.0, 10.0, 11.0], OURS: [10.0, 11.0, 12.0], "eager kl_div": [1.0, 30.0, 2.0]}
        },
        "peak_bytes": {OURS: 2_000_000, "eager kl_div": 10_000_000, "eager soft cross-entropy": 8_000_000, "x": None},
        "errors": {OURS: {"random": 1e-7, "near": 2e-5}, "eager kl_div": {"random": 1e-7, "near": 2e-5}},
    }
    judged = verdict(record)
    assert math.isclose(judged["time, default malloc"], 1.1), "a record from before its own products were measured"
    assert judged["memory"] == 0.25
    assert "| fused_linear_kd | 11 | 2 | 1.0e-07 | 2.0e-05 |" in table(record)
    assert "| products alone | 10 |  |  |  |" in table(record)
    record["ms"]["default malloc"][OWN_PRODUCTS] = [7.0, 8.0, 9.0]
    assert math.isclose(verdict(record)["time, default malloc"], 11 / 8), "the faster of the two"
    assert "| its own products alone | 8 |  |  |  |" in table(record)
    record["ms"]["default malloc"][OWN_PRODUCTS] = [11.0, 12.0, 13.0]
    assert math.isclose(verdict(record)["time, default malloc"], 1.1)
    record["peak_bytes"] = dict.fromkeys(record["peak_bytes"])
    assert verdict(record)["memory"] is None
    assert "memory" not in table(record).splitlines()[-1]


def test_what_a_gpu_is_held_to() -> None:
    """The case by hidden states; without Liger's figures those beside it are not measured."""
    case = Case(rows=8192, width=2048, classes=128_256, dtype="bf16", teacher_width=4096)
    gradients = 2 * (8192 + 128_256) * 2048
    record = {
        "case": linear_kd.asdict(case),
        "device": "cuda",
        "title": case.title,
        "ms": {"plain": {PRODUCTS: [27.0, 28.0, 29.0], OWN_PRODUCTS: [29.0] * 3, OURS: [31.0, 32.0, 33.0]}},
        "peak_bytes": {OURS: gradients + 500_000_000},
        "errors": {OURS: {"random": 2e-3, "near": 2e-3}},
    }
    assert linear_kd.verdict_on_gpu(record) == {
        "ms": 32.0,
        "share of the products' speed": 0.875,
        "Liger's time over ours": None,
        "GB beside the gradients": 0.5,
        "error near the teacher over Liger's": None,
    }
    assert "ms: 32 (target <= 32)" in table(record)
    assert "Liger's time over ours: not measured (target >= 1.6)" in table(record)
    record["ms"]["plain"][LIGER] = [63.0, 64.0, 65.0]
    record["errors"][LIGER] = {"random": 2e-3, "near": 4e-2}
    assert linear_kd.verdict_on_gpu(record)["Liger's time over ours"] == 2
    assert math.isclose(linear_kd.verdict_on_gpu(record)["error near the teacher over Liger's"], 0.05)
    assert set(linear_kd.verdict_on_gpu(record)) == set(linear_kd.GPU_TARGETS)
    logits = Case(rows=8, width=4, classes=9, dtype="bf16")
    assert linear_kd.verdict_on_gpu({**record, "case": linear_kd.asdict(logits)}) == {}


def test_liger_is_asked_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """For KL(teacher || student) from hidden states, on a GPU."""
    asked: list[float] = []

    class LigerFusedLinearJSD:
        def __init__(self, jsd_beta: float) -> None:
            asked.append(jsd_beta)

        def __call__(self, hidden: Tensor, weight: Tensor, teacher: Tensor, taught: Tensor, labels: None) -> Tensor:
            return fused_linear_kd(hidden, weight, labels, teacher_hidden=teacher, teacher_weight=taught)

    module = SimpleNamespace(LigerFusedLinearJSD=LigerFusedLinearJSD)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.fused_linear_jsd", module)
    assert LIGER not in linear_kd.steps(BY_HIDDEN, "cpu")
    assert LIGER not in linear_kd.steps(CASES[1], "cuda")
    step = linear_kd.steps(BY_HIDDEN, "cuda")[LIGER]
    inputs = linear_kd.make_inputs(BY_HIDDEN, "random", CPU)
    for value, wanted in zip(step(inputs), linear_kd.steps()[OURS](inputs), strict=True):
        assert torch.equal(value, wanted)
    assert asked == [0.0]
