"""The CUDA kernels on a GPU: the emulator's contract, and what only a device has."""

from typing import Any

import pytest
import torch
from cuda_contract import CWTM, ERROR, FAR_ERROR, STORED, TEACHER_ROWS, Contract, labels_of, logits, relative
from reference_truth import KD, truth
from torch import Tensor

from ban_fast.backends import native_cuda
from ban_fast.backends.interface import LossOutput
from ban_fast.losses import cwtm_loss, dkpp_loss, kd_loss

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

CUDA = torch.device("cuda", 0)


@pytest.fixture
def device() -> torch.device:
    problem = native_cuda.problem()
    if problem is not None:
        pytest.skip(problem)
    return CUDA


class TestOnTheDevice(Contract):
    @pytest.mark.parametrize("types", [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16)])
    @pytest.mark.parametrize("classes", [20000, 32000, 50257, 128256, 300007])
    def test_large_rows(self, device: torch.device, classes: int, types: tuple[torch.dtype, torch.dtype]) -> None:
        """One block's shared memory, clusters of 2 to 16, and what is read twice."""
        student, teacher = (x.to(dtype) for x, dtype in zip(logits(classes, "random"), types, strict=True))
        labels, rows = labels_of(classes), torch.tensor(TEACHER_ROWS)
        options = {**KD, "temperature": 3.5, "label_weight": 0.3, "divergence": "ce"}
        self.check("kd", device, student, teacher, labels, rows, **options)
        self.check("dkpp", device, student, teacher, labels, None, 5, rows, seed=2, **options)
        self.check("cwtm", device, student, teacher, labels, None, None, rows, **CWTM)

    @pytest.mark.parametrize("regime", ["leaping", "late", "far"])
    @pytest.mark.parametrize(
        ("classes", "dtype"), [(32000, torch.float64), (32000, torch.float32), (600_001, torch.float32)]
    )
    def test_large_rows_that_leap(self, device: torch.device, classes: int, dtype: torch.dtype, regime: str) -> None:
        """Read twice in fp64, in fp32 on an A100, and of 4.8 MB everywhere: no cluster holds so much. A thread adds up
        2344 terms in fp32 then, and their sum had lost 6e-6 in the emulator."""
        student, teacher = (x.to(dtype) for x in logits(classes, regime))
        labels, rows = labels_of(classes), torch.tensor(TEACHER_ROWS)
        error = STORED[dtype] if dtype == torch.float64 else FAR_ERROR
        options = {**KD, "label_weight": 0.3}
        self.check("kd", device, student, teacher, labels, rows, **options, value=error, gradient=error)
        self.check(
            "dkpp", device, student, teacher, labels, None, 5, rows, seed=2, **options, value=error, gradient=error
        )

    def test_many_long_rows(self, device: torch.device) -> None:
        """More rows than clusters that a device holds: a cluster's memory is used again."""
        generator = torch.Generator().manual_seed(2)
        student, teacher = (torch.randn(700, 33000, generator=generator).bfloat16() for _ in range(2))
        self.check("kd", device, student, teacher, None, None, **KD)
        self.check("dkpp", device, student, teacher, None, None, 5, None, seed=2, **KD)


def call_all(device: torch.device, classes: int, step: Tensor) -> list[Any]:
    """Every loss once, forward and backward, through the public functions."""
    student, teacher = (x[:5].to(device) for x in logits(classes, "random"))
    labels = labels_of(classes).to(device)
    outputs: list[Any] = []
    for loss in (
        lambda z: kd_loss(z, teacher, labels, label_weight=0.5, backend="native"),
        lambda z: dkpp_loss(z, teacher, labels, label_weight=0.5, step=step, backend="native"),
        lambda z: cwtm_loss(z, teacher, labels, backend="native"),
    ):
        z = student.clone().requires_grad_()
        value = loss(z)
        (value * 3).backward()
        outputs += [value.detach(), z.grad]
    return outputs


