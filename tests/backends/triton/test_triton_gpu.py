"""What only a GPU can show of the Triton backend, through the public losses: `pytest -m gpu`. Values: contract/."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from ban_fast.backends.triton import launch
from ban_fast.losses import cwtm_loss, dkpp_loss, kd_loss

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]

ROWS = 64
Loss = Callable[[Tensor, "Inputs"], Tensor]


class Inputs:
    """What a loss may be given, on one device."""

    def __init__(
        self, device: torch.device, classes: int, dtype: torch.dtype = torch.float32, rows: int = ROWS
    ) -> None:
        generator = torch.Generator(device).manual_seed(classes)
        self.teacher = torch.randn(rows, classes, device=device, generator=generator).to(dtype)
        self.labels = torch.randint(classes, (rows,), device=device, generator=generator)
        self.labels[3] = -100
        self.teacher_rows = torch.arange(rows, device=device).flip(0)
        self.confidence = self.teacher.float().softmax(1).amax(1)
        self.step = torch.zeros((), dtype=torch.int64, device=device)


BY: dict[str, Any] = {"backend": "triton"}
LOSSES: dict[str, Loss] = {
    "kd": lambda z, x: kd_loss(z, x.teacher, x.labels, temperature=3.0, label_weight=0.5, **BY),
    "kd, rows": lambda z, x: kd_loss(z, x.teacher, teacher_rows=x.teacher_rows, **BY),
    "kd, none": lambda z, x: kd_loss(z, x.teacher, x.labels, temperature=2.0, reduction="none", **BY).sum(),
    "cwtm": lambda z, x: cwtm_loss(z, x.teacher, x.labels, **BY),
    "cwtm, label": lambda z, x: cwtm_loss(z, x.teacher, x.labels, weight_by="teacher_label", **BY),
    "cwtm, given": lambda z, x: cwtm_loss(z, None, x.labels, confidence=x.confidence, **BY),
    "dkpp": lambda z, x: dkpp_loss(z, x.teacher, x.labels, temperature=3.0, seed=1, step=x.step, **BY),
}
CLASSES = [10, 100, 1000, 10000, 32000]
"""Many rows a program; one warp; several; 16 warps, the next row fetched early; two readings."""


def student(device: torch.device, classes: int, dtype: torch.dtype = torch.float32, *, seed: int = 0) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(ROWS, classes, device=device, generator=generator).to(dtype).requires_grad_()


def with_gradient(loss: Loss, logits: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
    value = loss(logits, inputs)
    (gradient,) = torch.autograd.grad(2.5 * value, logits)
    return value.detach(), gradient


def warm(loss: Loss, logits: Tensor, inputs: Inputs) -> None:
    """Kernels are compiled and loaded at their first launch, on a stream like the one that captures."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            with_gradient(loss, logits, inputs)
    torch.cuda.current_stream().wait_stream(stream)


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("name", LOSSES)
def test_a_captured_graph_replays_to_eager_s_bits(
    name: str, classes: int, dtype: torch.dtype, device: torch.device
) -> None:
    inputs, logits = Inputs(device, classes, dtype), student(device, classes, dtype)
    warm(LOSSES[name], logits, inputs)
    replayed(LOSSES[name], logits, inputs)


