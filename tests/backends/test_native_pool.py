"""Memory for large results: whose it is, how long, how much is kept, and that it costs no page faults."""

import gc
import multiprocessing
import os
import random
import resource
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from native_cases import kd
from reference_truth import KD
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ban_fast import _native
from ban_fast.backends import native
from ban_fast.losses import kd_loss

HERE = Path(__file__).parent
PATIENCE = 300
"""Seconds, of which a sound process needs one, and more where others have the cores: beyond it hangs."""
ROWS, CLASSES = 300, 1000
MIB = 1 << 20


def inputs(seed: int = 0, rows: int = ROWS) -> tuple[Tensor, Tensor]:
    """Logits whose gradient is 1.1 MiB: pooled."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, rows, CLASSES, generator=generator)
    return student, teacher


def gradient(seed: int = 0, rows: int = ROWS) -> Tensor:
    grad = kd(*inputs(seed, rows), reduction="sum").grad
    assert grad is not None
    return grad


def row_by_row(seed: int = 0, rows: int = ROWS) -> Tensor:
    """The same in plain memory: parts below what is pooled."""
    student, teacher = inputs(seed, rows)
    parts = [kd(s, t, reduction="sum").grad for s, t in zip(student.split(50), teacher.split(50), strict=True)]
    return torch.cat([part for part in parts if part is not None])


def owned() -> int:
    return _native.pool_use()[0]


@pytest.fixture(autouse=True)
def _nothing_is_owned_after() -> Any:
    gc.collect()
    before = owned()
    yield
    gc.collect()
    assert owned() == before


def saved_for_backward(grad: Tensor) -> Tensor:
    return torch.ones((), requires_grad=True) * grad


HOLDERS: dict[str, Callable[[Tensor], Any]] = {
    "itself": lambda grad: grad,
    "view": lambda grad: grad.view(-1)[17:18],
    "detached": lambda grad: grad.detach(),
    "transposed": lambda grad: grad.t(),
    "storage": lambda grad: grad.untyped_storage(),
    "numpy": lambda grad: grad.numpy()[::2],
    "dlpack": lambda grad: torch.from_dlpack(grad)[5],
    "saved": saved_for_backward,
    "pickled": lambda grad: (grad[3:], torch.nn.Parameter(grad)),
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_memory_is_handed_out_again_only_when_nothing_refers_to_it(holder: str) -> None:
    native.empty_pool()
    before, grad = owned(), gradient()
    expected, begin, end = grad.clone(), grad.data_ptr(), grad.data_ptr() + grad.nbytes
    held = HOLDERS[holder](grad)
    copy = torch.from_numpy(held.copy()) if holder == "numpy" else None
    del grad
    gc.collect()
    others = [gradient(seed) for seed in range(1, 6)]
    assert all(other.data_ptr() >= end or other.data_ptr() + other.nbytes <= begin for other in others)
    if holder == "storage":
        assert torch.equal(torch.empty(0).set_(held, 0, expected.shape), expected)
    elif copy is not None:
        assert torch.equal(torch.from_numpy(held), copy)
    elif holder == "itself":
        assert torch.equal(held, expected)
    del held, others
    gc.collect()
    assert owned() == before


def test_a_block_is_used_again() -> None:
    native.empty_pool()
    addresses = {gradient(seed).data_ptr() for seed in range(5)}
    assert len(addresses) == 1
    assert torch.equal(gradient(7), row_by_row(7))


def test_two_losses_alive_and_gradients_that_add_up() -> None:
    (student, first), (_, second) = inputs(0), inputs(1)
    student.requires_grad_()
    expected = torch.zeros_like(student)
    for _ in range(3):
        losses = [kd_loss(student, teacher, backend="native") for teacher in (first, second)]
        for loss in losses:
            loss.backward()
        expected += kd(student.detach(), first).grad
        expected += kd(student.detach(), second).grad
    assert student.grad is not None
    assert torch.equal(student.grad, expected)
    kept_graph = kd_loss(student, first, backend="native")
    (grad,) = torch.autograd.grad(kept_graph, student)
    before = grad.clone()
    for seed in range(4):
        gradient(seed)
    assert torch.equal(grad, before)


def test_threads_never_share_a_block() -> None:
    expected = [row_by_row(seed) for seed in range(4)]
    wrong: list[int] = []

    def work(seed: int) -> None:
        previous = gradient(seed)
        for _ in range(20):
            grad = gradient(seed)
            if not (torch.equal(grad, expected[seed]) and torch.equal(previous, expected[seed])):
                wrong.append(seed)
            previous = grad

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(PATIENCE)
        assert not worker.is_alive()
    assert wrong == []


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")
def test_a_forked_child_has_memory_of_its_own() -> None:
    grad, expected, other = gradient(0), row_by_row(0), row_by_row(1)
    gradient(2)  # leaves a block that is kept
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def in_child() -> None:
        torch.set_num_threads(1)
        kept = _native.pool_use()[2]
        same = torch.equal(grad, expected) and torch.equal(gradient(1), other)
        grad.zero_()
        sender.send((kept, same, torch.equal(gradient(1), other)))

    child = context.Process(target=in_child)
    child.start()
    try:
        assert receiver.poll(PATIENCE), "the forked child hangs"
        assert receiver.recv() == (0, True, True)
    finally:
        child.kill()
        child.join()
    assert torch.equal(grad, expected)
    assert torch.equal(gradient(1), other)


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")
def test_forks_while_threads_take_and_give() -> None:
    stop = threading.Event()

    def churn() -> None:
        while not stop.is_set():
            gradient(0)

    busy = threading.Thread(target=churn)
    busy.start()
    context = multiprocessing.get_context("fork")
    try:
        for _ in range(10):
            child = context.Process(target=lambda: [_native.PooledMemory(2 * MIB) for _ in range(3)])
            child.start()
            child.join(PATIENCE)
            assert child.exitcode == 0
    finally:
        stop.set()
        busy.join()


def test_no_more_is_kept_than_was_in_use_at_once() -> None:
    native.empty_pool()
    draw = random.Random(0)
    alive: list[Any] = []
    for _ in range(300):
        alive.append(_native.PooledMemory(draw.randrange(1, 40 * MIB)))
        del alive[: draw.randrange(3)]
        now, most, kept = _native.pool_use()
        assert now + kept <= most
    alive.clear()
    native.empty_pool()
    assert _native.pool_use()[2] == 0


IN_A_PROCESS = """
from ban_fast import _native
blocks = [_native.PooledMemory(3 << 20) for _ in range(5)]
del blocks
print(_native.pool_use()[2] >> 20)
large = _native.PooledMemory(100 << 20)
del large
print(_native.pool_use()[2] >> 20)
"""


@pytest.mark.parametrize(("mib", "kept"), [("8", ["6", "0"]), ("0", ["0", "0"]), ("", ["15", "100"])])
def test_the_limit_is_the_environment_s(mib: str, kept: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", IN_A_PROCESS],
        env={**os.environ, "BAN_FAST_POOL_MIB": mib},
        cwd=HERE,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == kept


@pytest.mark.parametrize("mib", ["much", "-1", "12MB", "99999999999999999999"])
def test_a_limit_that_is_no_number_is_named(mib: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", IN_A_PROCESS],
        env={**os.environ, "BAN_FAST_POOL_MIB": mib},
        cwd=HERE,
        capture_output=True,
        text=True,
    )
    assert f"ValueError: BAN_FAST_POOL_MIB is '{mib}'; a number of MiB is needed, such as 256" in done.stderr


def test_large_gradients_cost_no_page_faults() -> None:
    student, teacher = torch.randn(2, 1120, 10000)
    student.requires_grad_()

    def step() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        student.grad = None
        kd_loss(student, teacher, backend="native").backward()
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    step()
    # Fresh memory of 45 MB takes 10,938; the interpreter may take a few for itself.
    assert min(step() for _ in range(3)) < 100
    student.grad = None
    native.empty_pool()


def test_blocks_are_aligned_to_pages_and_keep_their_bytes() -> None:
    for size in (1, 4095, 4097, 5 * MIB, 33 * MIB + 1):
        block = torch.frombuffer(_native.PooledMemory(size), dtype=torch.uint8)
        assert block.numel() == size
        assert block.data_ptr() % (2 * MIB if size > 16 * MIB else 4096) == 0
        block.fill_(7)
        assert int(block.min()) == 7


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_every_dtype_and_targets(dtype: torch.dtype) -> None:
    student, teacher = (logits.to(dtype) for logits in inputs(rows=600))
    output = native.kd(student, teacher, None, None, **KD)
    assert output.grad is not None
    assert output.grad.dtype == dtype
    assert output.grad.shape == student.shape
    targets = native.dkpp_targets(teacher, None, 0, None, seed=0, temperature=1.0)
    assert targets.shape == teacher.shape
    assert owned() >= output.grad.nbytes + targets.nbytes


def test_what_users_do_with_gradients(tmp_path: Path) -> None:
    grad, expected = gradient(), row_by_row()
    torch.save(grad, tmp_path / "grad.pt")
    assert torch.equal(torch.load(tmp_path / "grad.pt"), expected)
    shared = gradient()
    shared.share_memory_()
    assert shared.is_shared()
    assert torch.equal(shared, expected)
    gradient(3)
    assert torch.equal(shared, expected)
    shrunk = gradient().resize_(10, 10)
    assert torch.equal(shrunk.flatten(), expected.flatten()[:100])
    with pytest.raises(RuntimeError, match="not resizable"):
        gradient().resize_(2 * ROWS, CLASSES)
    grad.mul_(2).add_(1)
    torch.add(expected, 1, out=grad)
    assert torch.equal(grad, expected + 1)


class Gradients(Dataset[Tensor]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Tensor:
        return gradient(index)


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")
def test_gradients_from_a_loader_worker() -> None:
    gradient(9)
    loader = DataLoader(Gradients(), batch_size=None, num_workers=1, multiprocessing_context="fork", timeout=PATIENCE)
    for index, grad in enumerate(loader):
        assert torch.equal(grad, row_by_row(index))


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_steps_own_their_memory(compiler: str) -> None:
    student, teacher = inputs()
    student.requires_grad_()

    @torch.compile(backend=compiler, fullgraph=True)
    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        return kd_loss(student * 2.0, teacher, backend="native")

    grads = [torch.autograd.grad(loss(student, t), student)[0] for t in (teacher, teacher + 0.0, teacher * 0.5)]
    for grad, t in zip(grads, (teacher, teacher, teacher * 0.5), strict=True):
        (expected,) = torch.autograd.grad(kd_loss(student * 2.0, t, backend="reference"), student)
        torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-9)
