"""Threads, forks and instruction sets: none of them may change a bit that is promised."""

import multiprocessing
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from native_cases import kd
from reference_truth import KD
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ban_fast import _native
from ban_fast.backends import dense_native, native

HERE = Path(__file__).parent
PATIENCE = 300
"""Seconds, of which a sound process needs one, and more where others have the cores: beyond it hangs."""


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def inputs(rows: int = 203, classes: int = 1001) -> tuple[Tensor, Tensor, Tensor]:
    """Large enough for several threads, of a length that no number of them divides."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, rows, classes, generator=generator)
    return student, teacher, torch.arange(rows)


def every_function() -> list[Tensor]:
    student, teacher, labels = inputs()
    options: dict[str, Any] = {**KD, "label_weight": 0.5, "temperature": 2.0}
    distilled = native.kd(student, teacher, labels, None, **options)
    permuted = native.dkpp(student, teacher, labels, None, 3, None, seed=1, **options)
    arguments = (student, teacher, labels, None, None, None)
    weighted = native.cwtm(*arguments, weight_by="teacher_max", ignore_index=0, need_grad=True)
    scaled = native.scale_grad_(native.kd(student, teacher, None, None, **options).grad, torch.tensor(0.3), None)
    targets = native.dkpp_targets(teacher, None, 3, None, seed=1, temperature=2.0)
    outputs = [tensor for output in (distilled, permuted, weighted) for tensor in output if tensor is not None]
    return [*outputs, scaled, targets, *products()]


def products() -> list[Tensor]:
    """Through a 1x1 convolution of normalised rows, and back."""
    generator = torch.Generator().manual_seed(0)
    x, grad, weight = (torch.randn(shape, generator=generator) for shape in ((500, 33), (500, 75), (75, 33)))
    scale, shift, mean = torch.randn(3, 33, generator=generator)
    out, into, sums = torch.empty(500, 75), torch.zeros(500, 33), torch.zeros(2, 33)
    weight_grad = torch.zeros_like(weight)
    dense_native.pointwise(x, scale, shift, weight, out)
    dense_native.pointwise_backward(grad, x, scale, shift, mean, weight, into, sums, weight_grad, add=True)
    return [out, into, sums, weight_grad]


def same(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return len(ours) == len(theirs) and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_bits_do_not_depend_on_the_number_of_threads() -> None:
    torch.set_num_threads(1)
    alone = every_function()
    for threads in (2, 3, 8):
        torch.set_num_threads(threads)
        for _ in range(5):
            assert same(every_function(), alone)


def test_python_threads_at_once() -> None:
    expected = every_function()
    results: list[bool] = []
    workers = [
        threading.Thread(target=lambda: results.extend(same(every_function(), expected) for _ in range(5)))
        for _ in range(4)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(PATIENCE)
    assert results == [True] * 20


def test_work_is_done_on_the_threads_of_torch() -> None:
    """Two teams would share the cores: torch's spins for milliseconds after each of its operations."""
    code = (
        "import os, torch, test_native_processes as these\n"
        "torch.set_num_threads(2)\n"
        "torch.ones(1 << 20).exp_()\n"
        "before = os.listdir('/proc/self/task')\n"
        "these.every_function()\n"
        "print(len(before) > 1, os.listdir('/proc/self/task') == before)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True, timeout=2 * PATIENCE
    )
    assert result.stdout.split() == ["True", "True"], result.stderr


def test_a_fork_before_the_first_work_of_ours() -> None:
    code = (
        "import os, signal, torch, test_native_processes as these\n"
        "torch.set_num_threads(2)\n"
        "torch.ones(1 << 20).exp_()\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        f"    signal.alarm({PATIENCE})\n"
        "    these.every_function()\n"
        "    os._exit(0)\n"
        "print(os.waitpid(child, 0)[1])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True, timeout=2 * PATIENCE
    )
    assert result.stdout.split() == ["0"], result.stderr


