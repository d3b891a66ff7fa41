"""The wide residual network against its definition, written out."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ban_fast import models


def reference(state, units, x):
    """wide-resnet.lua in eval mode, from a state dict: every BN has its own statistics in `state`."""

    def active(x, key):
        mean, var = state[f"{key}.running_mean"], state[f"{key}.running_var"]
        weight, bias = state[f"{key}.weight"], state[f"{key}.bias"]
        shape = (1, -1, 1, 1)
        y = (x - mean.view(shape)) / torch.sqrt(var.view(shape) + 1e-5) * weight.view(shape) + bias.view(shape)
        return y.clamp(min=0)

    x = F.conv2d(x, state["stem.weight"], padding=1)
    for stage in range(3):
        for unit in range(units):
            key = f"stages.{stage}.{unit}"
            stride = 2 if stage and not unit else 1
            a = active(x, f"{key}.norm1")
            y = F.conv2d(a, state[f"{key}.conv1.weight"], stride=stride, padding=1)
            y = F.conv2d(active(y, f"{key}.norm2"), state[f"{key}.conv2.weight"], padding=1)
            if f"{key}.shortcut.weight" in state:
                x = F.conv2d(a, state[f"{key}.shortcut.weight"], stride=stride)
            x = x + y
    return active(x, "norm").mean((2, 3)) @ state["classifier.weight"].T + state["classifier.bias"]


@pytest.mark.parametrize("width", [1, 2])  # with width 1 the first stage keeps 16 channels and has no projection
def test_is_what_the_authors_define(width):
    torch.manual_seed(0)
    network = models.create(f"wrn-16-{width}", 10).double()
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):  # away from 1 and 0, so that a norm in the wrong place shows
                for tensor in (module.weight, module.bias, module.running_mean):
                    tensor.normal_()
                module.running_var.uniform_(0.5, 2)
    network.eval()
    x = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    torch.testing.assert_close(network(x), reference(network.state_dict(), 2, x), rtol=1e-10, atol=1e-10)
    projections = [bool(stage[0].shortcut) for stage in network.stages]
    assert projections == [width > 1, True, True]


def test_he_initialisation():
    torch.manual_seed(0)
    network = models.create("wrn-10-4")
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            assert module.bias is None, name
            fan_in = module.weight[0].numel()
            # The standard deviation of n normal draws is within 5 of its own, 1 / sqrt(2n), of the true one.
            n = module.weight.numel()
            assert module.weight.std().item() == pytest.approx(math.sqrt(2 / fan_in), rel=5 / math.sqrt(2 * n)), name
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all(), name
            assert (module.bias == 0).all(), name
    assert (network.classifier.bias == 0).all()


def test_dropout_is_between_the_convolutions_and_in_training_only():
    torch.manual_seed(0)
    network = models.create("wrn-16-1", 10, dropout=0.3)
    plain = models.create("wrn-16-1", 10)
    plain.load_state_dict(network.state_dict())  # an option, not a parameter: the keys are the same
    x = torch.randn(4, 3, 8, 8)
    assert sum(isinstance(m, nn.Dropout) for m in network.modules()) == 6  # one a unit
    assert not any(isinstance(m, nn.Dropout) for m in plain.modules())

    seen = []
    unit = network.stages[1][1]
    unit.conv1.register_forward_hook(lambda _m, args, _y: seen.append((args[0] == 0).float().mean().item()))
    unit.conv2.register_forward_hook(lambda _m, args, _y: seen.append((args[0] == 0).float().mean().item()))
    network.train()
    first, second = network(x), network(x)
    assert not torch.equal(first, second)
    # ReLU zeroes about half before each; 0.3 of the rest more before the second convolution only: 0.65.
    assert 0.4 < seen[0] < 0.6 < seen[1] < 0.75

    network.eval()
    plain.load_state_dict(network.state_dict())
    plain.eval()
    assert torch.equal(network(x), network(x))
    assert torch.equal(network(x), plain(x))
    plain.train()
    assert torch.equal(plain(x), plain(x))
