"""Parameter counts against the paper's tables, on the meta device: no memory, no time."""

import math

import pytest
import torch
from torch import nn

from ban_fast import models


def count(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def millions(parameters: int, printed: str) -> bool:
    """Whether a printed figure in millions is the count, by rounding or by cutting off."""
    decimals = len(printed.partition(".")[2])
    scaled = parameters / 1e6 * 10**decimals
    return int(printed.replace(".", "")) in (math.floor(scaled), math.floor(scaled + 0.5))


# Name, exact count for 100 classes, for 10 classes in thousands, and the paper's printed millions for each head: the
# figure where rounding or cutting gives it, None where it does not and 1 % must do.
PAPER = [
    ("wrn-28-1", 375_348, 369, "0.38", None),
    ("wrn-28-2", 1_479_220, 1_468, "1.48", None),
    ("wrn-28-5", 9_161_524, 9_133, "9.16", None),
    ("wrn-28-10", 36_536_884, 36_479, "36", "36"),
    ("densenet-112-33", 6_360_761, 6_271, "6.3", "6.3"),
    ("densenet-90-60", 16_240_600, 16_173, None, "16.1"),
    ("densenet-80-80", 22_499_100, 22_422, "22.4", "22.4"),
    ("densenet-80-120", 50_479_600, 50_363, "50.4", "50.4"),
]
PRINTED = {row[0]: float(row[3] or row[4]) for row in PAPER}


@pytest.mark.parametrize(("name", "hundred", "ten_thousands", "printed_hundred", "printed_ten"), PAPER)
def test_paper_rows(name, hundred, ten_thousands, printed_hundred, printed_ten):
    with torch.device("meta"):
        ours, ten = count(models.create(name, 100)), count(models.create(name, 10))
    assert ours == hundred
    assert round(ten / 1e3) == ten_thousands
    for parameters, printed in ((ours, printed_hundred), (ten, printed_ten)):
        if printed is not None:
            assert millions(parameters, printed)
    if "wrn" not in name:  # the paper prints WRN's counts with the 100-class head alone
        assert ours == pytest.approx(PRINTED[name] * 1e6, rel=0.01)


def test_densenet_bc_100_12():
    with torch.device("meta"):
        assert count(models.create("densenet-bc-100-12")) == 800_032


@pytest.mark.parametrize(
    ("units", "hundred", "printed"),
    [(7, 21_346_120, 21.2), (28, 13_740_760, 13.7), (42, 12_954_520, 12.9), (56, 12_596_680, 12.6)],
)
def test_explicit_widths_give_table_4_depth_rows(units, hundred, printed):
    """Students of DenseNet-90-60 with all its widths and other depths: what the explicit builder is for."""
    with torch.device("meta"):
        network = models.DenseNet([units] * 3, [840 // units] * 3, 120, [480, 660, 750], True)
    assert count(network) == hundred
    assert hundred == pytest.approx(printed * 1e6, rel=0.01)


@pytest.mark.parametrize(
    ("name", "before", "after", "last"),
    [("densenet-112-33", (627, 874), (313, 437), 998), ("densenet-90-60", (960, 1320, 1500), (480, 660, 750), 750)],
)
def test_widths_along_a_densenet(name, before, after, last):
    with torch.device("meta"):
        network = models.create(name)
        seen = []
        network.norm.register_forward_pre_hook(lambda _module, args: seen.append(tuple(args[0].shape)))
        network(torch.empty(2, 3, 32, 32))
    assert tuple(t.conv.in_channels for t in network.transitions) == before
    assert tuple(t.conv.out_channels for t in network.transitions) == after
    assert seen == [(2, last, 8, 8)]  # two poolings, none after a third transition


def test_printed_figures_by_rounding_or_cutting():
    assert millions(6_360_761, "6.3")
    assert millions(375_348, "0.38")
    assert not millions(16_240_600, "16.1")
