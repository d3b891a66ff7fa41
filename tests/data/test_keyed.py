"""The keyed draws: the bits they are defined to be, uniform, and independent in every part of the key.

All keys are constants, so nothing here is a matter of chance: the bounds say how unusual the draws of this one
definition may look, 4 standard deviations of the statistic (1 in 16,000 for a fair generator).
"""

import itertools

import pytest
import torch
from torch import Tensor

from ban_fast.data import keyed

IDS = torch.arange(50_000)
WORD = 2**64


def mix(x: int) -> int:
    """SplitMix64's finaliser in Python's integers."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % WORD
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % WORD
    return x ^ (x >> 31)


def key(*words: int) -> int:
    k = 0x9E3779B97F4A7C15
    for word in words:
        k = (mix(k ^ (word % WORD)) + 0x9E3779B97F4A7C15) % WORD
    return k


def chi_square_z(counts: Tensor) -> float:
    """A chi-square statistic against equal expectations, as standard deviations of a normal (Wilson and Hilferty)."""
    expected = counts.double().mean()
    freedom = counts.numel() - 1
    statistic = float(((counts - expected) ** 2 / expected).sum())
    return ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / (2 / (9 * freedom)) ** 0.5


def joint(a: Tensor, b: Tensor, n: int) -> Tensor:
    return torch.bincount(a * n + b, minlength=n * n)


@pytest.mark.parametrize(("seed", "epoch", "stream"), [(0, 0, 0), (1, 7, 1), (2**63 - 1, 199, 2), (-1, 2**40, 1)])
def test_bits_are_the_defined_ones(seed: int, epoch: int, stream: int) -> None:
    ids = torch.tensor([0, 1, 49_999, 2**62, -5])
    first = key(seed, epoch, stream)
    second = key(first)
    wanted = [mix(mix((i + first) % WORD) ^ second) for i in ids.tolist()]
    assert [bits % WORD for bits in keyed.bits(seed, epoch, ids, stream).tolist()] == wanted


def test_bits_stay_the_same_in_every_version() -> None:
    # A change here changes every run and every cached teacher: it needs a reason and a new format.
    assert keyed.bits(3, 5, torch.arange(3), keyed.VIEW).tolist() == [
        -5583592136585812742,
        -1258383711639284320,
        -3300248512475831110,
    ]


def test_bits_do_not_depend_on_which_ids_are_asked_for() -> None:
    some = torch.tensor([[4, 40_000], [17, 4]])
    assert torch.equal(keyed.bits(1, 2, some, 0), keyed.bits(1, 2, IDS, 0)[some])


def test_ids_are_left_alone() -> None:
    ids = torch.arange(10)
    keyed.bits(0, 0, ids, 0)
    assert torch.equal(ids, torch.arange(10))


@pytest.mark.parametrize("n", [2, 9, 81, 162, 1000])
def test_views_are_uniform(n: int) -> None:
    for seed, epoch in itertools.product(range(3), range(3)):
        values = keyed.below(keyed.bits(seed, epoch, IDS, keyed.VIEW), n)
        assert abs(chi_square_z(torch.bincount(values, minlength=n))) < 4


def test_one_sample_sees_all_views_over_the_epochs() -> None:
    one = torch.tensor([123])
    values = torch.cat([keyed.below(keyed.bits(0, epoch, one, keyed.VIEW), 162) for epoch in range(5000)])
    assert abs(chi_square_z(torch.bincount(values, minlength=162))) < 4


@pytest.mark.parametrize(
    ("other", "shift"),
    [((0, 1, keyed.VIEW), 0), ((1, 0, keyed.VIEW), 0), ((0, 0, keyed.ORDER), 0), ((0, 0, keyed.VIEW), 1)],
    ids=["next epoch", "next seed", "other stream", "next sample"],
)
def test_draws_are_independent(other: tuple[int, int, int], shift: int) -> None:
    n = 18  # rows of the family of CIFAR's views: 9 offsets x 2
    a = keyed.below(keyed.bits(0, 0, IDS, keyed.VIEW), n)
    seed, epoch, stream = other
    b = keyed.below(keyed.bits(seed, epoch, IDS + shift, stream), n)
    assert abs(chi_square_z(joint(a, b, n))) < 4


@pytest.mark.parametrize("change", range(0, 63, 9))
def test_one_bit_of_the_key_changes_half_of_the_bits(change: int) -> None:
    ids = torch.arange(2000)
    base = keyed.bits(0, 0, ids, 0)
    for changed in (
        keyed.bits(1 << change, 0, ids, 0),
        keyed.bits(0, 1 << change, ids, 0),
        keyed.bits(0, 0, ids ^ (1 << change), 0),
    ):
        difference = base ^ changed
        flipped = torch.stack([(difference >> bit) & 1 for bit in range(64)]).double().mean(1)
        # 2,000 draws of a fair bit: standard deviation 0.0112; 4.5 of them for 64 bits at once.
        assert (flipped - 0.5).abs().max() < 0.05


def test_order_is_a_permutation_of_every_epoch_its_own() -> None:
    orders = [keyed.order(0, epoch, IDS) for epoch in range(3)]
    for order in orders:
        assert torch.equal(order.sort().values, IDS)
    # Two random permutations of N agree in 1 place on average.
    assert all((a == b).sum() < 8 for a, b in itertools.combinations(orders, 2))


def test_orders_are_uniform() -> None:
    permutations = {p: i for i, p in enumerate(itertools.permutations(range(4)))}
    ids = torch.tensor([3, 14, 15, 92])
    seen = torch.tensor([permutations[tuple(keyed.order(7, epoch, ids).tolist())] for epoch in range(2400)])
    assert abs(chi_square_z(torch.bincount(seen, minlength=24))) < 4


def test_order_of_some_is_their_order_among_all() -> None:
    some = torch.arange(0, 50_000, 7)
    whole = keyed.order(1, 1, IDS)
    assert torch.equal(some[keyed.order(1, 1, some)], whole[whole % 7 == 0])


@pytest.mark.parametrize("n", [0, 2**31])
def test_below_refuses_what_it_cannot_do(n: int) -> None:
    with pytest.raises(ValueError, match=f"got {n}"):
        keyed.below(IDS, n)


def test_below_takes_all_values_and_no_other() -> None:
    extremes = torch.tensor([0, -1, 2**63 - 1, -(2**63)])
    assert keyed.below(extremes, 162).tolist() == [0, 161, 80, 81]
