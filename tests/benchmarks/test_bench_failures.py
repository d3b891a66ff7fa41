"""What fails is a line in the results, and the rest goes on."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import cuda, gate, measure, report, session
from benchmarks import run as runs
from benchmarks.cases import HUGE, LARGE, SMALL, Case
from benchmarks.providers import Provider, Step, providers
from benchmarks.session import DEFAULT, TUNED, OutOfTime, Session, Worker, WorkerDied, WorkerFailed

CASE = Case(objective="kd", rows=2, classes=3, dtype="fp32")

# Answers a request as the workers do, with a provider "bad" that ends it, in a way that the environment names.
WORKER = """
import json, os, sys, time
for line in sys.stdin:
    request = json.loads(line)
    for name in ("good", "bad"):
        if name in request["excluded"]:
            continue
        print(json.dumps({"at": name}), flush=True)
        while name == "bad" and os.environ["HOW"] == "hang":
            time.sleep(60)
        if name == "bad" and os.environ["HOW"] == "crash":
            print("CUDA error: misaligned address", file=sys.stderr)
            os._exit(3)
    records = [{"setting": setting, "excluded": request["excluded"]} for setting in request["settings"]]
    print(json.dumps({"at": ""}), flush=True)
    print(json.dumps({"records": records, "peak_bytes": 1000}), flush=True)
"""


class Watched(Worker):
    """A `WORKER`, waited for as long as a busy machine takes to run it; from when it hangs on, no longer at all."""

    def __init__(self, environment: dict[str, str], device: str) -> None:
        super().__init__(environment, device, ("-c", WORKER))
        self._hangs = False

    def _line(self, ends: float | None, silence: float) -> bytes:
        line = super()._line(ends, 0.0 if self._hangs else silence)
        self._hangs = os.environ["HOW"] == "hang" and json.loads(line) == {"at": "bad"}
        return line


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Worker]]:
    """The processes that a session starts, all of them `WORKER`s."""
    started: list[Worker] = []

    def start(environment: dict[str, str], device: str) -> Worker:
        started.append(Watched(environment, device))
        return started[-1]

    monkeypatch.setattr(session, "Worker", start)
    monkeypatch.setattr("platform.libc_ver", lambda: ("glibc", "2.36"))
    yield started
    for worker in started:
        worker.close()


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("crash", "a measuring process ended with status 3: CUDA error: misaligned address"),
        ("hang", "a measuring process hung: no sign of it for 300 s"),
    ],
)
def test_a_provider_that_its_process_dies_of_is_left_out(
    how: str, why: str, workers: list[Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOW", how)
    measuring = Session("cpu")
    records = measuring.measure(CASE, autotune=False)
    assert [each["setting"] for each in records] == [DEFAULT, TUNED]
    for each in records:
        assert each["excluded"] == {"bad": f"in kd-2x3-fp32-random: {why}"}
    assert len(workers) == 3  # one died; the other setting's, and other cases, know
    measuring.measure(CASE, autotune=False)
    assert len(workers) == 3
    assert measuring.peak_bytes == {DEFAULT: 1000, TUNED: 1000}
    measuring.close()


def test_a_case_out_of_time_leaves_no_process_in_the_middle_of_it(
    workers: list[Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOW", "hang")
    measuring = Session("cpu", ends=0.0)
    with pytest.raises(OutOfTime):
        measuring.measure(CASE, autotune=False)
    assert workers[0]._process.poll() is not None


def test_a_process_that_dies_in_nobodys_turn_fails_its_case(monkeypatch: pytest.MonkeyPatch) -> None:
    class Dying:
        def __init__(self, *environment: object) -> None: ...

        def ask(self, *request: object) -> None:
            raise WorkerDied("out of memory", "")

        def close(self) -> None: ...

    monkeypatch.setattr(session, "Worker", Dying)
    with pytest.raises(WorkerFailed, match="out of memory"):
        Session("cuda").measure(CASE, autotune=False)


def test_an_error_that_the_device_does_not_survive_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not just its provider: all that follow would fail by it."""

    def build() -> Step:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nand more")

    bad = Provider(name="bad", kind="eager", loss="kl", build=build)
    candidate = measure.prepare(CASE, bad, torch.device("cpu"))
    assert candidate.failed == "RuntimeError: CUDA error: an illegal memory access was encountered"
    monkeypatch.setattr(cuda, "usable", lambda: False)
    with pytest.raises(cuda.Lost, match="illegal memory access"):
        measure.prepare(CASE, bad, torch.device("cpu"))


