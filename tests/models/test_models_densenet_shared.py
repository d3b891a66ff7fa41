"""memory="shared" is memory="plain" to rounding: in fp64, 1e-10 of the largest value after several steps."""

import copy
import functools
from collections.abc import Callable

import pytest
import torch
from torch import nn

from ban_fast import models
from ban_fast.backends import dense_shape
from ban_fast.errors import UserError

UNITS, GROWTH = [3, 2, 2], [4, 5, 33]  # 33 is the paper's odd growth
# Both forms round each sum to 1e-16 of its terms; a few hundred steps of such sums stay four digits below this.
CLOSE = 1e-10


def norms(network: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]


def make(memory: str, units=UNITS, growth=GROWTH, final_transition: bool = True, **arguments) -> nn.Module:
    """A network in fp64, the same for every memory, away from the initial scales, biases and statistics."""
    torch.manual_seed(0)
    network = models.DenseNet(
        units, growth, 8, final_transition=final_transition, num_classes=5, memory=memory, **arguments
    )
    for norm in norms(network):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        nn.init.normal_(norm.weight)  # of both signs
        nn.init.normal_(norm.bias)
    return network.double()


def images(seed: int = 1, batch: int = 4, size: int = 8) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, size, size, generator=generator, dtype=torch.float64)


def step(network: nn.Module, x: torch.Tensor | None = None) -> torch.Tensor:
    logits = network(images() if x is None else x)
    logits.square().sum().backward()
    return logits.detach()


def assert_close(got: torch.Tensor | None, expected: torch.Tensor | None, name: str = "", close: float = CLOSE) -> None:
    """Within `close` of the largest element: single elements are differences of sums as large as that."""
    assert (got is None) == (expected is None), name
    if got is not None and expected is not None:
        scale = float(expected.detach().abs().max()) if expected.numel() else 0.0
        torch.testing.assert_close(got, expected, rtol=0, atol=close * max(scale, 1e-30), msg=lambda m: f"{name}: {m}")


def assert_same(
    run: Callable[[nn.Module], torch.Tensor] = step, change: Callable[[nn.Module], object] = bool, **arguments
) -> tuple[nn.Module, nn.Module]:
    """What `run` returns, every gradient and every running statistic agree."""
    plain, shared = make("plain", **arguments), make("shared", **arguments)
    change(plain)
    change(shared)
    assert_close(run(shared), run(plain), "result")
    for (name, p), q in zip(plain.named_parameters(), shared.parameters(), strict=True):
        assert_close(q, p, name)
        assert_close(q.grad, p.grad, f"gradient of {name}")
    for (name, b), c in zip(plain.named_buffers(), shared.buffers(), strict=True):
        assert_close(c, b, name)
    return plain, shared


