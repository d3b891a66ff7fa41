"""Several gloo processes train as one does: gradients, weights, figures, caches, checkpoints; and what they refuse."""

import errno
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_runs import COMPILED, EXACT, KEPT, RESUMED, interrupted, of_digits, of_text, outcome, short
from small_runs import digits, footprint
from text_runs import write_text
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from ban_fast.errors import OptionError, UserError
from ban_fast.training.distributed import Ranks, packed, portable

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
            timeout=1800,
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


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
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


@pytest.mark.slow
def test_compiled_and_side_by_side(on_ranks: OnRanks, tmp_path: Path) -> None:
    found = on_ranks(2, "compiled", "family")
    check_equal(found["compiled"][0], outcome(COMPILED, "plain"), 2e-6)
    check_ranks_agree(found["compiled"])
    network, settings = EXACT["together"]
    check_equal(found["family"][1], outcome(settings, network, double=True), 1e-12)
    for folder in ("ban_l", "cwtm"):
        assert (tmp_path / "family" / folder / "generation-1" / "model.safetensors").exists()


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_file_of_a_teachers_rows_outlives_a_stop(on_ranks: OnRanks, tmp_path: Path) -> None:
    """Rank 0 reads it and gives its rows to the others: none is computed twice, and the bits are the same."""
    found = on_ranks(2, "file cache", "file cache, stopped", "file cache, resumed")
    whole, resumed = found["file cache"], found["file cache, resumed"]
    assert (tmp_path / "stopped cache" / "generation-1" / "model.safetensors").exists()
    for ours, theirs in zip(resumed[0]["records"], whole[0]["records"], strict=True):
        assert ours["test"] == theirs["test"]
        assert ours.get("teacher") == theirs.get("teacher")


def test_dropout_on_two_ranks_goes_on_where_it_was(on_ranks: OnRanks, tmp_path: Path) -> None:
    """Each rank draws masks of its own, and the checkpoint has the generators of both: the same bits."""
    found = on_ranks(2, "whole", "stopped", "resumed", *REFUSED)
    assert footprint(tmp_path / "resumed") == footprint(tmp_path / "whole")
    check_ranks_agree(found["resumed"])
    states = torch.load(tmp_path / "whole" / "generation-2" / "state.pt", weights_only=True)["random"]
    assert len(states) == 2
    assert not torch.equal(states[0]["torch"], states[1]["torch"])
    for name, message in REFUSED.items():
        assert all(message in said for said in found[name]), found[name]


REFUSED = {
    "small batch": "batch_size: 1 images can't be shared by 2 processes: use fewer, or a larger batch",
    "single images": "micro_batch_size: must be at least 2 where 2 processes share 9 images",
    "DataLoader": "a DataLoader's order is its own affair, and several processes need the same: pass tensors",
    "synced, compiled": "sync_statistics: what is exchanged for them is not compiled; leave --compile out",
    "ahead": "teacher.cache_fill: several processes fill a cache together while they train; use lazy",
    "unused": "the network's 1.extra.weight gets no gradient, and the processes wait for each other's: freeze it",
    "one rank alone": "cifar10",
    "diverged": "the loss is not finite in generation 0, epoch 1, at step 1: lower --lr",
}


@pytest.mark.slow
def test_a_texts_streams_on_two_ranks(on_ranks: OnRanks, tmp_path: Path) -> None:
    """Each has half of them, with states of its own: what one process does with all, and again after a stop."""
    write_text(tmp_path / "corpus", lines=40)
    names = "text", "text by cwtm", "text, whole", "text, stopped", "text, resumed", "text, uneven", "text, kept"
    found = on_ranks(2, *names)
    for name, changes in (("text", {}), ("text by cwtm", {"objective": "cwtm"})):
        # fp64: some 30 steps whose sums run in another order
        check_equal(found[name][0], of_text(tmp_path, double=True, settings=changes), 1e-11)
        check_ranks_agree(found[name])
    assert footprint(tmp_path / "text") == footprint(tmp_path / "whole text")
    check_ranks_agree(found["text, resumed"])
    for name, message in (
        ("text, uneven", "batch_size: 5 streams can't be shared evenly by 2 processes: use a multiple of that"),
        ("text, kept", "teacher.mode: several processes keep no outputs of a text: use live, or one process"),
    ):
        assert found[name] == [message, message]


