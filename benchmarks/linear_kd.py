"""`python -m benchmarks.linear_kd`: fused_linear_kd beside its products alone and the forms that hold whole logits.

From hidden states to d loss / d hidden and d loss / d weight. Providers take turns in one process, round after round;
memory is measured in a process for each. Every provider's errors, against float64 from the same bits, stand beside
its time: at random weights, and where the teacher's differ by 1 %, where born-again training ends.

Products alone are torch.mm's over all rows, and those that fused_linear_kd makes itself (oneDNN's on some CPUs, where
torch.mm is MKL's and slower), chunk by chunk: it is judged by the faster of the two.
"""

import argparse
import importlib
import importlib.util
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ban_fast.losses import fused_linear_kd, kd_loss
from ban_fast.ops import linear_kd_chunks
from benchmarks import machine
from benchmarks.cuda import synchronized
from benchmarks.harness import quantiles
from benchmarks.inputs import TORCH_DTYPE
from benchmarks.session import DEFAULT, ROOT, TUNED, TUNING

OURS, PRODUCTS, OWN_PRODUCTS = "fused_linear_kd", "products alone", "its own products alone"
ALONE = PRODUCTS, OWN_PRODUCTS
"""Less than a loss."""
TIME_TARGET, MEMORY_TARGET = 1.15, 0.25
"""On a CPU, of the faster products' time and of the eager forms' memory, whichever takes less."""
LIGER = "Liger fused linear JSD, beta 0"
GPU_TARGETS = {
    "ms": ("<=", 32.0),
    "share of the products' speed": (">=", 0.85),
    "Liger's time over ours": (">=", 1.6),
    "GB beside the gradients": ("<=", 0.6),
    "error near the teacher over Liger's": ("<=", 0.1),
}
"""On a GPU, of the case with a teacher by hidden states."""
SECONDS = 20.0
"""For the rounds of a case in one setting, `LEAST_ROUNDS` at least."""
LEAST_ROUNDS = 5
TRUTH_ROWS = 128
EXACT_MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(2**16)}
"""Large blocks go back to the system when they are freed: peak memory is then what was held."""

Answer = tuple[Tensor, Tensor, Tensor]
"""Loss, d loss / d hidden, d loss / d weight."""
Step = Callable[["Inputs"], Answer]


@dataclass(frozen=True, kw_only=True)
class Case:
    """KD at T = 1 over [rows, width] x classes, the teacher as fp32 logits or by hidden states of `teacher_width`."""

    rows: int
    width: int
    classes: int
    dtype: str
    teacher_width: int | None = None

    @property
    def title(self) -> str:
        teacher = "logits" if self.teacher_width is None else f"[{self.rows}, {self.teacher_width}]"
        return f"[{self.rows}, {self.width}] x {self.classes} {self.dtype}, teacher {teacher}"


# Penn Treebank: the CNN-LSTM's width at the LSTM's batch, and the LSTM's. Llama 3's vocabulary from hidden states.
CASES = {
    "cpu": [Case(rows=1120, width=650, classes=10_000, dtype=dtype) for dtype in ("fp32", "bf16")],
    "cuda": [
        Case(rows=1120, width=1500, classes=10_000, dtype="bf16"),
        Case(rows=8192, width=2048, classes=128_256, dtype="bf16", teacher_width=4096),
    ],
}


@dataclass(frozen=True, eq=False)
class Inputs:
    """Tensors of a case; hidden and weight are leaves."""

    hidden: Tensor  # [R, H]
    weight: Tensor  # [V, H]
    teacher: Tensor  # [R, V] fp32 logits, or [R, H'] with teacher_weight
    teacher_weight: Tensor | None  # [V, H']

    def teacher_logits(self) -> Tensor:
        """As the eager forms have them."""
        return self.teacher if self.teacher_weight is None else F.linear(self.teacher, self.teacher_weight)


def make_inputs(case: Case, regime: str, device: torch.device) -> Inputs:
    """Logits N(0, 2^2) on both sides; near, the teacher's weights are the student's and 1 % of noise."""
    generator = torch.Generator(device).manual_seed(0)
    dtype = TORCH_DTYPE[case.dtype]  # type: ignore[index]

    def normal(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator, device=device)

    hidden, weight = normal(case.rows, case.width), normal(case.classes, case.width) * 2 / case.width**0.5
    other = normal(case.classes, case.width) * 2 / case.width**0.5
    taught = other if regime == "random" else weight + 0.01 * other
    teacher_weight, teacher = None, hidden.to(dtype).float() @ taught.to(dtype).float().t()
    if case.teacher_width is not None:
        padding = normal(case.rows, case.teacher_width - case.width)  # hidden states that the weights leave alone
        teacher = torch.cat([hidden, padding], 1).to(dtype)
        teacher_weight = F.pad(taught, (0, padding.shape[1])).to(dtype)
    return Inputs(hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), teacher, teacher_weight)