@pytest.mark.parametrize("when", ["lap", "rounds", "extra"])
def test_memory_may_end_at_any_time(when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a provider's warm-up, in its turns, or when its memory is measured."""

    def run_out(*_: object) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 4 GiB")

    def step(x: Any) -> Any:
        return (x.student * x.teacher).sum(), None

    def bench(name: str) -> measure.Candidate:
        return measure.Candidate(Provider(name=name, kind="eager", loss="kl", build=lambda: step), step=step)

    lap, extra = measure._lap, measure._extra

    def lap_of(candidate: measure.Candidate, *rest: Any) -> Any:
        if candidate.provider.name == "bad" and when != "extra":
            return run_out() if when == "lap" else (run_out, 1, 1e-3)
        return lap(candidate, *rest)

    monkeypatch.setattr("benchmarks.harness.WARM_UP", 1e-3)
    monkeypatch.setattr(measure, "_lap", lap_of)
    monkeypatch.setattr(measure, "_extra", lambda c, *rest: run_out() if c.provider.name == "bad" else extra(c, *rest))
    monkeypatch.setattr(measure, "streams", lambda device: {"copy": (lambda: None, 1), "2R1W": (lambda: None, 1)})
    measuring = measure.Bench(torch.device("cpu"), _kind=CASE.kind)
    measuring._prepared = {name: bench(name) for name in ("bad", "good")}
    candidates = [each.provider for each in measuring._prepared.values()]
    (found,) = measuring.measure(CASE, candidates, [DEFAULT], seconds=0.0)
    bad, good = (found["providers"][name] for name in ("bad", "good"))
    assert bad["time"] is None
    assert bad["failed"] == f"{DEFAULT}: OutOfMemoryError: CUDA out of memory. Tried to allocate 4 GiB"
    assert good["failed"] is None
    assert good["time"]["ms"] > 0
    assert measuring._prepared["bad"].failed is None  # it may fit in another setting


@pytest.mark.slow
def test_what_the_sanitizer_watches_holds_by_itself() -> None:
    """Shown by the one backend for GPUs that runs without one, in Triton's interpreter: in a process of its own."""
    pytest.importorskip("triton", reason="Triton is not installed (it comes with torch where torch is built for CUDA)")
    code = "import torch; from benchmarks.sanitize import main; main(torch.device('cpu'), [(3, 2), (4, 33)])"
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=report.ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "triton: 2 shapes\ndense blocks\n"


def test_settings_of_a_gpu() -> None:
    """A cold L2 needs inputs to rotate over: not so many that a graph of them cannot be built."""

    def settings(shape: tuple[int, int]) -> list[str]:
        return cuda.settings(Case(objective="kd", rows=shape[0], classes=shape[1], dtype="fp32"))

    assert settings(SMALL) == [cuda.PLAIN, cuda.GRAPH_WARM]
    assert settings(LARGE) == [cuda.PLAIN, cuda.GRAPH_COLD, cuda.GRAPH_WARM]
    assert settings(HUGE) == [cuda.PLAIN]


@pytest.mark.parametrize(("shape", "sets"), [(SMALL, cuda.MOST_SETS), ((512, 2048), 18), (LARGE, 2), (HUGE, 1)])
def test_sets_keep_a_cache_of_50_mb_cold(shape: tuple[int, int], sets: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: type("Card", (), {"L2_cache_size": 50 * 10**6})
    )
    case = Case(objective="kd", rows=shape[0], classes=shape[1], dtype="fp32")
    assert cuda.sets_for(case, torch.device("cuda")) == sets
    assert sets == cuda.MOST_SETS or sets * 2 * case.tensor_bytes >= 3 * 50 * 10**6


class _JSD(nn.Module):
    """What LigerJSD at beta 0 computes: KL(p || q) over rows, from log-probabilities."""

    def __init__(self, beta: float) -> None:
        super().__init__()
        assert beta == 0

    def forward(self, log_q: Tensor, log_p: Tensor) -> Tensor:
        return nn.functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


@pytest.fixture
def liger(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Liger-Kernel that computes in plain PyTorch."""
    parts: dict[str, dict[str, Any]] = {"kl_div": {"LigerKLDIVLoss": nn.KLDivLoss}, "jsd": {"LigerJSD": _JSD}}
    for name, contents in parts.items():
        module = ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, f"liger_kernel.transformers.{name}", module)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)


@pytest.mark.usefixtures("liger")
@pytest.mark.parametrize("objective", ["kd", "kd_labels"])
def test_liger_is_given_what_it_takes(objective: Any) -> None:
    """Log-probabilities and probabilities: with the softmaxes before it, its losses pass the gate."""
    case = Case(objective=objective, rows=6, classes=33, dtype="fp32")
    found = [each for each in providers(objective, "fp32", "cuda", autotune=False) if each.kind == "liger"]
    assert [each.name for each in found] == ["Liger KLDIV", "Liger JSD, beta 0"]
    for each in found:
        assert each.absent is None
        errors = gate.measure(case, "random", each, each.build(), torch.device("cpu"))
        assert errors is not None
        assert gate.refusal(errors, "fp32") is None


def test_liger_is_absent_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    for installed, device, reason in (
        (None, "cuda", "liger-kernel is not installed"),
        ("there", "cpu", "Liger's kernels are Triton's, for GPUs"),
    ):
        monkeypatch.setattr("importlib.util.find_spec", lambda name, found=installed: found)
        reasons = {each.absent for each in providers("kd", "fp32", device, autotune=False) if each.kind == "liger"}
        assert reasons == {reason}
    assert not [each for each in providers("dkpp", "fp32", "cuda", autotune=False) if each.kind == "liger"]


def test_open_triton_peers_are_named_absent_or_given_what_they_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """speculators' loss takes logits [1, T, V] and answers row by row; Fast-LLM's kernels cannot be installed."""
    module = ModuleType("fused")

    def fused(z: Tensor, t: Tensor) -> Tensor:
        return nn.functional.kl_div(z.log_softmax(-1), t.log_softmax(-1), reduction="none", log_target=True).sum(-1)

    vars(module)["fused_kl_div_loss"] = fused
    monkeypatch.setitem(sys.modules, "speculators.losses.fused", module)
    monkeypatch.setitem(sys.modules, "speculators", ModuleType("speculators"))
    monkeypatch.setitem(sys.modules, "speculators.losses", ModuleType("losses"))
    for objective in ("kd", "kd_labels"):
        for installed, device, reason in (
            (None, "cuda", "speculators is not installed"),
            ("there", "cpu", "speculators' kernels are Triton's, for GPUs"),
            ("there", "cuda", None),
        ):
            monkeypatch.setattr("importlib.util.find_spec", lambda name, found=installed: found)
            first, second = (p for p in providers(objective, "fp32", device, autotune=False) if p.kind == "triton")
            assert (first.name, first.absent) == ("speculators KL", reason)
            assert second.absent is not None
            assert "Fast-LLM is on no package index" in second.absent
        case = Case(objective=objective, rows=6, classes=33, dtype="fp32")
        errors = gate.measure(case, "random", first, first.build(), torch.device("cpu"))
        assert errors is not None
        assert gate.refusal(errors, "fp32") is None


BENCHMARKS = """
import sys, time
sys.path.insert(0, {root!r})
from benchmarks import run
run.MINUTES = (0.0, 10.0)
from benchmarks import conftest
conftest.GRACE = 0.0
from benchmarks.conftest import *
"""
TESTS = """
import pytest, time
from benchmarks.conftest import RUN
@pytest.fixture
def nearly_over(pytestconfig): pytestconfig.stash[RUN]._session.ends = time.monotonic() + 1
def test_quick(benchmark): benchmark.pedantic(lambda: None)
@pytest.mark.usefixtures("nearly_over")
def test_endless(benchmark): benchmark.pedantic(lambda: time.sleep(600))
def test_later(benchmark): benchmark.pedantic(lambda: None)
"""


def test_a_session_ends_in_time_whatever_is_in_it(tmp_path: Path) -> None:
    """A benchmark of any kind is given up, or not begun, when the run's minutes are over, and named at the end."""
    (tmp_path / "conftest.py").write_text(BENCHMARKS.format(root=str(report.ROOT)))
    (tmp_path / "test_any.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--benchmark-only", "-q", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert "1 passed, 2 skipped" in done.stdout, done.stdout
    for name in ("endless", "later"):
        assert f"test_any.py::test_{name}: for want of time" in done.stdout
    assert "test_quick: for want" not in done.stdout


def test_losses_have_the_first_turn() -> None:
    """Whatever comes last may find the run's time over."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--collect-only", "-q", "benchmarks"]
    done = subprocess.run(command, cwd=report.ROOT, capture_output=True, text=True, timeout=600)
    files = [line.split("::")[0] for line in done.stdout.splitlines() if "::" in line]
    names = ("losses", "loaders", "step", "densenet")
    assert list(dict.fromkeys(files)) == [f"benchmarks/test_{name}.py" for name in names], done.stderr


def test_the_processes_of_a_usual_run_stay_within_12_gb() -> None:
    """Two of them, of 6 GB each; --full may take more."""
    with runs.Run("cpu", full=False, minutes=runs.MINUTES) as usual, runs.Run("cpu", full=True, minutes=None) as full:
        assert usual._session.most_bytes == 6 * 10**9
        assert len(usual._session.environments) <= 2
        assert full._session.most_bytes is None
    worker = Worker({}, "cpu")
    try:
        request = {"case": {"objective": "unknown", "rows": 2, "classes": 3, "dtype": "fp32"}, "device": "cpu"}
        request |= {"autotune": False, "most_bytes": 6 * 10**9}
        assert "KeyError" in worker.ask(request, None, 300.0)["error"]
        limits = Path(f"/proc/{worker.pid}/limits")
        if not limits.exists():
            pytest.skip("this system has no /proc to read a process's limits from")
        (line,) = [each for each in limits.read_text().splitlines() if each.startswith("Max data size")]
        assert line.split()[3] == str(6 * 10**9)
    finally:
        worker.close()