@pytest.mark.slow
def test_a_text_goes_on_with_another_number_of_ranks(on_ranks: OnRanks, tmp_path: Path) -> None:
    """A checkpoint has the states of all streams, whoever had them."""
    write_text(tmp_path / "corpus", lines=40)
    on_ranks(2, "text, stopped in double")
    (*_, last) = on_ranks(4, "text, double to the end")["text, double to the end"]
    expected = of_text(tmp_path, double=True)
    expected["epochs"] = expected["epochs"][-len(last["epochs"]) :]
    check_equal(last, expected, 1e-11)
    assert "processes 2 then, 4 now" in last["messages"][0]


@pytest.mark.slow
def test_another_number_of_ranks_goes_on(on_ranks: OnRanks, tmp_path: Path) -> None:
    """Two of them, then one, then four: what one process does from beginning to end."""
    on_ranks(2, "stop in double")
    interrupted(RESUMED, "plain", 18, tmp_path / "double", double=True, resume=True)
    (*_, last) = on_ranks(4, "double to the end")["double to the end"]
    expected = outcome(RESUMED, "plain", double=True)
    expected["epochs"] = expected["epochs"][-len(last["epochs"]) :]
    check_equal(last, expected, 1e-12)
    assert "processes 2 then, 4 now" in last["messages"][0]


def test_a_machine_with_fewer_gpus_than_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    ranks = Ranks(5, 8, local_rank=1, local_size=4)
    assert ranks.device(cpu) == cpu
    assert Ranks().device(cuda) == cuda
    with pytest.raises(OptionError, match=r"4 processes were started on a machine with 2 GPUs.*--nproc-per-node 2"):
        ranks.device(cuda)
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert Ranks(5, 8, local_rank=1, local_size=2).device(cuda) == torch.device("cuda", 1)
    assert chosen == [1]


def test_a_rank_without_a_gpu_among_others_that_have_one() -> None:
    """Each says so; the store is torchrun's, and outlives them."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    code = (
        "import os, torch\n"
        "torch.cuda.is_available = lambda: os.environ['RANK'] == '0'\n"
        "from ban_fast.errors import OptionError\n"
        "from ban_fast.training.distributed import joined\n"
        "try:\n"
        "    with joined('auto'):\n"
        "        print('joined')\n"
        "except OptionError as error:\n"
        "    print(error)\n"
    )
    launched = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **launched, **place, "RANK": str(rank)},
        )
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=1800)[0] for rank in ranks]
    assert said == ["device: some of the processes have a GPU, and some have none: use cpu for all\n"] * 2


def test_errors_travel() -> None:
    """From the rank that met them to the others, as what they are."""

    class Local(Exception):
        def __init__(self, one: int, two: int) -> None:
            super().__init__(one + two)

    option = pickle.loads(pickle.dumps(portable(OptionError("batch_size", "is wrong"))))
    assert (type(option), str(option), option.field) == (OptionError, "batch_size: is wrong", "batch_size")
    assert str(pickle.loads(pickle.dumps(portable(Local(1, 2))))) == "Local: 3"
    full = OSError(errno.ENOSPC, "No space left on device", "state.pt")
    try:
        raise UserError("cannot write state.pt") from full
    except UserError as raised:
        error, cause = pickle.loads(pickle.dumps(packed(raised)))
    assert (type(error), str(error), type(cause), cause.errno) == (
        UserError,
        "cannot write state.pt",
        OSError,
        errno.ENOSPC,
    )
    assert packed(ValueError("of nothing"))[1] is None
