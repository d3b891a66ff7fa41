"""Who is compared: our backends through their public modules, plain PyTorch, torch.compile of it, Liger-Kernel, and
other open kernels in Triton.
"""

import importlib
import importlib.util
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal

import torch
import torch.nn.functional as F

from ban_fast.backends import dispatch
from ban_fast.losses import CWTMLoss, DKPPLoss, KDLoss
from benchmarks import textbook
from benchmarks.cases import Dtype, Objective
from benchmarks.inputs import SEED, Inputs

Kind = Literal["ban_fast", "eager", "compile", "liger", "triton"]
Step = Callable[[Inputs], textbook.Answer]
"""From inputs to the loss, with autograd behind it, and the order of a DKPP that drew one."""


@dataclass(frozen=True, kw_only=True)
class Provider:
    """One way to compute an objective."""

    name: str
    kind: Kind
    loss: Literal["kl", "ce"]
    """Whether its KD term is a divergence or leaves the teacher's entropy in: what the gate holds the loss against."""
    build: Callable[[], Step]
    absent: str | None = None
    """Why it is not there, where it is not."""


def providers(objective: Objective, dtype: Dtype, device: str, *, autotune: bool) -> list[Provider]:
    """All of them on "cpu" or "cuda", ours first, absent ones included; those with max-autotune where `autotune`."""
    modes = ("default", "max-autotune") if autotune else ("default",)
    found = _ours(objective, device)
    for name, form in textbook.FORMS[objective].items():
        found.append(_eager(f"eager {name}", form))
    if dtype != "fp32":
        for name, form in textbook.FORMS[objective].items():
            found.append(_eager(f"eager {name}, fp32 inside", textbook.in_fp32(form)))
    for mode in modes:
        for name, form in textbook.FORMS[objective].items():
            found.append(_compiled(name, form, mode, device))
    return found + _liger(objective, device) + _open_triton(objective, device)


def automatic(objective: Objective, device: str, dtype: torch.dtype, shape: tuple[int, int]) -> str:
    """The name of the provider that backend="auto" comes to."""
    loss = "cwtm" if objective.startswith("cwtm") else "kd" if objective.startswith("kd") else "dkpp"
    chosen = dispatch.resolve("auto", loss, torch.empty(shape, dtype=dtype, device=device))
    there = [name for name, problem in dispatch.available(device).items() if problem is None]
    return next(f"ban_fast {name}" for name in there if dispatch.named(name, device) is chosen)


def _ours(objective: Objective, device: str) -> list[Provider]:
    found = []
    for backend, problem in dispatch.available(device).items():
        if problem is None and backend == "triton" and device == "cpu":
            problem = "on CPU tensors it runs in Triton's interpreter, whose time says nothing"
        found.append(
            Provider(
                name=f"ban_fast {backend}",
                kind="ban_fast",
                loss="kl",
                build=partial(public_step, objective, backend),
                absent=problem,
            )
        )
    return found


def _module(objective: Objective, backend: str) -> torch.nn.Module:
    if objective.startswith("cwtm"):
        return CWTMLoss(backend=backend)
    if objective == "dkpp":
        return DKPPLoss(seed=SEED, backend=backend)
    return KDLoss(label_weight=1.0 if objective == "kd_labels" else 0.0, backend=backend)


def public_step(objective: Objective, backend: str) -> Step:
    """Ours, as a user calls it."""
    module = _module(objective, backend)
    steps: dict[Objective, Step] = {
        "kd": lambda x: (module(x.student, x.teacher), None),
        "kd_labels": lambda x: (module(x.student, x.teacher, x.labels), None),
        "cwtm": lambda x: (module(x.student, x.teacher, x.labels), None),
        "cwtm_confidence": lambda x: (module(x.student, None, x.labels, confidence=x.confidence), None),
        "dkpp": lambda x: (module(x.student, x.teacher, step=x.step), None),
    }
    return steps[objective]


