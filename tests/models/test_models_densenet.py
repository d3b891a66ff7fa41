"""DenseNet against torchvision's blocks, written independently of ours."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.densenet import _DenseBlock, _Transition

from ban_fast import models


def torchvision_block(block: nn.ModuleList, width: int, growth: int) -> nn.Module:
    """torchvision's dense block with our weights."""
    theirs = _DenseBlock(len(block), width, bn_size=4, growth_rate=growth, drop_rate=0.0).double()
    names = {"norm1": "reduce.norm", "conv1": "reduce.conv", "norm2": "grow.norm", "conv2": "grow.conv"}
    theirs.load_state_dict(
        {
            f"denselayer{i + 1}.{their}.{key}": value
            for i, unit in enumerate(block)
            for their, our in names.items()
            for key, value in unit.get_submodule(our).state_dict().items()
        }
    )
    return theirs


@pytest.mark.parametrize("final_transition", [False, True])
def test_is_torchvisions_dense_blocks_and_transitions(final_transition):
    torch.manual_seed(0)
    network = models.DenseNet([3, 2], [4, 6], 10, final_transition=final_transition, num_classes=7).double()
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    logits = network(x)
    logits.square().sum().backward()
    gradient = network.stem.weight.grad.clone()
    network.zero_grad()

    y = network.stem(x)
    y = torchvision_block(network.blocks[0], 10, 4)(y)
    transition = _Transition(22, 11).double()
    transition.load_state_dict(network.transitions[0].state_dict())
    y = torchvision_block(network.blocks[1], 11, 6)(transition(y))
    if final_transition:
        third = _Transition(23, 11).double()
        third.load_state_dict(network.transitions[1].state_dict())
        y = third.conv(third.relu(third.norm(y)))  # no pooling after the last block
    y = F.adaptive_avg_pool2d(F.relu(network.norm(y)), 1).flatten(1)
    expected = network.classifier(y)
    expected.square().sum().backward()

    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gradient, network.stem.weight.grad, rtol=1e-9, atol=1e-9)


def test_names_are_built_by_their_numbers():
    with torch.device("meta"):
        network = models.create("densenet-bc-22-5")
    assert [len(block) for block in network.blocks] == [3, 3, 3]
    assert network.stem.out_channels == 10
    assert network.blocks[1][0].grow.conv.out_channels == 5
    assert network.blocks[1][0].reduce.conv.out_channels == 20


def test_he_initialisation():
    torch.manual_seed(0)
    network = models.create("densenet-bc-16-24")
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            assert module.bias is None, name
            fan_out = module.weight[:, 0].numel()
            # The standard deviation of n normal draws is within 5 of its own, 1 / sqrt(2n), of the true one.
            n = module.weight.numel()
            assert module.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=5 / math.sqrt(2 * n)), name
    assert (network.classifier.bias == 0).all()
