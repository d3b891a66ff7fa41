"""What memory="shared" does not take, and what it says then."""

import pytest
import torch
from dense_shared_cases import images, make
from torch import nn

from ban_fast import models
from ban_fast.errors import UserError


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