@pytest.mark.parametrize("classes", [10, 100, 700, 3000, 50000])
def test_nothing_waits_for_the_device(device: torch.device, classes: int) -> None:
    step = torch.tensor(3, device=device)
    inputs = [x[:5].to(device) for x in logits(classes, "random")]
    labels = labels_of(classes).to(device)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        native_cuda.kd(*inputs, labels, None, **KD)
        native_cuda.dkpp(*inputs, labels, None, step, None, seed=1, **KD)
        native_cuda.cwtm(*inputs, labels, None, None, None, **CWTM)
        output = native_cuda.cwtm(*inputs, labels, None, torch.ones((), device=device), None, **CWTM)
        assert output.grad is not None
        native_cuda.scale_grad_(output.grad, output.loss, None)
        native_cuda.dkpp_targets(inputs[1], None, step, None, seed=1, temperature=2.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("classes", [10, 100, 700, 3000, 50000])
def test_a_graph_repeats_the_loss(device: torch.device, classes: int) -> None:
    step = torch.tensor(3, device=device)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        eager = call_all(device, classes, step)
    torch.cuda.synchronize()
    student, teacher = (x[:5].to(device) for x in logits(classes, "random"))
    labels = labels_of(classes).to(device)
    options = {**KD, "label_weight": 0.5}
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = [native_cuda.kd(student, teacher, labels, None, **options) for _ in range(2)]
        permuted = native_cuda.dkpp(student, teacher, labels, None, step, None, seed=0, **options)
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(output.loss, eager[0]) for output in outputs)
    assert torch.equal(permuted.loss, eager[2])
    student.copy_(student.flip(0))
    step.fill_(4)  # both are read again
    graph.replay()
    assert torch.equal(outputs[0].loss, native_cuda.kd(student, teacher, labels, None, **options).loss)
    again = native_cuda.dkpp(student, teacher, labels, None, step, None, seed=0, **options)
    assert torch.equal(permuted.loss, again.loss)


def test_a_graph_zeroes_its_counter_where_the_devices_are_spent(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, teacher = (x[:5].to(device) for x in logits(100, "random"))
    wanted = native_cuda.kd(student, teacher, None, None, **KD).loss
    monkeypatch.setattr(native_cuda, "_counters", {0: iter(())})
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = native_cuda.kd(student, teacher, None, None, **KD)
    for _ in range(3):
        graph.replay()
        assert torch.equal(output.loss, wanted)


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_compiled_graphs_leave_what_lasts_alone(device: torch.device, backend: str) -> None:
    """mode="reduce-overhead" warms up on a stream and in a memory pool of its own, and checks what is left there."""
    student, teacher = (x[:5].to(device) for x in logits(100, "random"))
    student.requires_grad_()
    compiled = torch.compile(lambda s, t: kd_loss(s, t, backend=backend), mode="reduce-overhead", fullgraph=True)
    for _ in range(4):
        wanted = kd_loss(student, teacher, backend=backend)
        loss = compiled(student, teacher)
        assert torch.equal(loss, wanted)
        assert torch.equal(*(torch.autograd.grad(each, student)[0] for each in (loss, wanted)))


def test_streams_do_not_share_what_they_count_with(device: torch.device) -> None:
    inputs = {classes: [x[:5].to(device) for x in logits(classes, "random")] for classes in (100, 700)}
    wanted = {classes: native_cuda.kd(*pair, None, None, **KD).loss for classes, pair in inputs.items()}
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(8)]
    found: list[tuple[int, LossOutput]] = []
    for _ in range(50):
        for number, stream in enumerate(streams):
            classes = 100 if number % 2 else 700
            with torch.cuda.stream(stream):
                found.append((classes, native_cuda.kd(*inputs[classes], None, None, **KD)))
    torch.cuda.synchronize()
    assert all(torch.equal(output.loss, wanted[classes]) for classes, output in found)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_another_device_than_the_current_one(device: torch.device) -> None:
    other = torch.device("cuda", 1)
    student, teacher = (x[:5] for x in logits(700, "random"))
    got = native_cuda.kd(student.to(other), teacher.to(other), None, None, **KD)
    assert torch.cuda.current_device() == 0
    assert relative(got.loss.cpu(), truth("kd", student, teacher, None, None, **KD).loss) <= ERROR


def test_a_cuda_error_is_a_runtime_error(device: torch.device) -> None:
    """Of a device that is not there; the next call is none the worse."""
    student, teacher = (x[:5].to(device) for x in logits(100, "random"))
    grad = torch.ones(4, 4, device=device)
    with pytest.raises(RuntimeError, match="CUDA: cudaSetDevice"):
        native_cuda._native.cuda_scale_gradient(grad.data_ptr(), 0, 4, 4, grad.data_ptr(), 0, 0, (99, 0, 0, 0))
    assert native_cuda.kd(student, teacher, None, None, **KD).loss.isfinite()
