"""Several gloo processes train as one does: gradients, weights, figures, caches, checkpoints; and what they refuse."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_runs import EXACT, KEPT, of_digits, outcome, short
from small_runs import digits

NURSERY = Path(__file__).with_name("rank_nursery.py")
OnRanks = Callable[..., dict[str, list[Any]]]


@pytest.fixture
def on_ranks(tmp_path: Path) -> OnRanks:
    """What every rank got from each of the jobs."""

    def start(size: int, *names: str) -> dict[str, list[Any]]:
        done = subprocess.run(
            [sys.executable, str(NURSERY), str(tmp_path), str(size), *names],
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        found = {
            name: [torch.load(tmp_path / str(size) / f"{name}-{rank}.pt", weights_only=False) for rank in range(size)]
            for name in names
        }
        (tmp_path / str(size) / "rendezvous").unlink(missing_ok=True)
        return found

    return start


def check_equal(found: dict[str, Any], expected: dict[str, Any], tolerance: float) -> None:
    """Weights, figures of training and of the test."""
    assert len(found["weights"]) == len(expected["weights"])
    for ours, theirs in zip(found["weights"], expected["weights"], strict=True):
        assert list(ours) == list(theirs)
        for name, tensor in ours.items():
            torch.testing.assert_close(tensor, theirs[name], rtol=tolerance, atol=tolerance, msg=name)
    for ours, theirs in zip(found["epochs"], expected["epochs"], strict=True):
        assert ours["train"] == pytest.approx(theirs["train"], rel=tolerance, abs=tolerance)
        assert (ours["step"], ours["lr"]) == (theirs["step"], theirs["lr"])
    for ours, theirs in zip(found["records"], expected["records"], strict=True):
        assert ours["test"] == pytest.approx(theirs["test"], rel=10 * tolerance, abs=10 * tolerance)


def check_ranks_agree(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks[1:]:
        for ours, theirs in zip(rank["weights"], ranks[0]["weights"], strict=True):
            assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
        assert [record["test"] for record in rank["records"]] == [record["test"] for record in ranks[0]["records"]]


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_are_one_process_in_fp64(size: int, on_ranks: OnRanks) -> None:
    """Whatever the objective, the parts and the shards; batch norm by all ranks' statistics too."""
    for name, ranks in on_ranks(size, *EXACT).items():
        network, settings = EXACT[name]
        # Sums in another order: some hundred roundings of 1e-16, widened where batch norm divides by small deviations.
        check_equal(ranks[0], outcome(settings, network, double=True), 1e-12 if network == "plain" else 1e-10)
        check_ranks_agree(ranks)
        assert not ranks[0]["messages"] or "micro-batches" in ranks[0]["messages"][0]


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_batch_norm_by_shards_and_fp32(size: int, on_ranks: OnRanks) -> None:
    found = on_ranks(size, "norm", "norm, uneven", "fp32", "densenets")
    shards = f"in {size} shards"
    for name, settings in (("norm", short("ban+l")), ("norm, uneven", short("ban+l", batch_size=18))):
        check_equal(found[name][0], outcome(settings, shards, double=True), 1e-12)
        check_ranks_agree(found[name])
        assert "--sync-statistics takes them from whole batches" in found[name][0]["messages"][0]
    # Eight steps with learning rates of 0.05 and 16 images: roundings of 6e-8 in gradients of 1.
    check_equal(found["fp32"][0], outcome(short("ban"), "plain"), 2e-6)
    for checkpoint, shared in found["densenets"]:
        check_equal(checkpoint, shared, 1e-4)  # two orders of summing under batch norm, in fp32


def test_a_cache_on_two_ranks(on_ranks: OnRanks, tmp_path: Path) -> None:
    """Each row is computed once, by either rank, and is what the teacher would say live, to the bit."""
    found = on_ranks(2, "no cache", "memory cache", "file cache", "auto", "auto, uneven")
    live, kept = found["no cache"], found["memory cache"]
    for rank in range(2):
        for ours, theirs in zip(kept[rank]["weights"], live[rank]["weights"], strict=True):
            assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    alone = of_digits(digits("ban", teacher=KEPT))["records"][1]["teacher"]
    teacher = kept[0]["records"][1]["teacher"]
    assert teacher["mode"] == "cache"
    # Filled up to whole batches: on each of two ranks at most one of 8 in each of 6 groups of an epoch.
    assert alone["forward_images"] - 16 * 24 <= teacher["forward_images"] <= alone["forward_images"] + 16 * 24
    assert teacher["forward_images"] < 0.6 * live[0]["records"][1]["teacher"]["forward_images"]
    check_ranks_agree(found["file cache"])
    assert found["file cache"][0]["records"][1]["teacher"]["mode"] == "cache"
    assert json.loads((tmp_path / "auto" / "results.json").read_text())["generations"][1]["teacher"]["mode"] == "cache"
    assert found["auto, uneven"][0]["records"][1]["teacher"]["mode"] == "live"