@pytest.fixture
def many_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two images at a time, as at full size."""
    monkeypatch.setattr(dense_shape, "CHUNK_ELEMENTS", 1)


def test_one_state_dict():
    plain, shared = make("plain"), make("shared")
    assert list(plain.state_dict()) == list(shared.state_dict())
    shared.load_state_dict(plain.state_dict())


@pytest.mark.parametrize("batch", [1, 4, 7])
@pytest.mark.parametrize("final_transition", [False, True])
def test_one_step(many_chunks, final_transition, batch):
    def run(network):
        x = images(batch=batch).requires_grad_()
        logits = step(network, x)
        return torch.cat((logits.flatten(), x.grad.flatten()))

    assert_same(run, final_transition=final_transition)


def train(network: nn.Module, steps: int = 4, batch: int = 4, size: int = 8) -> torch.Tensor:
    optimizer = torch.optim.SGD(network.parameters(), 0.02, momentum=0.9, nesterov=True, weight_decay=5e-4)
    for i in range(steps):
        optimizer.zero_grad()
        logits = network(images(i, batch, size))
        nn.functional.cross_entropy(logits, torch.arange(batch) % 5).backward()
        optimizer.step()
    return logits.detach()


def test_training(many_chunks):
    assert_same(train)


@pytest.mark.parametrize(
    "arguments",
    [
        {"units": [1], "growth": [4]},
        {"units": [1], "growth": [33], "final_transition": False},
        {"units": [5], "growth": [1], "bottleneck": 1},
        {"units": [2, 3], "growth": [6, 2], "transition_widths": [5], "final_transition": False},
    ],
)
def test_other_widths(arguments):
    assert_same(train, **arguments)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["densenet-112-33", "densenet-90-60", "densenet-80-80", "densenet-80-120"])
def test_the_papers_networks_at_a_fifth_of_their_width(name):
    """Their depths, transitions and odd growths: 33, 12, 16 and 24 channels."""
    with torch.device("meta"):
        paper = models.create(name)
    units, growth = [len(block) for block in paper.blocks], paper.blocks[0][0].grow.conv.out_channels
    growth = growth if growth == 33 else growth // 5
    arguments = {"units": units, "growth": [growth] * 3, "final_transition": len(paper.transitions) == 3}
    assert_same(functools.partial(train, steps=3, size=16), **arguments)


@pytest.mark.slow
def test_densenet_bc_100_12_in_full():
    results = []
    for memory in ("plain", "shared"):
        torch.manual_seed(0)
        network = models.create("densenet-bc-100-12", memory=memory).double()
        results.append([train(network, 3, 4, 32), *network.parameters(), *network.buffers()])
    for a, b in zip(*results, strict=True):
        assert_close(b, a)


def test_fp32_is_as_exact_as_plain():
    """Against fp64 from the same bits: both err by roundings; either may be the larger, by less than twice."""
    truth = make("plain")
    step(truth)
    error = {}
    for memory in ("plain", "shared"):
        network = make(memory).float()
        step(network, images().float())
        differences = [
            ((p.grad - q.grad).norm() / q.grad.norm()).item()
            for p, q in zip(network.parameters(), truth.parameters(), strict=True)
        ]
        error[memory] = sum(differences) / len(differences)
    assert error["plain"] < 1e-4  # the network is well conditioned: what follows says something
    assert error["shared"] < 2 * error["plain"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    """Errors against fp64 no larger than plain's under the same autocast, but for chance: 1.2 times, averaged."""
    truth = make("plain")
    expected = step(truth)
    error = {}
    for memory in ("plain", "shared"):
        network = make(memory).float()
        with torch.autocast("cpu", dtype):
            logits = network(images().float())
        assert logits.dtype == dtype
        assert all(buffer.dtype == torch.float32 for name, buffer in network.named_buffers() if "running" in name)
        (logits.float().square().sum() * 2**-4).backward()  # within fp16's range
        differences = [
            (16 * p.grad - q.grad).norm() / q.grad.norm()
            for p, q in zip(network.parameters(), truth.parameters(), strict=True)
        ]
        assert all(p.grad.dtype == torch.float32 for p in network.parameters())
        error[memory] = (
            sum(differences).item() / len(differences) + ((logits - expected).norm() / expected.norm()).item()
        )
    assert error["plain"] < 0.5
    assert error["shared"] < 1.2 * error["plain"]


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_whole_network_in_half_precision(dtype):
    truth = make("plain")
    expected = step(truth)
    error = {}
    for memory in ("plain", "shared"):
        network = make(memory).to(dtype)
        logits = step(network, images().to(dtype))
        error[memory] = ((logits - expected).norm() / expected.norm()).item()
        assert all(p.grad.dtype == dtype for p in network.parameters())
        assert {buffer.dtype for buffer in network.buffers()} == {dtype, torch.int64}
    assert error["shared"] < 1.5 * error["plain"] < 0.5


def test_autocast_leaves_fp64_alone():
    def run(network):
        with torch.autocast("cpu", torch.bfloat16):
            return network.eval()(images())

    assert run(make("shared")).dtype == run(make("plain")).dtype