def _eager(name: str, form: textbook.Form) -> Provider:
    return Provider(name=name, kind="eager", loss=_loss_of(name), build=lambda: _step(form))


def _compiled(name: str, form: textbook.Form, mode: str, device: str) -> Provider:
    # CUDA graphs are measured for every provider alike, by the harness: compile's own would copy inputs into them.
    chosen = "max-autotune-no-cudagraphs" if mode == "max-autotune" else mode
    return Provider(
        name=f"compile {name}" if mode == "default" else f"compile {name}, {mode}",
        kind="compile",
        loss=_loss_of(name),
        build=lambda: _step(torch.compile(form, mode=chosen, dynamic=False, fullgraph=True)),
        absent=_no_compiler() if device == "cpu" else None,
    )


def _step(form: textbook.Form) -> Step:
    return lambda x: form(x.student, x.teacher, x.labels, x.confidence)


def _loss_of(name: str) -> Literal["kl", "ce"]:
    return "ce" if "soft-CE" in name else "kl"


@cache
def _no_compiler() -> str | None:
    if any(shutil.which(name) for name in (os.environ.get("CXX", ""), "g++", "clang++") if name):
        return None
    return "torch.compile needs a C++ compiler here, and found none"


def _liger(objective: Objective, device: str) -> list[Provider]:
    """Liger's losses with the softmaxes that they leave to the caller; KD only, it has no others."""
    if objective not in ("kd", "kd_labels"):
        return []
    absent = None
    if importlib.util.find_spec("liger_kernel") is None:
        absent = "liger-kernel is not installed"
    elif device == "cpu":
        absent = "Liger's kernels are Triton's, for GPUs"
    labelled = objective == "kd_labels"

    def kl_div() -> Step:
        liger = importlib.import_module("liger_kernel.transformers.kl_div")
        return _on_log_q(liger.LigerKLDIVLoss(reduction="batchmean"), lambda t: t.softmax(1), labelled)

    def jsd() -> Step:
        liger = importlib.import_module("liger_kernel.transformers.jsd")
        return _on_log_q(liger.LigerJSD(beta=0.0), lambda t: t.log_softmax(1), labelled)  # beta 0 is KL(p || q)

    return [
        Provider(name="Liger KLDIV", kind="liger", loss="kl", build=kl_div, absent=absent),
        Provider(name="Liger JSD, beta 0", kind="liger", loss="kl", build=jsd, absent=absent),
    ]


def _open_triton(objective: Objective, device: str) -> list[Provider]:
    """Kernels for KD from both logits that others have published: speculators' (vLLM), and Fast-LLM's, never there."""
    if objective not in ("kd", "kd_labels"):
        return []
    absent = None
    if importlib.util.find_spec("speculators") is None:
        absent = "speculators is not installed"
    elif device == "cpu":
        absent = "speculators' kernels are Triton's, for GPUs"
    labelled = objective == "kd_labels"

    def speculators() -> Step:
        fused = importlib.import_module("speculators.losses.fused").fused_kl_div_loss

        def step(x: Inputs) -> textbook.Answer:
            value = fused(x.student[None], x.teacher[None]).mean()  # [1, T, V] -> [1, T]
            return (value + F.cross_entropy(x.student.float(), x.labels) if labelled else value), None

        return step

    def nothing() -> Step:
        raise NotImplementedError

    missing = "Fast-LLM is on no package index, and its kernels are called by its own trainer only"
    return [
        Provider(name="speculators KL", kind="triton", loss="kl", build=speculators, absent=absent),
        Provider(name="Fast-LLM KL", kind="triton", loss="kl", build=nothing, absent=missing),
    ]


def _on_log_q(loss: Any, target: Callable[[torch.Tensor], torch.Tensor], labelled: bool) -> Step:
    def step(x: Inputs) -> textbook.Answer:
        log_q = x.student.log_softmax(1)
        value = loss(log_q, target(x.teacher))
        return (value + F.nll_loss(log_q, x.labels) if labelled else value), None

    return step