def in_a_fork(work: Callable[[], object]) -> object:
    """What `work` returns in a forked child: with a pool that does not survive the fork it would wait for ever.

    Our functions alone may run there on two threads: torch's own OpenMP hangs in a child of a process that has used it.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=lambda: sender.send(work()))
    child.start()
    try:
        assert receiver.poll(PATIENCE), "the forked child hangs"
        return receiver.recv()
    finally:
        child.kill()
        child.join()


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")
def test_a_forked_process_has_a_pool_of_its_own() -> None:
    expected = every_function()  # the parent's pool has its workers

    def again() -> tuple[bool, bool]:
        """Whether the bits are the same, and whether a second thread has come."""
        outputs = every_function()
        has_worker = len(os.listdir("/proc/self/task")) > 1
        torch.set_num_threads(1)
        equal = same(outputs, expected)
        torch.set_num_threads(2)
        return equal, has_worker

    assert in_a_fork(again) == (True, True)
    assert in_a_fork(lambda: [again(), in_a_fork(again)]) == [(True, True)] * 2
    assert again() == (True, True)


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")
def test_a_fork_while_the_pool_works() -> None:
    student, teacher, _ = inputs()
    expected = kd(student, teacher).loss
    stop = threading.Event()

    def keep_busy() -> None:
        while not stop.is_set():
            kd(student, teacher)

    busy = threading.Thread(target=keep_busy)
    busy.start()
    try:
        for _ in range(10):
            assert in_a_fork(lambda: float(kd(student, teacher).loss)) == float(expected)
    finally:
        stop.set()
        busy.join()


class Losses(Dataset[Tensor]):
    def __init__(self, student: Tensor, teacher: Tensor) -> None:
        self.student, self.teacher = student, teacher

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Tensor:
        torch.set_num_threads(2)  # a worker is given one
        return kd(self.student, self.teacher, temperature=1.0 + index).loss


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")
def test_a_forked_loader_worker() -> None:
    student, teacher, _ = inputs()
    expected = [kd(student, teacher, temperature=1.0 + index).loss for index in range(4)]
    loader = DataLoader(
        Losses(student, teacher), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=PATIENCE
    )
    assert same(list(loader), expected)


def run_with(isa: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "BAN_FAST_ISA": isa, "OMP_NUM_THREADS": "1"},
        cwd=HERE,
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE,
    )


@pytest.fixture(scope="module")
def instruction_sets() -> list[str]:
    """Those that this machine has, as the refusal of an unknown one lists them."""
    refused = run_with("nonesuch", "-c", "from ban_fast import _native; _native.instruction_set()")
    found = re.search(r"ValueError: BAN_FAST_ISA is 'nonesuch'; this machine has: (.*)", refused.stderr)
    assert found, refused.stderr
    return found[1].split(", ")


def test_baseline_is_everywhere_and_the_best_is_used(instruction_sets: list[str]) -> None:
    assert instruction_sets[0] == "baseline"
    if "BAN_FAST_ISA" not in os.environ:
        assert _native.instruction_set() == instruction_sets[-1]


@pytest.mark.slow
def test_info_says_which_is_used_and_what_is_wrong_with_a_name(instruction_sets: list[str]) -> None:
    assert "CPU in _native   baseline" in run_with("baseline", "-m", "ban_fast", "info").stdout
    listed = ", ".join(instruction_sets)
    wrong = run_with("nonesuch", "-m", "ban_fast", "info").stdout
    assert f"CPU in _native   none: BAN_FAST_ISA is 'nonesuch'; this machine has: {listed}" in wrong


@pytest.mark.parametrize(
    ("name", "value", "said", "command"),
    [
        ("BAN_FAST_ISA", "nonesuch", "BAN_FAST_ISA is 'nonesuch'; this machine has: baseline", ("train",)),
        ("BAN_FAST_POOL_MIB", "-5", "BAN_FAST_POOL_MIB is '-5'; a number of MiB is needed", ("train",)),
        ("BAN_FAST_POOL_MIB", "x", "BAN_FAST_POOL_MIB is 'x'; a number of MiB is needed", ("sweep", "--seeds", "0,1")),
    ],
)
def test_training_is_refused_before_anything_is_written(
    tmp_path: Path, name: str, value: str, said: str, command: tuple[str, ...]
) -> None:
    refused = subprocess.run(
        [sys.executable, "-m", "ban_fast", *command, "--device", "cpu", "--out", tmp_path / "run"],
        env={**os.environ, name: value, "OMP_NUM_THREADS": "1"},
        cwd=HERE,
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE,
    )
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.startswith(f"ban-fast: {said}")
    assert refused.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_every_instruction_set_passes_the_kernels_tests(instruction_sets: list[str]) -> None:
    for isa in instruction_sets:
        if isa == _native.instruction_set():
            continue  # the one that this run uses
        tests = ("test_native_kd.py", "test_native_dkpp.py", "../models/test_models_densenet_shared_pointwise.py")
        done = run_with(isa, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests)
        assert done.returncode == 0, f"{isa}: {done.stdout[-3000:]}"


SAVE = """
import sys, torch
from ban_fast import _native
sys.path.insert(0, {here!r})
from test_native_processes import every_function
torch.save([_native.instruction_set(), every_function()], {path!r})
"""


@pytest.mark.slow
def test_instruction_sets_with_fma_give_the_same_bits(instruction_sets: list[str], tmp_path: Path) -> None:
    results = {}
    for isa in instruction_sets:
        path = str(tmp_path / isa)
        done = run_with(isa, "-c", SAVE.format(here=str(HERE), path=path))
        assert done.returncode == 0, done.stderr
        name, results[isa] = torch.load(path)
        assert name == isa
    with_fma = [results[isa] for isa in instruction_sets if isa != "baseline"]
    for other in with_fma[1:]:
        assert same(other, with_fma[0])
    for isa in instruction_sets[1:]:
        for ours, theirs in zip(results["baseline"], results[isa], strict=True):
            assert float((ours - theirs).norm()) <= 1e-6 * float(theirs.norm())