def test_backward_under_another_autocast():
    def run(network):
        network.float()
        logits = network(images().float())
        with torch.autocast("cpu", torch.bfloat16):
            logits.square().sum().backward()
        return network.double()(images()).detach()

    plain, shared = make("plain"), make("shared")
    run(plain)
    run(shared)
    for (name, p), q in zip(plain.named_parameters(), shared.named_parameters(), strict=True):
        assert_close(
            q[1].grad, p.grad, name, close=1e-3
        )  # fp32, magnified by BN over 4 images; bf16 would be off by 1e-2


def test_channels_last_images_and_weights():
    def run(network):
        network.to(memory_format=torch.channels_last)
        return step(network, images().to(memory_format=torch.channels_last))

    assert_same(run)


def test_gradients_accumulate():
    def run(network):
        step(network, images(1))
        return step(network, images(2))

    assert_same(run)


def test_used_twice_in_one_backward():
    def run(network):
        logits = network(images(1)) + network(images(2)) * 2
        logits.square().sum().backward()
        return logits.detach()

    assert_same(run)


def test_two_backwards_through_a_retained_graph():
    def run(network):
        logits = network(images())
        logits.square().sum().backward(retain_graph=True)
        logits.sum().backward()
        return logits.detach()

    _, shared = assert_same(run)
    assert {int(norm.num_batches_tracked) for norm in norms(shared)} == {1}


def no_momentum(network):
    for i, norm in enumerate(norms(network)):
        norm.momentum = (None, 0.0, 0.3)[i % 3]


def other_eps(network):
    for i, norm in enumerate(norms(network)):
        norm.eps = (1e-5, 1e-1, 1e-3)[i % 3]


def without_statistics(network):
    for norm in norms(network)[::2]:
        norm.track_running_stats = False
        norm.running_mean = norm.running_var = norm.num_batches_tracked = None


def without_scales(network):
    for norm in norms(network)[::3]:
        norm.weight = norm.bias = None


def frozen_norms(network):
    """Some normalise by their running statistics in the midst of training."""
    for norm in norms(network)[::2]:
        norm.eval()
        norm.requires_grad_(False)


def norms_of_the_3x3_in_eval_mode(network):
    for block in network.blocks:
        for unit in block:
            unit.grow.norm.eval()


def norms_of_the_1x1_in_eval_mode(network):
    for block in network.blocks:
        for unit in block:
            unit.reduce.norm.eval()
    for transition in network.transitions:
        transition.norm.eval()


def frozen_convolutions(network):
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.requires_grad_(False)


def frozen_but_one_unit(network):
    network.requires_grad_(False)
    network.blocks[1][1].requires_grad_(True)


def frozen_but_a_transition(network):
    network.requires_grad_(False)
    network.transitions[1].norm.weight.requires_grad_(True)


def frozen_but_the_classifier(network):
    network.requires_grad_(False)
    network.classifier.requires_grad_(True)


@pytest.mark.parametrize(
    "change",
    [
        no_momentum,
        other_eps,
        without_statistics,
        without_scales,
        frozen_norms,
        norms_of_the_3x3_in_eval_mode,
        norms_of_the_1x1_in_eval_mode,
        frozen_convolutions,
        frozen_but_one_unit,
        frozen_but_a_transition,
        frozen_but_the_classifier,
        nn.Module.eval,
    ],
)
def test_changed_networks(change):
    def run(network):
        step(network)
        return step(network, images(2))

    assert_same(run, change)


@pytest.mark.parametrize("first", ["train", "eval"])
def test_mode_changed_before_backward(first):
    def run(network):
        network.train(first == "train")
        logits = network(images())
        network.train(first != "train")
        logits.square().sum().backward()
        return logits.detach()

    assert_same(run)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("mode", [True, False])
def test_without_gradients(context, mode):
    def run(network):
        network.train(mode)
        with context():
            return network(images())

    assert_same(run)


@pytest.mark.parametrize("mode", [True, False])
def test_empty_batch(mode):
    def run(network):
        return step(network.train(mode), images(batch=0))

    assert_same(run)


def test_a_zero_scale_has_its_gradient():
    """gamma = 0: x-hat cannot be had back from what follows it."""

    def change(network):
        with torch.no_grad():
            for norm in norms(network):
                norm.weight[::2] = 0

    assert_same(change=change)


