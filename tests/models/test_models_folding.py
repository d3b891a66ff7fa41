"""Networks with folded batch norms give the same logits: the paper's networks, at widths that a test can take."""

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn

from ban_fast import models
from ban_fast.models.densenet import densenet_bc
from ban_fast.models.folding import NotFolded, ScaleShift, fold

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "WRN-28-1, a stage without projection": partial(models.create, "wrn-28-1"),
    "WRN-28-2": partial(models.create, "wrn-28-2"),
    "WRN-16-2 with dropout": partial(models.create, "wrn-16-2", dropout=0.3),
    "DenseNet-112-33's depth": partial(densenet_bc, 17, 3),
    "DenseNet-90-60's depth, a third transition": partial(densenet_bc, 14, 3, True),
    "DenseNet-80-80's depth, checkpointed": partial(densenet_bc, 12, 4, True, memory="checkpoint"),
    "the demo's": partial(models.create, "convnet-8"),
    "BN after every convolution, and sums": partial(models.create, "torchvision:resnet18"),
    "convolutions with groups": partial(models.create, "torchvision:mobilenet_v3_small"),
}


def trained(make: Callable[[], nn.Module], dtype: torch.dtype = torch.float64) -> nn.Module:
    """In eval mode, with norms away from 1 and 0, so that one in the wrong place shows; numbers stay near 1."""
    torch.manual_seed(0)
    network = make().to(dtype)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.3)
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 2)
    return network.eval()


@torch.no_grad()
def off(network: nn.Module, folded: nn.Module, dtype: torch.dtype) -> float:
    """By how much logits differ, of the largest."""
    x = torch.randn(3, 3, 16, 16, dtype=dtype, generator=torch.Generator().manual_seed(1))
    own, found = network(x), folded(x)
    assert own.shape == found.shape
    assert own.dtype == found.dtype
    return float((own - found).abs().max() / own.abs().max())


@pytest.mark.parametrize("into_convolutions", [True, False])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_same_logits(name: str, into_convolutions: bool) -> None:
    network = trained(NETWORKS[name])
    before = copy.deepcopy(network.state_dict())
    folded = fold(network, into_convolutions=into_convolutions)
    assert off(network, folded, torch.float64) < 1e-12
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    after = network.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)


@pytest.mark.parametrize("into_convolutions", [True, False])
@pytest.mark.parametrize("name", NETWORKS)
def test_in_single_precision(name: str, into_convolutions: bool) -> None:
    """Rounding of 2^-24 an operation through up to a hundred layers: 1e-5 of the largest logit leaves room for ten."""
    network = trained(NETWORKS[name], torch.float32)
    assert off(network, fold(network, into_convolutions=into_convolutions), torch.float32) < 1e-5


def test_in_bf16_autocast() -> None:
    """Where the two round a half-precision number to different sides: its 2^-8, a few times."""
    network = trained(NETWORKS["WRN-16-2 with dropout"], torch.float32)
    for into_convolutions in (True, False):
        folded = fold(network, into_convolutions=into_convolutions)
        with torch.autocast("cpu", torch.bfloat16):
            assert off(network, folded, torch.float32) < 4 * 2**-8


def test_where_norms_go() -> None:
    """Into a convolution that nothing else reads: WRN's second of a unit, and the stem's before a projection."""
    network = trained(partial(models.create, "wrn-16-2"))
    folded = fold(network, into_convolutions=True)
    left = [module for module in folded.modules() if isinstance(module, ScaleShift)]
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in network.modules())
    assert (norms, len(left)) == (13, 6)  # 6 second norms and the stem's are gone
    assert all(module.relu for module in left)
    dense = trained(partial(densenet_bc, 2, 4, True))
    left = [module for module in fold(dense, into_convolutions=True).modules() if isinstance(module, ScaleShift)]
    # The first norm of 6 units, those of three transitions, and the last but for none: a transition's convolution is
    # read by the norm at the end alone, and by a pooling before the next block.
    assert len(left) == 6 + 3


def test_what_stays_is_shared() -> None:
    network = trained(partial(models.create, "wrn-10-1"))
    folded = fold(network, into_convolutions=True)
    kept = {tensor.data_ptr() for tensor in network.parameters()}
    own = sum(tensor.numel() for tensor in folded.parameters() if tensor.data_ptr() not in kept)
    whole = sum(tensor.numel() for tensor in network.parameters())
    assert 0 < own < 0.6 * whole  # the first convolution of each unit


class Twice(nn.Module):
    """A convolution that is used twice, and a norm that is."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.conv(x))
        return (self.norm(self.conv(y)) + self.conv(x)).mean((2, 3))


def test_modules_that_are_used_twice() -> None:
    network = trained(Twice)
    for into_convolutions in (True, False):
        assert off(network, fold(network, into_convolutions=into_convolutions), torch.float64) < 1e-12


class Asks(nn.Module):
    """A network that goes its way by what it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x if x.sum() > 0 else -x)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (partial(models.create, "mlp-8", image_size=16), "it has no batch norm"),
        (partial(densenet_bc, 1, 4, memory="shared"), "its dense blocks apply batch norm as they read"),
        (Asks, r"its operations can't be followed \(TraceError: "),
        (lambda: nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False)), "its batch norms normalise by the batch"),
    ],
)
def test_what_can_not_be_folded(make: Callable[[], nn.Module], reason: str) -> None:
    with pytest.raises(NotFolded, match=reason):
        fold(make().eval(), into_convolutions=True)