def steps(case: Case | None = None, device: str = "cpu") -> dict[str, Step]:
    """Every provider that this torch has; Liger's where it is installed, for a GPU's cases by hidden states."""
    found: dict[str, Step] = {
        PRODUCTS: _products,
        OWN_PRODUCTS: _own_products,
        OURS: partial(_backward, _fused),
        "kd_loss, whole logits": partial(
            _backward, lambda x: kd_loss(F.linear(x.hidden, x.weight), x.teacher_logits())
        ),
        "eager soft cross-entropy": partial(_backward, _soft_ce),
        "eager kl_div": partial(_backward, _kl_div),
    }
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        found["F.linear_cross_entropy, chunked"] = partial(_backward, _torch_chunked)
    by_hidden_states = case is not None and case.teacher_width is not None
    if by_hidden_states and device.startswith("cuda") and importlib.util.find_spec("liger_kernel") is not None:
        found[LIGER] = partial(_backward, _liger)
    return found


def _backward(loss_of: Callable[[Inputs], Tensor], inputs: Inputs) -> Answer:
    loss = loss_of(inputs)
    grad_hidden, grad_weight = torch.autograd.grad(loss, (inputs.hidden, inputs.weight))
    return loss.detach(), grad_hidden, grad_weight


def _products(inputs: Inputs) -> Answer:
    """What any form must multiply, in the inputs' dtype; the gradient of the logits is taken to be the logits."""
    hidden, weight = inputs.hidden.detach(), inputs.weight.detach()
    logits = hidden @ weight.t()
    teacher = inputs.teacher_logits()
    return teacher[0, 0], logits @ weight, logits.t() @ hidden


def _own_products(inputs: Inputs) -> Answer:
    """The same by `fused_linear_kd`'s own steps, in its chunks and dtypes: all that it does but for the loss."""
    hidden, teacher = inputs.hidden.detach(), inputs.teacher
    student = linear_kd_chunks.layer(inputs.weight.detach(), None, hidden, None)
    taught = inputs.teacher_weight
    teacher_layer = None if taught is None else linear_kd_chunks.layer(taught, None, teacher, None)
    task = linear_kd_chunks.Task(
        hidden,
        student,
        teacher,
        teacher_layer,
        labels=None,
        temperature=1.0,
        kd_weight=1.0,
        label_weight=0.0,
        scale_t2=True,
        ignore_index=-100,
    )
    sums = linear_kd_chunks.Sums(task, None, linear_kd_chunks.Need(True, True, False))
    for rows in linear_kd_chunks.chunks(task, True, None):
        operand = student.operand(hidden[rows])
        logits = student.logits(operand)
        if teacher_layer is not None:
            teacher_layer.logits(teacher_layer.operand(teacher[rows]))
        sums.add(rows, operand, logits)
    assert sums.hidden is not None
    assert sums.weight is not None
    return teacher[0, 0], sums.hidden, sums.weight


def _fused(inputs: Inputs) -> Tensor:
    if inputs.teacher_weight is None:
        return fused_linear_kd(inputs.hidden, inputs.weight, teacher_logits=inputs.teacher)
    return fused_linear_kd(
        inputs.hidden, inputs.weight, teacher_hidden=inputs.teacher, teacher_weight=inputs.teacher_weight
    )


def _soft_ce(inputs: Inputs) -> Tensor:
    return F.cross_entropy(F.linear(inputs.hidden, inputs.weight).float(), inputs.teacher_logits().float().softmax(1))


def _kl_div(inputs: Inputs) -> Tensor:
    log_q = F.linear(inputs.hidden, inputs.weight).float().log_softmax(1)
    return F.kl_div(log_q, inputs.teacher_logits().float().softmax(1), reduction="batchmean")


def _torch_chunked(inputs: Inputs) -> Tensor:
    """Its targets are probabilities, of the inputs' dtype."""
    target = inputs.teacher_logits().float().softmax(1).to(inputs.hidden.dtype)
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(inputs.hidden, inputs.weight, target, options=options)