def test_statistics_far_from_zero_keep_their_digits():
    """Features of mean 1000 and deviation 1: sums of squares would lose a variance of fp32 altogether."""
    results = []
    for memory, dtype in (("plain", torch.float64), ("shared", torch.float32)):
        network = make(memory, units=[1], growth=[4], final_transition=False).to(dtype)
        nn.init.zeros_(network.stem.weight)
        network.stem.bias = nn.Parameter(torch.full((8,), 1000.0, dtype=dtype))
        network.stem.weight.data[:, 0, 1, 1] = 1
        network(images().to(dtype))
        results.append(network.blocks[0][0].reduce.norm.running_var)
    torch.testing.assert_close(results[1].double(), results[0], rtol=1e-5, atol=0)


@pytest.mark.parametrize("first", ["plain", "checkpoint", "shared"])
def test_training_continues_in_another_memory(first):
    """A checkpoint of `first`, optimizer included, goes on in every memory with the same losses."""
    network = make(first)
    optimizer = torch.optim.SGD(network.parameters(), 0.02, momentum=0.9)

    def steps(network, optimizer, seeds):
        losses = []
        for seed in seeds:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(network(images(seed)), torch.arange(4))
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return torch.stack(losses)

    steps(network, optimizer, range(2))
    saved = {"network": network.state_dict(), "optimizer": optimizer.state_dict()}
    expected = None
    for memory in ("plain", "checkpoint", "shared"):
        other = make(memory)
        other.load_state_dict(saved["network"])
        again = torch.optim.SGD(other.parameters(), 0.02, momentum=0.9)
        again.load_state_dict(copy.deepcopy(saved["optimizer"]))  # or they would share buffers
        losses = steps(other, again, range(2, 4))
        expected = losses if expected is None else expected
        assert_close(losses, expected, memory)


def test_second_derivatives_are_refused():
    x = images().requires_grad_()
    network = make("shared")
    with pytest.raises(RuntimeError, match=r'memory="shared" has no second derivative.*create_graph=True.*checkpoint'):
        torch.autograd.grad(network(x).sum(), x, create_graph=True)


@pytest.mark.parametrize("tensor", ["norm.weight", "conv.weight"])
def test_changes_before_backward_are_refused(tensor):
    network = make("shared")
    logits = network(images())
    with torch.no_grad():
        network.blocks[1][1].reduce.get_parameter(tensor).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logits.sum().backward()


def test_one_value_a_channel_is_refused():
    network = make("shared", units=[1], growth=[4])
    with pytest.raises(ValueError, match=r"more than 1 value per channel when training, got \[1, 8, 1, 1\]"):
        network(images(batch=1, size=1))
    assert network.eval()(images(batch=1, size=1)).shape == (1, 5)


def test_other_norms_are_refused():
    network = make("shared")
    network.blocks[0][0].reduce.norm = nn.GroupNorm(2, 8).double()
    with pytest.raises(ValueError, match=r'memory="shared" needs nn\.BatchNorm2d or nn\.SyncBatchNorm, got GroupNorm'):
        network(images())


def test_other_dtypes_are_refused():
    from ban_fast.models.dense_shared import through_block

    network = make("shared")
    with pytest.raises(ValueError, match=r"float32, float64, bfloat16 or float16, got torch\.int32"):
        through_block(torch.zeros(2, 8, 4, 4, dtype=torch.int32), [network.blocks[0][0].reduce.norm], [])


@pytest.mark.parametrize("memory", ["plain", "checkpoint"])
def test_sync_statistics_is_for_shared(memory):
    with pytest.raises(UserError, match=f'sync_statistics needs memory="shared", got {memory!r}; nn.SyncBatchNorm'):
        models.create("densenet-bc-10-4", memory=memory, sync_statistics=True)


@pytest.mark.parametrize("value", ["maybe", 1, None])
def test_sync_statistics_is_true_or_false(value):
    with pytest.raises(UserError, match=f"sync_statistics must be true or false, got {value!r}"):
        models.create("densenet-bc-10-4", memory="shared", sync_statistics=value)
