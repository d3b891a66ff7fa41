"""memory="shared" where norms and parameters are not all as they were made: eval mode, frozen parts, other norms."""

import pytest
import torch
from dense_shared_cases import assert_same, frozen_norms, images, norms, step
from torch import nn


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


def without_half_of_scale_and_bias(network):
    """nn.BatchNorm2d(bias=False) has a weight alone."""
    for i, norm in enumerate(norms(network)):
        if i % 3 == 0:
            norm.bias = None
        elif i % 3 == 1:
            norm.weight = None


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
        without_half_of_scale_and_bias,
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
            network(images())  # twice: its running statistics move twice
            return network(images())

    assert_same(run)


def test_a_zero_scale_has_its_gradient():
    """gamma = 0: x-hat cannot be had back from what follows it."""

    def change(network):
        with torch.no_grad():
            for norm in norms(network):
                norm.weight[::2] = 0

    assert_same(change=change)