def _liger(inputs: Inputs) -> Tensor:
    """KL(teacher || student), by chunks of Liger's own; beta 0 is that."""
    liger = importlib.import_module("liger_kernel.transformers.fused_linear_jsd")
    loss: Tensor = liger.LigerFusedLinearJSD(jsd_beta=0.0)(
        inputs.hidden, inputs.weight, inputs.teacher, inputs.teacher_weight, None
    )
    return loss


def truth(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """d loss / d hidden and d loss / d weight in float64 by their formulas, some rows at a time."""
    hidden, weight = inputs.hidden.detach().double(), inputs.weight.detach().double()
    taught = None if inputs.teacher_weight is None else inputs.teacher_weight.double()
    grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight)
    for start in range(0, len(hidden), TRUTH_ROWS):
        rows = slice(start, start + TRUTH_ROWS)
        teacher = inputs.teacher[rows].double()
        teacher = teacher if taught is None else teacher @ taught.t()
        grad = ((hidden[rows] @ weight.t()).softmax(1) - teacher.softmax(1)) / len(hidden)
        grad_hidden[rows] = grad @ weight
        grad_weight += grad.t() @ hidden[rows]
    return grad_hidden, grad_weight


def errors(case: Case, device: torch.device) -> dict[str, dict[str, float]]:
    """Relative errors of the gradients, the larger of the two, by provider and regime."""
    found: dict[str, dict[str, float]] = {}
    for regime in ("random", "near"):
        inputs = make_inputs(case, regime, device)
        exact = truth(inputs)
        for name, step in steps(case, device.type).items():
            if name not in ALONE:
                pairs = zip(step(inputs)[1:], exact, strict=True)
                worst = max(float((value.double() - target).norm() / target.norm()) for value, target in pairs)
                found.setdefault(name, {})[regime] = worst
    return found


