"""The gate lets the right through, and nothing else; and measure_case gives what fails it no time."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import gate, harness, measure, stream, textbook
from benchmarks.cases import TITLE, Case
from benchmarks.inputs import Inputs, make_inputs, our_sources
from benchmarks.providers import Provider, Step, automatic, providers
from benchmarks.session import DEFAULT

CPU = torch.device("cpu")


def case_of(objective: str, dtype: str = "fp32") -> Case:
    return Case(objective=objective, rows=6, classes=33, dtype=dtype)


def errors(case: Case, regime: str, provider: Provider) -> gate.Errors | None:
    return gate.measure(case, regime, provider, provider.build(), CPU)


def there(case: Case) -> list[Provider]:
    """What is here and needs no compiler."""
    found = providers(case.objective, case.dtype, "cpu", autotune=False)
    return [each for each in found if each.absent is None and each.kind != "compile"]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("objective", TITLE)
def test_right_providers_pass(objective: str, dtype: str) -> None:
    case = case_of(objective, dtype)
    found = there(case)
    assert {"ban_fast", "eager"} <= {provider.kind for provider in found}
    for provider in found:
        at_random = errors(case, "random", provider)
        assert at_random is not None
        # The textbook in bf16 alone is allowed its rounding: the gate for bf16 knows its figures at larger shapes.
        if dtype == "fp32" or provider.kind == "ban_fast" or "fp32 inside" in provider.name:
            assert gate.refusal(at_random, case.dtype) is None, (provider.name, at_random)


def test_near_the_teacher_the_textbook_loses_what_ours_keeps() -> None:
    case = case_of("kd")
    near = {provider.name: errors(case, "near", provider) for provider in there(case)}
    assert near["ban_fast reference"] is not None
    assert near["eager kl_div"] is not None
    assert near["ban_fast reference"].gradient < 1e-6
    assert near["eager kl_div"].gradient > 3e-5


def test_a_dkpp_that_draws_its_order_has_no_near() -> None:
    case = case_of("dkpp")
    near = {provider.name: errors(case, "near", provider) for provider in there(case)}
    assert near["eager argsort, kl_div"] is None
    assert near["ban_fast reference"] is not None
    assert near["ban_fast reference"].gradient < 1e-6  # its student is near its own target: there is something to lose


class _Changed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, factor: float, grad_factor: float) -> Tensor:
        ctx.grad_factor = grad_factor
        return loss * factor

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0] * ctx.grad_factor, None, None


def wrong(loss: float, gradient: float) -> Callable[[], Step]:
    def build() -> Step:
        def step(x: Inputs) -> textbook.Answer:
            right, order = textbook.kd_kl_div(x.student, x.teacher, x.labels, x.confidence)
            return _Changed.apply(right, loss, gradient), order

        return step

    return build


def provider_of(build: Callable[[], Step], name: str = "wrong") -> Provider:
    return Provider(name=name, kind="eager", loss="kl", build=build)


@pytest.mark.parametrize(
    ("loss", "gradient", "what"),
    [
        (1.0, 0.0, "gradient off by 1.0e+00"),
        (1.0, 1.0001, "gradient off by 1.0e-04"),
        (1.001, 1.0, "loss off by 1.0e-03"),
        (float("nan"), float("nan"), "loss off by nan and gradient off by nan"),
    ],
)
def test_wrong_providers_are_refused(loss: float, gradient: float, what: str) -> None:
    case = case_of("kd")
    found = errors(case, "random", provider_of(wrong(loss, gradient)))
    assert found is not None
    assert what in str(gate.refusal(found, case.dtype))


def test_another_temperature_or_divergence_is_refused() -> None:
    case = case_of("kd")
    soft = next(provider for provider in there(case) if provider.name == "eager soft-CE")
    found = errors(case, "random", replace(soft, loss="kl"))
    assert found is not None
    assert found.loss > 0.1
    assert found.gradient < 1e-6


@pytest.mark.parametrize(("break_it", "what"), [("argmax", "argmax"), ("twice", "permutation")])
def test_dkpp_must_permute_and_keep_the_argmax(break_it: str, what: str) -> None:
    """The last column of an order is the argmax, which nothing reads; the first must not be one, nor come twice."""

    def step(x: Inputs) -> textbook.Answer:
        loss, order = textbook.dkpp_kl_div(x.student, x.teacher, x.labels, x.confidence)
        assert order is not None
        order = order.clone()
        order[:, 0] = order[:, -1] if break_it == "argmax" else order[:, 1]
        return loss, order

    with pytest.raises(ValueError, match="permutation"):
        errors(case_of("dkpp"), "random", provider_of(lambda: step))
    kept = torch.tensor([[2]])
    with pytest.raises(ValueError, match=what):
        gate._check_permutation(torch.tensor([[0, 2, 1] if what == "argmax" else [0, 0, 2]]), kept)


def test_the_textbook_order_is_a_permutation_of_all_but_the_argmax() -> None:
    torch.manual_seed(0)
    teacher = torch.randn(50, 7)
    target, order = textbook.permuted(teacher)
    kept = teacher.argmax(1, keepdim=True)
    source = textbook.sources(order, kept)
    assert torch.equal(target, teacher.gather(1, source))
    gate._check_permutation(source, kept)
    assert (source != torch.arange(7)).any()


@pytest.mark.parametrize("objective", [o for o in TITLE if o != "dkpp"])
def test_truth_is_autograds_in_float64(objective: str) -> None:
    case = case_of(objective)
    x = make_inputs(case, "random", CPU, seed=3)
    student = x.student.detach().double().requires_grad_()
    for name, form in textbook.FORMS[case.objective].items():
        loss, _ = form(student, x.teacher.double(), x.labels, x.confidence.double())
        (expected,) = torch.autograd.grad(loss, student)
        value, grad = gate._truth(case.objective, "ce" if name == "soft-CE" else "kl", x, x.teacher)
        torch.testing.assert_close(value, loss.detach(), rtol=1e-12, atol=0)
        torch.testing.assert_close(grad, expected, rtol=1e-10, atol=1e-15)


def test_near_means_near_our_permuted_target() -> None:
    x = make_inputs(case_of("dkpp"), "near", CPU, seed=0)
    target = x.teacher.gather(1, our_sources(x.teacher))
    assert (x.student - target).abs().max() < 0.01
    assert (x.student - x.teacher).abs().max() > 0.5


def test_only_those_that_pass_get_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    stream.streams.cache_clear()
    monkeypatch.setitem(stream.FLOATS, "cpu", 2**16)
    monkeypatch.setattr(harness, "LAP", 1e-4)
    monkeypatch.setattr(harness, "ROUNDS", (3, 3))
    for module in (harness, measure):
        monkeypatch.setattr(module, "SLOW", math.inf)  # nobody sits out where the machine stands still for a while

    def raising() -> Step:
        raise RuntimeError("no kernel for this\nand a second line")

    case = case_of("kd")
    candidates = [
        *there(case),
        provider_of(wrong(1.0, 0.0), "wrong"),
        provider_of(raising, "raising"),
        replace(provider_of(raising, "absent"), absent="not installed"),
    ]
    turns: list[str] = []
    bench = measure.Bench(CPU, turns.append)
    excluded = {"excluded": "hung in another process"}
    candidates.append(replace(provider_of(raising, "excluded")))
    (record,) = bench.measure(case, candidates, [DEFAULT], seconds=0.0, excluded=excluded)
    entries = record["providers"]
    assert list(entries) == [candidate.name for candidate in candidates]
    for name, entry in entries.items():
        assert (entry["time"] is None) == (name in ("wrong", "raising", "absent", "excluded")), name
    assert "gradient" in entries["wrong"]["refused"]
    assert entries["raising"]["failed"] == "RuntimeError: no kernel for this"
    assert entries["absent"]["absent"] == "not installed"
    assert entries["excluded"]["failed"] == "hung in another process"
    assert "excluded" not in turns
    assert {"", "raising", "ban_fast reference", "copy"} <= set(turns)
    ours = entries["ban_fast reference"]
    assert ours["time"]["rounds"] == len(record["laps_s"]["ban_fast reference"]) == 3
    assert ours["time"]["p20_ms"] <= ours["time"]["ms"] <= ours["time"]["p80_ms"]
    assert set(record["streams_gb_s"]) == {"copy", "2R1W"}
    assert min(record["streams_gb_s"].values()) > 0
    assert automatic("kd", "cpu", torch.float32, (case.rows, case.classes)) in entries


def test_a_provider_that_takes_seconds_has_few_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference's DKPP takes 4 s at [1120, 10000], and nobody waits for the rounds of the others."""
    monkeypatch.setattr(measure, "streams", lambda device: {"copy": (lambda: None, 1), "2R1W": (lambda: None, 1)})
    monkeypatch.setattr(harness, "ROUNDS", (5, 5))
    lengths = {"quick": 1e-3, "slow": 1.4, "slowest": 7.0}
    monkeypatch.setattr(measure, "_lap", lambda c, *_: (lambda: lengths[c.provider.name], 1, lengths[c.provider.name]))
    case = case_of("kd")
    bench = measure.Bench(CPU, _kind=case.kind)

    def step(x: Inputs) -> textbook.Answer:
        return (x.student * x.teacher).sum(), None

    for name in lengths:
        bench._prepared[name] = measure.Candidate(provider_of(lambda: step, name), step=step)
    candidates = [each.provider for each in bench._prepared.values()]
    (record,) = bench.measure(case, candidates, [DEFAULT], seconds=2.0)
    assert {name: len(record["laps_s"][name]) for name in lengths} == {"quick": 5, "slow": 2, "slowest": 1}