def test_a_graph_without_a_counter_of_its_own_sets_one_to_zero(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("kd", "cwtm"):
        inputs, logits = Inputs(device, 100), student(device, 100)
        warm(LOSSES[name], logits, inputs)
        monkeypatch.setattr(launch, "_spare_counters", {})
        replayed(LOSSES[name], logits, inputs)


def replayed(loss: Loss, logits: Tensor, inputs: Inputs) -> None:
    """Captures the loss and its gradient, and compares replays with eager calls on the same values."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = with_gradient(loss, logits, inputs)
    for seed in range(1, 5):
        with torch.no_grad():
            logits.copy_(student(logits.device, logits.shape[1], logits.dtype, seed=seed))
            inputs.step.fill_(seed)
        graph.replay()
        for value, expected in zip(captured, with_gradient(loss, logits, inputs), strict=True):
            assert torch.equal(value, expected), seed


@pytest.fixture
def no_counters(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """No stream has a counter yet, and the memory that they will be in holds no 0. Tests then keep the default stream,
    on which it is set to 0, at work for half a second or so."""
    for name in ("kd", "cwtm"):  # compiled and loaded before
        with_gradient(LOSSES[name], student(device, 100), Inputs(device, 100))
    monkeypatch.setattr(launch, "_spare_counters", {})
    monkeypatch.setattr(launch, "_stream_counters", {})
    shape = (launch._CAPTURED_CALLS, launch._COUNTER_STRIDE)
    blocks = [torch.full(shape, 1 << 20, dtype=torch.int32, device=device) for _ in range(8)]
    del blocks  # kept by PyTorch for who asks for as much
    torch.cuda.synchronize()


@pytest.mark.parametrize("name", ["kd", "cwtm"])
@pytest.mark.usefixtures("no_counters")
def test_every_stream_waits_for_its_counter(name: str, device: torch.device) -> None:
    sides = [(Inputs(device, 100), student(device, 100, seed=seed)) for seed in range(4)]
    expected = [plain(name, logits, inputs) for inputs, logits in sides]
    streams = [torch.cuda.Stream() for _ in sides]
    torch.cuda.synchronize()
    torch.cuda._sleep(10**9)
    found = []
    for stream, (inputs, logits) in zip(streams, sides, strict=True):
        with torch.cuda.stream(stream):
            found.append(with_gradient(LOSSES[name], logits, inputs))
    torch.cuda.synchronize()
    for pair, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(pair, wanted, rtol=1e-5, atol=1e-7)


def plain(name: str, logits: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """The loss and its gradient by the reference backend, which counts nothing."""
    loss = {
        "kd": lambda z, x: kd_loss(z, x.teacher, x.labels, temperature=3.0, label_weight=0.5, backend="reference"),
        "cwtm": lambda z, x: cwtm_loss(z, x.teacher, x.labels, backend="reference"),
    }[name]
    return with_gradient(loss, logits, inputs)


@pytest.mark.usefixtures("no_counters")
def test_a_graph_captured_by_hand_counts_from_zero(device: torch.device) -> None:
    """capture_begin waits for nothing, but the graph is replayed after what warmed it up."""
    inputs, logits = Inputs(device, 100), student(device, 100)
    expected = plain("kd", logits, inputs)
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    torch.cuda.synchronize()
    torch.cuda._sleep(10**9)
    with torch.cuda.stream(side):
        with_gradient(LOSSES["kd"], logits, inputs)
        graph.capture_begin()
        captured = with_gradient(LOSSES["kd"], logits, inputs)
        graph.capture_end()
    later = torch.cuda.Stream()
    later.wait_stream(side)
    with torch.cuda.stream(later):
        for _ in range(3):
            graph.replay()
    torch.cuda.synchronize()
    torch.testing.assert_close(captured, expected, rtol=1e-5, atol=1e-7)


def test_two_calls_in_one_graph_on_two_streams(device: torch.device) -> None:
    """Branches of a graph run side by side: each has a counter of its own."""
    inputs, logits = Inputs(device, 100), student(device, 100)
    loss = LOSSES["kd"]
    expected = with_gradient(loss, logits, inputs)
    warm(loss, logits, inputs)
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    found = []
    with torch.cuda.graph(graph):
        side.wait_stream(torch.cuda.current_stream())
        for _ in range(20):
            found.append(with_gradient(loss, logits, inputs))
            with torch.cuda.stream(side):
                found.append(with_gradient(loss, logits, inputs))
        torch.cuda.current_stream().wait_stream(side)
    for _ in range(20):
        graph.replay()
    torch.cuda.synchronize()
    for pair in found:
        assert all(torch.equal(a, b) for a, b in zip(pair, expected, strict=True))


@contextmanager
def no_sync() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("name", LOSSES)
def test_the_host_never_waits(name: str, classes: int, device: torch.device) -> None:
    inputs, logits = Inputs(device, classes), student(device, classes)
    inputs.labels[5], inputs.teacher_rows[7] = classes, -1  # found without looking
    with_gradient(LOSSES[name], logits, inputs)
    with no_sync():
        value, gradient = with_gradient(LOSSES[name], logits, inputs)
    assert value.isnan()
    assert not gradient[7 if name == "kd, rows" else 5].any()


@pytest.mark.parametrize("name", LOSSES)
def test_torch_compile_takes_each_loss_as_one_graph(name: str, device: torch.device) -> None:
    torch.compiler.reset()
    inputs, logits = Inputs(device, 100), student(device, 100)
    loss = LOSSES[name]

    def through(z: Tensor) -> Tensor:
        return loss(1.5 * z, inputs)

    compiled = torch.compile(through, fullgraph=True)
    for z in (logits, student(device, 100, seed=1)):
        value, expected = compiled(z), through(z)
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
        pair = [torch.autograd.grad(x, z)[0] for x in (value, expected)]
        torch.testing.assert_close(*pair, rtol=1e-5, atol=1e-9)


def test_two_streams_at_once(device: torch.device) -> None:
    """Counters, partial sums and scratch of launches that run side by side do not mix."""
    for name, classes in (("kd", 100), ("dkpp", 1000), ("cwtm", 10000)):
        sides = [(Inputs(device, classes), student(device, classes, seed=s)) for s in range(2)]
        expected = [with_gradient(LOSSES[name], z, x) for x, z in sides]
        streams = [torch.cuda.Stream() for _ in sides]
        torch.cuda.synchronize()
        found: list[list[tuple[Tensor, Tensor]]] = [[], []]
        for _ in range(50):
            for s, (inputs, logits) in enumerate(sides):
                with torch.cuda.stream(streams[s]):
                    found[s].append(with_gradient(LOSSES[name], logits, inputs))
        torch.cuda.synchronize()
        for s in range(2):
            for pair in found[s]:
                assert all(torch.equal(a, b) for a, b in zip(pair, expected[s], strict=True)), name


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device here; two are needed")
@pytest.mark.parametrize("name", LOSSES)
def test_another_device_than_the_current_one(name: str) -> None:
    first, second = torch.device("cuda:0"), torch.device("cuda:1")
    expected = with_gradient(LOSSES[name], student(first, 100), Inputs(first, 100))
    inputs = Inputs(first, 100)
    for field, value in vars(inputs).items():
        setattr(inputs, field, value.to(second))
    with torch.cuda.device(first):
        found = with_gradient(LOSSES[name], student(first, 100).detach().to(second).requires_grad_(), inputs)
        assert torch.cuda.current_device() == 0
    for a, b in zip(found, expected, strict=True):
        assert a.device == second
        torch.testing.assert_close(a.to(first), b, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", LOSSES)
def test_memory_is_the_gradient_and_little_more(name: str, device: torch.device) -> None:
    classes = 32000
    inputs, logits = Inputs(device, classes), student(device, classes)
    with_gradient(LOSSES[name], logits, inputs)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = with_gradient(LOSSES[name], logits, inputs)
    beyond = torch.cuda.max_memory_allocated() - before - found[1].numel() * found[1].element_size()
    # DKPP's permuted rows and tables: as many rows as are in work at a time, here all of them.
    scratch = ROWS * (classes * 4 + (1 << 16)) if name == "dkpp" else 0
    assert beyond <= scratch + (4 << 20)  # the allocator splits no block for less than 1 MiB


KERNELS = {
    "kd": ["distill_kernel"],
    "kd, rows": ["distill_kernel"],
    "cwtm": ["teacher_confidences_kernel", "cross_entropy_kernel"],
    "cwtm, label": ["teacher_confidences_kernel", "cross_entropy_kernel"],
    "cwtm, given": ["cross_entropy_kernel"],
    "dkpp": ["distill_kernel"],
}


def launched(call: Callable[[], object]) -> Counter[str]:
    """Everything that ran on the GPU, by name."""
    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as record:
        call()
        torch.cuda.synchronize()
    return Counter(event.name for event in record.events() if event.device_type == torch.autograd.DeviceType.CUDA)


@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("name", KERNELS)
def test_the_launches_are_those_that_are_claimed(name: str, classes: int, device: torch.device) -> None:
    inputs, logits = Inputs(device, classes), student(device, classes)
    forward = launched(lambda: LOSSES[name](logits.detach(), inputs))
    assert forward == Counter(KERNELS[name])
    both = launched(lambda: torch.autograd.grad(LOSSES[name](logits, inputs), logits))
    assert not Counter([*KERNELS[name], "scale_kernel"]) - both
    assert sum(both.values()) == len(KERNELS[name]) + 2  # and autograd's 1


def test_a_large_batch_takes_one_launch_more(device: torch.device) -> None:
    inputs = Inputs(device, 10, rows=5000)
    logits = torch.randn(5000, 10, device=device)
    assert launched(lambda: LOSSES["kd"](logits, inputs)) == Counter(["count_kernel", "distill_kernel"])
    given = launched(lambda: LOSSES["cwtm, given"](logits, inputs))
    assert given == Counter(["given_confidences_kernel", "cross_entropy_kernel"])


def test_more_elements_than_32_bits_count(device: torch.device) -> None:
    """[17000, 128256]: 2.2e9 elements; the last rows' loss and gradient are those that they have alone."""
    rows, classes = 17_000, 128_256
    if torch.cuda.mem_get_info()[0] < 20 << 30:
        pytest.skip("20 GiB of GPU memory are needed")
    logits = torch.zeros(rows, classes, dtype=torch.bfloat16, device=device)
    teacher = torch.zeros(2, classes, dtype=torch.bfloat16, device=device)
    teacher[:, :5] = 3
    logits[-2:, 2:7] = 2
    teacher_rows = torch.arange(rows, device=device) % 2
    logits.requires_grad_()
    value = kd_loss(logits, teacher, teacher_rows=teacher_rows, reduction="none", **BY)
    weight = torch.ones_like(value)
    weight[-1] = 0.5
    (gradient,) = torch.autograd.grad(value, logits, weight)
    alone = logits[-2:].detach().clone().requires_grad_()
    expected = kd_loss(alone, teacher, teacher_rows=teacher_rows[-2:], reduction="none", **BY)
    assert torch.equal(value[-2:], expected)
    assert torch.equal(gradient[-2:], torch.autograd.grad(expected, alone, weight[-2:])[0])
    assert torch.equal(gradient[0], gradient[rows - 4])