def times(case: Case, device: torch.device, seconds: float) -> dict[str, list[float]]:
    """Seconds a call of every provider, in turn."""
    inputs = make_inputs(case, "random", device)
    calls = {name: partial(step, inputs) for name, step in steps(case, device.type).items()}
    if device.type == "cuda":
        calls = {name: synchronized(call) for name, call in calls.items()}  # type: ignore[misc]
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in _rounds(seconds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            found[name].append(time.perf_counter() - start)
    return {name: laps[1:] for name, laps in found.items()}  # the first round warms up


def _rounds(seconds: float) -> Iterator[None]:
    end = time.perf_counter() + seconds
    done = 0
    while done <= LEAST_ROUNDS or time.perf_counter() < end:
        yield
        done += 1


def peak_bytes(case: Case, name: str, device: torch.device) -> int | None:
    """What a call holds at most beyond its inputs, the gradients that it returns included; None where nobody counts."""
    inputs = make_inputs(case, "random", device)
    step = steps(case, device.type)[name]
    teacher_width = None if case.teacher_width is None else 16
    small = Case(rows=8, width=16, classes=50, dtype=case.dtype, teacher_width=teacher_width)
    step(make_inputs(small, "random", device))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step(inputs)
        return torch.cuda.max_memory_allocated(device) - before
    resident, forget = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not forget.exists():
        return None
    _products(inputs)  # BLAS keeps its packing buffers
    forget.write_text("5")
    before = _high_water(resident)
    step(inputs)
    return _high_water(resident) - before


def _high_water(status: Path) -> int:
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def ask(request: dict[str, Any], environment: dict[str, str]) -> Any:
    """A process of its own does it: malloc reads its settings at the start, and memory has one high water."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    command = [sys.executable, "-m", "benchmarks.linear_kd", "--request", json.dumps(request)]
    answer = subprocess.run(command, cwd=ROOT, env=kept | environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(answer.stdout.splitlines()[-1])


def answer(request: dict[str, Any]) -> Any:
    """What a process of `ask` prints."""
    case, device = Case(**request["case"]), torch.device(request["device"])
    if request["what"] == "times":
        return times(case, device, request["seconds"])
    if request["what"] == "memory":
        return peak_bytes(case, request["provider"], device)
    return errors(case, device)


def measure(case: Case, device: str, seconds: float) -> dict[str, Any]:
    """A case's record."""
    request = {"case": asdict(case), "device": device, "seconds": seconds}
    environments: dict[str, dict[str, str]] = {"plain": {}}
    if device == "cpu" and platform.libc_ver()[0] == "glibc":
        environments = {DEFAULT: {}, TUNED: TUNING}
    laps = {name: ask({**request, "what": "times"}, variables) for name, variables in environments.items()}
    names = [name for name in steps(case, device) if name not in ALONE]
    memory = {name: ask({**request, "what": "memory", "provider": name}, EXACT_MALLOC) for name in names}
    return {
        "case": asdict(case),
        "device": device,
        "title": case.title,
        "ms": {
            setting: {name: [1e3 * q for q in quantiles(each)] for name, each in found.items()}
            for setting, found in laps.items()
        },
        "rounds": {setting: len(found[OURS]) for setting, found in laps.items()},
        "peak_bytes": memory,
        "errors": ask({**request, "what": "errors"}, {}),
    }


def verdict(record: dict[str, Any]) -> dict[str, float | None]:
    """Our time over the faster products' in every setting, and our memory over the least of the eager forms'.

    Records from before `OWN_PRODUCTS` have one of the two.
    """
    found: dict[str, float | None] = {
        f"time, {setting}": ms[OURS][1] / min(ms[name][1] for name in ALONE if name in ms)
        for setting, ms in record["ms"].items()
    }
    memory = record["peak_bytes"]
    eager = [value for name, value in memory.items() if name.startswith("eager") and value is not None]
    found["memory"] = memory[OURS] / min(eager) if eager else None
    return found


def verdict_on_gpu(record: dict[str, Any]) -> dict[str, float | None]:
    """What `GPU_TARGETS` bound, None where it was not measured; {} of other cases than theirs."""
    case, ms = Case(**record["case"]), {name: each[1] for name, each in record["ms"]["plain"].items()}
    if case.teacher_width is None:
        return {}
    memory, near = record["peak_bytes"][OURS], record["errors"][OURS]["near"]
    gradients = TORCH_DTYPE[case.dtype].itemsize * (case.rows + case.classes) * case.width  # type: ignore[index]
    return {
        "ms": ms[OURS],
        "share of the products' speed": min(ms[name] for name in ALONE) / ms[OURS],
        "Liger's time over ours": ms[LIGER] / ms[OURS] if LIGER in ms else None,
        "GB beside the gradients": None if memory is None else (memory - gradients) / 1e9,
        "error near the teacher over Liger's": near / record["errors"][LIGER]["near"] if LIGER in ms else None,
    }


def _judged(record: dict[str, Any]) -> list[str]:
    """Each target and what came of it; a record from before GPUs had any is a CPU's."""
    if record.get("device", "cpu") == "cpu":
        return [
            f"{what}: {value:.2f} (target {MEMORY_TARGET if what == 'memory' else TIME_TARGET})"
            for what, value in verdict(record).items()
            if value is not None
        ]
    found = []
    for what, value in verdict_on_gpu(record).items():
        how, bound = GPU_TARGETS[what]
        found.append(f"{what}: {'not measured' if value is None else f'{value:.3g}'} (target {how} {bound:.4g})")
    return found


def table(record: dict[str, Any]) -> str:
    """A record as Markdown."""
    settings = list(record["ms"])
    rows = [
        ["", *(f"ms, {s}" for s in settings), "peak MB", "error, random", "error, near"],
        ["---"] * (len(settings) + 4),
    ]
    for name in record["ms"][settings[0]]:
        memory, wrong = record["peak_bytes"].get(name), record["errors"].get(name, {})
        row = [name, *(f"{record['ms'][s][name][1]:.4g}" for s in settings)]
        row.append("" if memory is None else f"{memory / 1e6:.0f}")
        rows.append(row + [f"{wrong[regime]:.1e}" if regime in wrong else "" for regime in ("random", "near")])
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([f"### {record['title']}", "", *lines, "", "; ".join(_judged(record)), ""])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.linear_kd", description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the record there too")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"of a case's rounds, {SECONDS:.0f} by default")
    parser.add_argument("--request", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.request:
        print(json.dumps(answer(json.loads(options.request))))
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    described = machine.describe(device)
    print(f"{machine.name(described)}, {described['date']}, load {described['load_at_start']:.2f}\n")
    records = []
    for case in CASES[device]:
        records.append(measure(case, device, options.seconds))
        print(table(records[-1]))
    if options.json:
        options.json.write_text(json.dumps({**described, "records": records}, indent=1) + "\n")


if __name__ == "__main__":
    main()
