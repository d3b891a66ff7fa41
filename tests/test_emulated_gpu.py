"""The emulated GPU does what a GPU does, where this is what tests on it rely on. In a process of its own."""

import copy
import pickle
import threading
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ban_fast.backends import dispatch
from ban_fast.losses import KDLoss


@pytest.fixture(autouse=True)
def no_waits() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


def test_tensors_say_where_they_are() -> None:
    made = [
        torch.ones(3, device="cuda"),
        torch.ones(3).cuda(),
        torch.tensor([1.0], device="cuda"),
        torch.ones(3).to("cuda"),
    ]
    for each in (*made, made[0] + 1, made[0].new_zeros(2), torch.zeros_like(made[0]), *made[0].split(2)):
        assert (each.device, each.is_cuda, each.is_cpu) == (torch.device("cuda", 0), True, False)
    assert made[0].cpu().device.type == made[0].to("cpu").device.type == torch.ones(3).device.type == "cpu"
    assert made[0].to("cuda") is made[0]
    assert torch.equal(torch.arange(4, device="cuda").view(2, 2).t().contiguous().cpu(), torch.tensor([[0, 2], [1, 3]]))
    with pytest.raises(TypeError, match="can't convert cuda:0"):
        made[0].numpy()


def test_a_view_has_the_memory_of_its_base() -> None:
    base = torch.zeros(4, device="cuda")
    base[1:3] += 1
    base.view(2, 2)[1].mul_(5)
    assert base.tolist() == [0, 1, 5, 0]
    assert base[1:].data_ptr() == base.data_ptr() + 4


def test_operands_on_two_devices_are_refused() -> None:
    here, there = torch.ones(3, device="cuda"), torch.ones(3)
    for wrong in (lambda: here + there, lambda: torch.stack((here, there)), lambda: here.add_(there)):
        with pytest.raises(RuntimeError, match="two devices, cuda:0 and cpu"):
            wrong()
    assert (here + torch.tensor(2.0)).tolist() == [3, 3, 3]  # a number
    assert here[torch.tensor([0, 2])].tolist() == [1, 1]  # indices


WAITS: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool(x.sum() > 0),
    "tolist": lambda x: x.tolist(),
    "to the host": lambda x: x.cpu(),
    "from the host": lambda x: torch.ones(3).to(x.device),
    "into the host's": lambda x: torch.ones(3).copy_(x),
    "nonzero": lambda x: x.nonzero(),
    "by a mask": lambda x: x[x > 0],
    "by the host's indices": lambda x: x[torch.tensor([0])],
    "equal": lambda x: torch.equal(x, x),
}


@pytest.mark.parametrize("name", WAITS)
def test_what_waits_is_told(name: str) -> None:
    x = torch.ones(3, device="cuda")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        WAITS[name](x)
    assert any("synchronizing CUDA operation" in str(each.message) for each in caught)
    torch.cuda.set_sync_debug_mode("error")
    with pytest.raises(RuntimeError, match="synchronizing CUDA operation"):
        WAITS[name](x)
    torch.cuda.set_sync_debug_mode("default")
    with pytest.raises(RuntimeError, match="previous error during capture"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        WAITS[name](x)


def test_what_waits_for_nothing() -> None:
    torch.cuda.set_sync_debug_mode("error")
    x = torch.ones(3, device="cuda", requires_grad=True)
    (x.exp().sum() * torch.tensor(2.0)).backward()
    torch.empty(3).copy_(x.detach(), non_blocking=True)
    torch.empty(3, pin_memory=True).to("cuda", non_blocking=True)
    x.detach()[torch.arange(2, device="cuda")] = 0


def test_the_device_has_a_generator_of_its_own() -> None:
    on_host = torch.get_rng_state()
    torch.cuda.manual_seed(3)
    first = torch.rand(4, device="cuda")
    F.dropout(first, 0.5)
    state = torch.cuda.get_rng_state()
    wanted = torch.rand(4, device="cuda")
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(4, device="cuda"), wanted)
    torch.cuda.manual_seed(3)
    assert torch.equal(torch.rand(4, device="cuda"), first)
    assert torch.equal(torch.get_rng_state(), on_host)


def test_a_thread_makes_tensors_there_too() -> None:
    made: list[Tensor] = []
    thread = threading.Thread(target=lambda: made.append(torch.zeros(2, device="cuda")))
    thread.start()
    thread.join()
    assert made[0].is_cuda


def test_copies() -> None:
    layer = nn.Linear(3, 2).to("cuda")
    other = copy.deepcopy(layer)
    other.weight.data.zero_()
    assert isinstance(other.weight, nn.Parameter)
    assert layer.weight.abs().sum().item() > 0
    assert torch.equal(pickle.loads(pickle.dumps(layer.weight.detach())), layer.weight.detach().cpu())


def step_of(layer: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> Callable[[], Tensor]:
    def step() -> Tensor:
        loss = F.dropout(layer(x), 0.5).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def training() -> tuple[nn.Module, Callable[[], Tensor]]:
    torch.manual_seed(0)
    torch.cuda.manual_seed(0)
    layer = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).to("cuda")
    rate = torch.tensor(0.1, device="cuda")
    optimizer = torch.optim.SGD(layer.parameters(), lr=rate, momentum=0.9, fused=True)
    return layer, step_of(layer, optimizer, torch.randn(8, 4, device="cuda"))


def test_replays_are_the_steps() -> None:
    """Weights, running statistics, dropout's draws; and a recording leaves everything as it was."""
    layer, step = training()
    losses = [step().item() for _ in range(5)]
    other, step = training()
    assert step().item() == losses[0]
    before = {name: value.cpu() for name, value in other.state_dict().items()}
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    assert all(torch.equal(value.cpu(), before[name]) for name, value in other.state_dict().items())
    for wanted in losses[1:]:
        graph.replay()
        assert loss.item() == wanted
    assert all(
        torch.equal(one, two) for one, two in zip(layer.state_dict().values(), other.state_dict().values(), strict=True)
    )


def test_a_replay_knows_what_was_there_when_it_was_recorded() -> None:
    """The host's numbers, and the memory, not what has taken its name since."""
    table, place, factor = torch.arange(4.0, device="cuda"), torch.zeros((), dtype=torch.int64, device="cuda"), 2.0
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        read = table.index_select(0, place.view(1)) * factor
    factor, old, table = 3.0, table, torch.full((4,), 100.0, device="cuda")
    place += 3
    graph.replay()
    assert read.item() == 6
    old.mul_(10)
    graph.replay()
    assert read.item() == 60


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_losses_are_by_interpreted_kernels(dtype: torch.dtype) -> None:
    """Made, and recorded with their gradients, without waiting."""
    student, teacher = (torch.randn(5, 11, device="cuda").to(dtype) for _ in range(2))
    student.requires_grad_()
    assert dispatch.resolve("auto", "kd", student).__name__ == "ban_fast.backends.triton"
    truth = student.detach().cpu().double().requires_grad_()
    exact = KDLoss(backend="reference")(truth, teacher.cpu().double())
    exact.backward()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.set_sync_debug_mode("error")
    KDLoss()(student, teacher).backward()  # counters are made when they are first needed
    student.grad = None
    with torch.cuda.graph(graph):
        loss = KDLoss()(student, teacher)
        loss.backward()
    graph.replay()
    torch.cuda.set_sync_debug_mode("default")
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)
    assert truth.grad is not None
    assert student.grad is not None
    torch.testing.assert_close(student.grad.cpu().double(), truth.grad, rtol=1e-2, atol=1e-6)
