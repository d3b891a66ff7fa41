"""memory="shared" is memory="plain" to rounding: in fp64, 1e-10 of the largest value after several steps."""

import copy
import functools

import pytest
import torch
from dense_shared_cases import assert_close, assert_same, images, make, norms, step, train
from torch import nn

from ban_fast import models
from ban_fast.backends import dense_shape


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


@pytest.mark.parametrize("mode", [True, False])
def test_empty_batch(mode):
    def run(network):
        return step(network.train(mode), images(batch=0))

    assert_same(run)


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
