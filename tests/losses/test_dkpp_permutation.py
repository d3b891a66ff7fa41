"""DKPP's permutation: by definition, the same bits on every backend, and uniform."""

import dkpp_truth
import pytest
import torch
from torch import Tensor

from ban_fast.backends import dispatch, permutation

IDS = [0, 1, 2, 3, 4095, 2**31 - 1, 2**31, 2**32, 2**40 + 7, 2**63 - 1, -1, -2, -(2**32), -(2**63)]
KEYS = [(0, 0), (0, 1), (1, 0), (2**32, 5), (-1, -1), (2**63 - 1, 2**31), (-(2**63), 2**63 - 1), (123456789, 10**12)]
SIZES = [*range(1, 131), 200, 999, 1000, 1001, 2500, 10000]
# 4e-5 in all for the tests below if the generator is uniform; a biased one is under 1e-8 (see the last test).
UNLIKELY = 1e-6


def permute(
    classes: int, rows: int, *, ids: Tensor | None = None, step: Tensor | int = 0, seed: int = 0, backend: str = "auto"
) -> Tensor:
    """Permutations of the ranks besides the argmax, [rows, classes - 1], by the fastest backend there is: the bits are
    the same on all, as the first two tests have it."""
    module = dispatch.resolve(backend, "dkpp", torch.empty(rows, classes))
    kept = torch.zeros(rows, dtype=torch.int64)
    return module.dkpp_permutation(kept, ids, step, seed=seed, num_classes=classes)[:, 1:] - 1


def test_definition(backend: str) -> None:
    module = dispatch.named(backend, "cpu")
    for classes in (1, 2, 3, 4, 5, 10, 98, 99, 100, 101, 130, 1000, 1001, 1003):
        argmax = torch.tensor([(7 * i) % classes for i in range(len(IDS))])
        ids = torch.tensor(IDS)
        seed, step = KEYS[classes % len(KEYS)]
        result = module.dkpp_permutation(argmax, ids, step, seed=seed, num_classes=classes)
        expected = [
            dkpp_truth.sources(kept, classes, seed, step, sample_id)
            for kept, sample_id in zip(argmax.tolist(), IDS, strict=True)
        ]
        assert result.dtype == torch.int64
        assert result.tolist() == expected


@pytest.mark.parametrize("seed_and_step", KEYS)
def test_bijections_that_keep_the_argmax_and_are_the_same_bits(backend: str, seed_and_step: tuple[int, int]) -> None:
    """Between backends; the reference is itself held against the definition, above."""
    module, reference = (dispatch.named(name, "cpu") for name in (backend, "reference"))
    seed, step = seed_and_step
    torch.manual_seed(0)
    sizes = SIZES if seed_and_step in KEYS[:2] else SIZES[seed % 5 :: 5]
    for classes in sizes:
        rows = 3 if classes > 130 else 6
        argmax = torch.randint(classes, (rows,))
        ids = torch.randint(-(2**63), 2**63 - 1, (rows,))
        options = {"seed": seed, "num_classes": classes}
        result = module.dkpp_permutation(argmax, ids, step, **options)
        assert torch.equal(result.sort(1).values, torch.arange(classes).expand(rows, classes)), classes
        assert torch.equal(result.gather(1, argmax[:, None]).squeeze(1), argmax), classes
        assert torch.equal(module.dkpp_permutation(argmax, ids, torch.tensor(step), **options), result)
        if backend != "reference":
            assert torch.equal(result, reference.dkpp_permutation(argmax, ids, step, **options)), classes
    numbered = module.dkpp_permutation(argmax, torch.arange(rows), step, **options)
    assert torch.equal(module.dkpp_permutation(argmax, None, step, **options), numbered)


def streams(classes: int, rows: int, backend: str = "auto") -> dict[str, Tensor]:
    """Permutations as a training run varies their key: by sample, by far-apart samples, and by step."""
    per_step = rows // 20
    return {
        "ids": permute(classes, rows, seed=3, backend=backend),
        "spread": permute(classes, rows, ids=torch.arange(rows) * 2**33 - 5, step=7, backend=backend),
        "steps": torch.cat([permute(classes, per_step, step=torch.tensor(s), backend=backend) for s in range(20)]),
    }


