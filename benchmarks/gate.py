"""The gate before the clock: loss and gradient against float64 from the same bits.

A provider is judged at random logits: there it gets a time, or none. Its errors where the student is near its teacher
are measured and shown beside the time: the textbook forms lose their digits there by nature (they subtract
probabilities that agree), and a gate on that would leave nothing to compare with.
"""

from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import Case, Dtype, Objective, Regime
from benchmarks.inputs import Inputs, make_inputs, our_sources
from benchmarks.providers import Provider, Step
from benchmarks.textbook import sources

# Relative errors. fp32: the textbook reaches 2e-7 in the gradient's norm and 4e-7 in the loss over 10,000 classes;
# 1e-5 leaves room for other orders of summation, and none for a wrong formula. bf16: storing the gradient alone costs
# 1.6e-3; the textbook in bf16 throughout loses 6e-3 in both.
LIMIT: dict[Dtype, float] = {"fp32": 1e-5, "bf16": 1e-2}
SEED = 7


@dataclass(frozen=True)
class Errors:
    """Relative errors: |loss - truth| / |truth|, and the same of the gradient in the 2-norm."""

    loss: float
    gradient: float

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def gradient(step: Step, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor | None]:
    """Loss, d loss / d logits, and the order of a DKPP that drew one."""
    loss, order = step(inputs)
    return loss.detach(), torch.autograd.grad(loss, inputs.student)[0], order


def refusal(errors: Errors, dtype: Dtype) -> str | None:
    """Why these errors at random logits cost a provider its time, or None."""
    limit = LIMIT[dtype]
    found = [f"{what} off by {value:.1e}" for what, value in errors.to_dict().items() if not value <= limit]
    return f"{' and '.join(found)} at random logits; the gate for {dtype} is {limit:.0e}" if found else None


def measure(case: Case, regime: Regime, provider: Provider, step: Step, device: torch.device) -> Errors | None:
    """The errors of one call. None near the teacher for a DKPP that draws its own order: near what cannot be known."""
    if case.objective == "dkpp" and regime == "near" and provider.kind != "ban_fast":
        return None
    inputs = make_inputs(case, regime, device, seed=SEED)
    loss, grad, order = gradient(step, inputs)
    target = inputs.teacher
    if case.objective == "dkpp":
        kept = target.float().argmax(1, keepdim=True)
        source = our_sources(target) if order is None else sources(order, kept)
        _check_permutation(source, kept)
        target = target.gather(1, source)
    expected, expected_grad = _truth(case.objective, provider.loss, inputs, target)
    scale = expected_grad.norm()
    return Errors(
        loss=float((loss.double() - expected).abs() / expected.abs()),
        gradient=float(grad.double().sub_(expected_grad).norm() / scale),
    )


def _truth(objective: Objective, loss: str, inputs: Inputs, target: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and gradient in float64, the gradient by its formula: no graph, so that large shapes fit."""
    log_q = inputs.student.detach().double().log_softmax(1)
    rows = len(log_q)
    hard = F.nll_loss(log_q, inputs.labels, reduction="none")
    if objective.startswith("cwtm"):
        confidence = inputs.confidence.double()
        if objective == "cwtm":
            confidence = target.double().softmax(1).amax(1)
        weight = confidence / confidence.sum()
        value = (weight * hard).sum()
        grad = log_q.exp_()
        grad[torch.arange(rows, device=grad.device), inputs.labels] -= 1
        return value, grad.mul_(weight.unsqueeze(1))
    log_p = target.double().log_softmax(1)
    p = log_p.exp()
    value = (p * (log_p - log_q if loss == "kl" else -log_q)).sum() / rows
    grad = log_q.exp() - p
    if objective == "kd_labels":
        value = value + hard.mean()
        grad += log_q.exp()
        grad[torch.arange(rows, device=grad.device), inputs.labels] -= 1
    return value, grad.div_(rows)


def _check_permutation(source: Tensor, kept: Tensor) -> None:
    """ValueError where rows are not permutations that leave their argmax in place."""
    if not torch.equal(source.gather(1, kept), kept):
        raise ValueError("DKPP moved the teacher's argmax")
    if not torch.equal(source.sort(1).values, torch.arange(source.shape[1], device=source.device).expand_as(source)):
        raise ValueError("DKPP's order is not a permutation")
