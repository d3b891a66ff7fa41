"""What memory="shared" does not take, and what it says then."""

import pytest
import torch
from dense_shared_cases import assert_same, images, make
from torch import nn
from torch.autograd import forward_ad

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
    with pytest.raises(ValueError, match=r"more than 1 value per channel when training, got \[1, 20, 1, 1\]"):
        network(images(batch=1, size=1))
    assert network.eval()(images(batch=1, size=1)).shape == (1, 5)


def test_other_norms_are_refused():
    network = make("shared")
    network.blocks[0][0].reduce.norm = nn.GroupNorm(2, 20).double()
    with pytest.raises(ValueError, match=r'memory="shared" needs nn\.BatchNorm2d or nn\.SyncBatchNorm, got GroupNorm'):
        network(images())


def test_norms_that_do_more_are_refused():
    class Centred(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x) - 1

    network = make("shared")
    network.transitions[0].norm = Centred(network.transitions[0].norm.num_features).double()
    with pytest.raises(ValueError, match=r'memory="shared" needs nn\.BatchNorm2d or nn\.SyncBatchNorm, got Centred'):
        network(images())


class Halved(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) / 2


@pytest.mark.parametrize(
    "other",
    [
        lambda conv, *sizes: nn.Conv2d(*sizes, padding=1),  # with bias
        lambda conv, *sizes: nn.Conv2d(*sizes, padding=1, stride=2, bias=False),
        lambda conv, *sizes: nn.Conv2d(*sizes, padding=2, dilation=2, bias=False),
        lambda conv, *sizes: nn.Conv2d(*sizes, padding=0, bias=False),
        lambda conv, *sizes: nn.Conv2d(*sizes, padding=1, groups=2, bias=False),
        lambda conv, *sizes: nn.Conv2d(*sizes, padding=1, padding_mode="reflect", bias=False),
        lambda conv, *sizes: Halved(*sizes, padding=1, bias=False),
        lambda conv, *sizes: nn.Sequential(conv),
    ],
)
def test_other_convolutions_are_refused(other):
    network = make("shared")
    grow = network.blocks[0][0].grow
    grow.conv = other(grow.conv, 16, 4, 3).double()
    with pytest.raises(ValueError, match=r'(?s)memory="shared" needs nn\.Conv2d without bias.*got .*use "checkpoint"'):
        network(images())


def test_parametrized_convolutions_are_not():
    def change(network):
        torch.manual_seed(0)
        nn.utils.parametrizations.spectral_norm(network.blocks[0][0].grow.conv)
        nn.utils.parametrizations.spectral_norm(network.transitions[1].conv)

    assert_same(change=change)


def test_forward_mode_is_refused():
    network = make("shared")
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=r"dense block has no forward-mode derivative"):
        network(forward_ad.make_dual(images(), images(2)))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:`torch.jit:FutureWarning")
def test_jit_tracing_is_refused():
    network = make("shared").eval()
    with pytest.raises(RuntimeError, match=r"dense block can't be traced by torch\.jit.*torch\.export"):
        torch.jit.trace(network, images())


def test_other_dtypes_are_refused():
    from ban_fast.models.dense_shared import through_block

    network = make("shared")
    with pytest.raises(ValueError, match=r"float32, float64, bfloat16 or float16, got torch\.int32"):
        through_block(torch.zeros(2, 20, 4, 4, dtype=torch.int32), [network.blocks[0][0].reduce.norm], [])


@pytest.mark.parametrize(
    "wrong",
    [
        torch.zeros(2, 3, 8),
        torch.zeros(2, 3, 8, 8, 1),
        torch.zeros(2, 1, 8, 8),
        torch.zeros(2, 3, 8, 8, dtype=torch.complex64),
        torch.zeros(2, 3, 8, 8).to(torch.float8_e4m3fn),
        torch.zeros(2, 3, 8, 8, dtype=torch.uint8),
    ],
    ids=lambda wrong: f"{wrong.dim()}d {wrong.dtype}",
)
@pytest.mark.parametrize("memory", ["plain", "checkpoint", "shared"])
def test_what_are_no_images_is_refused_alike(memory, wrong):
    """One line that says what is taken."""
    said = (
        "must be torch.float32, as" if wrong.shape == (2, 3, 8, 8) else r"must be \[B, 3, H, W\] with H and W at least"
    )
    with pytest.raises(ValueError, match=said) as caught:
        make(memory).float()(wrong)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("memory", ["plain", "checkpoint"])
def test_sync_statistics_is_for_shared(memory):
    with pytest.raises(UserError, match=f'sync_statistics needs memory="shared", got {memory!r}; nn.SyncBatchNorm'):
        models.create("densenet-bc-10-4", memory=memory, sync_statistics=True)


@pytest.mark.parametrize("value", ["maybe", 1, None])
def test_sync_statistics_is_true_or_false(value):
    with pytest.raises(UserError, match=f"sync_statistics must be true or false, got {value!r}"):
        models.create("densenet-bc-10-4", memory="shared", sync_statistics=value)