@pytest.mark.parametrize("classes", [3, 4, 5])
def test_whole_permutations_are_uniform(classes: int) -> None:
    for ranks in streams(classes, 60_000).values():
        assert dkpp_truth.whole_p(ranks) > UNLIKELY


@pytest.mark.parametrize("classes", [3, 4, 5, 10, 100])
def test_positions_are_uniform(classes: int) -> None:
    for ranks in streams(classes, 60_000).values():
        assert dkpp_truth.position_p(ranks) > UNLIKELY


@pytest.mark.parametrize("classes", [4, 5, 10, 99, 100])
def test_pairs_are_uniform(classes: int) -> None:
    """Neighbours, ends, and at 100 classes ranks of one Feistel column (11 apart): the pairs that hide least."""
    n = classes - 1
    pairs = {(0, 1), (0, n - 1), (n - 2, n - 1)} | ({(0, 11), (5, 16), (3, 91)} if classes == 100 else set())
    for ranks in streams(classes, 60_000).values():
        assert min(dkpp_truth.pair_p(ranks, *pair) for pair in pairs) > UNLIKELY


def test_neighbouring_keys_are_independent() -> None:
    """One key's permutation after the inverse of the next one's is as uniform as either."""
    for classes in (5, 10, 100):
        rows = 40_000
        for one, other in (
            (permute(classes, rows), permute(classes, rows, step=1)),
            (permute(classes, rows), permute(classes, rows, seed=1)),
            (permute(classes, rows), permute(classes, rows, ids=torch.arange(rows) + 1)),
        ):
            assert dkpp_truth.position_p(other.gather(1, one.argsort(1))) > UNLIKELY


@pytest.mark.slow
def test_ranks_of_one_column_are_uniform_in_a_million_samples() -> None:
    """Where six Feistel rounds were not: a pair of one column kept its distance in rows 8 % too often."""
    counts = torch.zeros(99 * 99, dtype=torch.float64)
    for start in range(0, 1_000_000, 50_000):
        ranks = permute(100, 50_000, ids=torch.arange(start, start + 50_000), seed=21)
        for first in (0, 3, 5):
            counts += torch.bincount(ranks[:, first] * 99 + ranks[:, first + 11], minlength=99 * 99)
    first, second = torch.arange(99).repeat_interleave(99), torch.arange(99).repeat(99)
    kept = (first % 11 == second % 11) & ((second // 11 - first // 11) % 9 == 1)
    expected = 3_000_000 * kept.sum() / (99 * 98)
    assert abs(counts[kept].sum() - expected) < 5 * expected.sqrt()
    assert dkpp_truth.chi_square(counts[first != second]) > UNLIKELY


def test_these_tests_find_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    """Power: fewer rounds of either network, and a shuffle that swaps with any place, fail by far."""
    monkeypatch.setattr(permutation, "_feistel_rounds", lambda n: 4)
    monkeypatch.setattr(permutation, "_SWAP_ROUNDS", 6)
    assert dkpp_truth.whole_p(streams(5, 60_000, "reference")["ids"]) < UNLIKELY / 100
    ten = streams(10, 60_000, "reference")["ids"]
    assert dkpp_truth.position_p(ten) < UNLIKELY / 100
    assert dkpp_truth.pair_p(ten, 0, 1) < UNLIKELY / 100
    hundred = permute(100, 30_000, backend="reference")
    assert dkpp_truth.pair_p(hundred, 0, 11) < UNLIKELY / 100

    torch.manual_seed(0)
    shuffled = torch.arange(4).repeat(60_000, 1)
    for place in range(4):
        other = torch.randint(4, (60_000, 1))
        mine, theirs = shuffled[:, place, None].clone(), shuffled.gather(1, other)
        shuffled[:, place, None] = theirs
        shuffled = shuffled.scatter(1, other, mine)
    assert dkpp_truth.whole_p(shuffled) < UNLIKELY / 100
    uniform = torch.rand(60_000, 4).argsort(1)
    assert dkpp_truth.whole_p(uniform) > 1e-3
    assert dkpp_truth.position_p(uniform) > 1e-3
    assert dkpp_truth.pair_p(uniform, 0, 1) > 1e-3
