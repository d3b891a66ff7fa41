"""memory="checkpoint" is memory="plain" to the last bit, at a linear cost in memory."""

import functools
import itertools
from collections.abc import Callable

import pytest
import torch
from dense_shared_cases import frozen_norms, norms
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ban_fast import models
from ban_fast.models import densenet
from benchmarks.densenet import held_after

UNITS, GROWTH = [3, 2, 2], [4, 4, 6]


def pair(change: Callable[[nn.Module], object] = lambda network: None) -> tuple[nn.Module, nn.Module]:
    """The same network in both memories, away from the initial statistics."""
    networks = []
    for memory in ("plain", "checkpoint"):
        torch.manual_seed(0)
        network = models.DenseNet(UNITS, GROWTH, 8, final_transition=True, num_classes=5, memory=memory)
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
        change(network)
        networks.append(network)
    return networks[0], networks[1]


def images(seed: int = 1) -> torch.Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def state(network: nn.Module) -> list[torch.Tensor | None]:
    return [*network.buffers(), *network.parameters(), *(p.grad for p in network.parameters())]


def step(network: nn.Module) -> torch.Tensor:
    logits = network(images())
    logits.square().sum().backward()
    return logits


def assert_same(plain: nn.Module, checkpoint: nn.Module, run: Callable[[nn.Module], torch.Tensor] = step) -> None:
    """Outputs, gradients and statistics have the same bits after `run`."""
    expected, got = run(plain), run(checkpoint)
    assert torch.equal(expected, got)
    for a, b in zip(state(plain), state(checkpoint), strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


def count_recomputed(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """A list that grows by one for each checkpointed call."""
    calls = []

    def counting(*args, **kwargs):
        calls.append(None)
        return real(*args, **kwargs)

    real = densenet.checkpoint
    monkeypatch.setattr(densenet, "checkpoint", counting)
    return calls


def test_one_state_dict():
    plain, checkpoint = pair()
    assert list(plain.state_dict()) == list(checkpoint.state_dict())
    checkpoint.load_state_dict(plain.state_dict())


def test_same_bits_and_statistics_once(monkeypatch):
    calls = count_recomputed(monkeypatch)
    plain, checkpoint = pair()
    before = [norm.running_mean.clone() for norm in norms(checkpoint)]
    assert_same(plain, checkpoint)
    assert len(calls) == sum(UNITS) + 3  # every unit and every transition
    assert {int(norm.num_batches_tracked) for norm in norms(checkpoint)} == {1}
    assert not any(torch.equal(a, norm.running_mean) for a, norm in zip(before, norms(checkpoint), strict=True))


def test_same_bits_over_training_steps():
    def train(network):
        optimizer = torch.optim.SGD(network.parameters(), 0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)
        for i in range(4):
            optimizer.zero_grad()
            logits = network(images(i))
            nn.functional.cross_entropy(logits, torch.arange(4)).backward()
            optimizer.step()
        return logits

    assert_same(*pair(), train)


def test_same_gradient_of_the_images():
    def run(network):
        x = images().requires_grad_()
        network(x).square().sum().backward()
        return x.grad

    assert_same(*pair(), run)


def test_same_under_autocast():
    def run(network):
        with torch.autocast("cpu", torch.bfloat16):
            logits = network(images())
        assert logits.dtype == torch.float32  # the classifier's own
        logits.float().square().sum().backward()  # outside: the recomputation must enter the forward's autocast
        return logits

    assert_same(*pair(), run)


def test_same_when_backward_runs_under_another_autocast():
    def run(network):
        logits = network(images())
        with torch.autocast("cpu", torch.bfloat16):
            logits.square().sum().backward()
        return logits

    assert_same(*pair(), run)


def test_same_in_channels_last():
    def run(network):
        network.to(memory_format=torch.channels_last)
        logits = network(images().to(memory_format=torch.channels_last))
        logits.square().sum().backward()
        return logits

    assert_same(*pair(), run)


def test_model_used_twice_in_one_backward():
    def run(network):
        logits = network(images(1)) + network(images(2)) * 2
        logits.square().sum().backward()
        return logits

    plain, checkpoint = pair()
    assert_same(plain, checkpoint, run)
    assert {int(norm.num_batches_tracked) for norm in norms(checkpoint)} == {2}


def test_two_backwards_through_a_retained_graph():
    def run(network):
        logits = network(images())
        logits.square().sum().backward(retain_graph=True)
        logits.sum().backward()
        return logits

    plain, checkpoint = pair()
    assert_same(plain, checkpoint, run)
    assert {int(norm.num_batches_tracked) for norm in norms(checkpoint)} == {1}


def test_second_derivatives():
    """In fp64: here the graph's order, and with it the rounding of sums, differs between the two."""
    results = []
    for network in pair(nn.Module.double):
        x = images().double().requires_grad_()
        (gradient,) = torch.autograd.grad(network(x).square().sum(), x, create_graph=True)
        gradient.square().sum().backward()
        results.append([x.grad, *(p.grad for p in network.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_cumulative_statistics():
    def change(network):
        for norm in norms(network):
            norm.momentum = None

    plain, checkpoint = pair(change)
    assert_same(plain, checkpoint)
    assert_same(plain, checkpoint)


def test_norms_without_statistics():
    def change(network):
        for norm in norms(network):
            norm.track_running_stats = False
            norm.running_mean = norm.running_var = norm.num_batches_tracked = None

    assert_same(*pair(change))


def frozen_stem_and_first_unit(network):
    network.stem.requires_grad_(False)
    network.blocks[0][0].requires_grad_(False)


def frozen_but_the_classifier(network):
    network.requires_grad_(False)
    network.classifier.requires_grad_(True)


@pytest.mark.parametrize("change", [frozen_norms, frozen_stem_and_first_unit, frozen_but_the_classifier])
def test_frozen_parts(change):
    assert_same(*pair(change))


def test_eval_mode_with_gradients():
    plain, checkpoint = pair(nn.Module.eval)
    before = [buffer.clone() for buffer in checkpoint.buffers()]
    assert_same(plain, checkpoint)
    assert all(torch.equal(a, b) for a, b in zip(before, checkpoint.buffers(), strict=True))


@pytest.mark.parametrize("first", ["train", "eval"])
def test_mode_changed_before_backward(first):
    """What is made again is what forward made, whatever mode the network is in by then."""

    def run(network):
        network.train(first == "train")
        logits = network(images())
        network.train(first != "train")
        logits.square().sum().backward()
        assert all(norm.training == (first != "train") for norm in norms(network))
        return logits

    assert_same(*pair(), run)


def test_no_gradients_no_checkpoints(monkeypatch):
    calls = count_recomputed(monkeypatch)
    plain, checkpoint = pair()

    def run(network, context):
        with context():
            return network(images())

    for mode in (True, False):
        for context in (torch.no_grad, torch.inference_mode):
            plain.train(mode)
            checkpoint.train(mode)
            assert_same(plain, checkpoint, functools.partial(run, context=context))
    assert calls == []


@pytest.mark.parametrize("tensor", ["weight", "running_mean"])
def test_changes_before_backward_are_refused(tensor):
    """Autograd's own error in plain mode; without a check, made again with the new values: a wrong gradient."""
    for network in pair(nn.Module.eval):
        logits = network(images())
        with torch.no_grad():
            getattr(network.blocks[1][1].reduce.norm, tensor).add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            logits.sum().backward()


def compiled(network: nn.Module, backend: str, amp: bool) -> torch.Tensor:
    torch._dynamo.reset()
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        logits = torch.compile(network, backend=backend, fullgraph=True)(images())
    logits.float().square().sum().backward()
    return logits


@pytest.mark.parametrize("amp", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_same_under_torch_compile(amp):
    """One graph, no break; aot_eager runs what AOTAutograd's partitioner made of the checkpoints, kernel by kernel."""
    plain, checkpoint = pair()
    assert_same(plain, checkpoint, functools.partial(compiled, backend="aot_eager", amp=amp))
    assert {int(norm.num_batches_tracked) for norm in norms(checkpoint)} == {1}


@pytest.mark.slow
def test_same_under_inductor():
    """Fused kernels may sum in another order than eager, by a few 1e-7 of each sum, and BN over 4 images magnifies."""
    plain, checkpoint = pair()
    expected = step(plain)
    got = compiled(checkpoint, "inductor", False)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    for a, b in zip(state(plain), state(checkpoint), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    assert {int(norm.num_batches_tracked) for norm in norms(checkpoint)} == {1}


def saved_bytes(network: nn.Module, x: torch.Tensor, forward: Callable[[torch.Tensor], torch.Tensor]) -> int:
    """Bytes that autograd holds after forward, parameters and buffers not counted."""
    return held_after(lambda: forward(x), (*network.parameters(), *network.buffers()))


def of_depth(units: int, memory: str) -> nn.Module:
    return models.DenseNet([units], [4], 8, final_transition=True, num_classes=5, memory=memory)


def test_saved_activations_grow_linearly():
    """Exactly: with 2, 4, .. 12 units a block, the second differences of the bytes held are constant in plain mode,
    what two copies of every concatenation come to, and zero in checkpoint mode."""
    x = torch.randn(2, 3, 8, 8)
    seconds = {}
    for memory in ("plain", "checkpoint"):
        networks = [of_depth(units, memory) for units in range(2, 13, 2)]
        held = [saved_bytes(network, x, network) for network in networks]
        first = [b - a for a, b in itertools.pairwise(held)]
        seconds[memory] = {b - a for a, b in itertools.pairwise(first)}
    # n units read sum_i (8 + 4 i) channels, i < n, whose second difference for two units more is 4 * 2^2 = 16. Plain
    # holds each twice, before BN and after ReLU, as 2 x 8 x 8 floats, and BN's mean and deviation of it.
    assert seconds == {"plain": {16 * (2 * 2 * 8 * 8 + 2) * 4}, "checkpoint": {0}}


@pytest.mark.slow
def test_compiled_checkpoints_save_as_little():
    x = torch.randn(2, 3, 8, 8)
    held = {}
    for memory in ("plain", "checkpoint"):
        torch._dynamo.reset()
        network = of_depth(8, memory)
        held[memory] = saved_bytes(network, x, torch.compile(network, backend="aot_eager"))
        held[memory, "eager"] = saved_bytes(network, x, network)
    # The partitioner may keep a few vectors of batch statistics more than eager: 3 %.
    assert held["checkpoint"] < 1.03 * held["checkpoint", "eager"] < 0.6 * held["plain"]


class Peak(TorchDispatchMode):
    """The most bytes that tensors made under this mode held at once."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.alive = {key: value for key, value in self.alive.items() if not value[0].expired()}
        self.peak = max(self.peak, sum(nbytes for _, nbytes in self.alive.values()))
        return result


def test_peak_memory_of_a_step():
    """Forward and backward together: checkpoint's temporaries do not eat up what it saves."""
    peak = {}
    for memory in ("plain", "checkpoint"):
        network = of_depth(12, memory)
        with Peak() as mode:
            network(torch.randn(8, 3, 16, 16)).sum().backward()
        peak[memory] = mode.peak
    assert peak["checkpoint"] < 0.6 * peak["plain"]
