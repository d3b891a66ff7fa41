"""What the processes of torchrun settle before they train: where the run is, and whether it is begun again."""

import os
from pathlib import Path
from typing import Any

import pytest
from cli_calls import SMALL, Call

from ban_fast.cli import ranks
from ban_fast.studies import worker
from ban_fast.training import distributed


@pytest.fixture
def agent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """This process as one of torchrun's, whose own store is there; returns what sets the number of restarts."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    there = {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RUN_ID": "none",
    }
    for name, value in there.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    yield lambda count: monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(count))
    del store


def begin(out: Path) -> None:
    out.mkdir(parents=True)
    (out / "config.json").write_text("{}")


def test_the_first_to_ask_names_the_directory(agent: Any) -> None:
    agent(0)
    first = Path("runs") / "demo-1\udcff"  # any name that a file may have
    assert ranks.settled(first) == (first, False)
    assert ranks.settled(Path("runs/demo-2")) == (first, False)


def test_a_restart_goes_on_where_the_run_has_begun(agent: Any) -> None:
    agent(0)
    assert ranks.settled(Path("one")) == (Path("one"), False)
    agent(1)
    assert ranks.settled(Path("two")) == (Path("one"), False), "it ended before it had begun"
    begin(Path("one"))
    agent(2)
    assert ranks.settled(Path("two")) == (Path("one"), True)


def test_a_run_that_was_there_before_is_no_restart(agent: Any) -> None:
    begin(Path("old"))
    for count in range(3):
        agent(count)
        assert ranks.settled(Path("old")) == (Path("old"), False)


@pytest.mark.usefixtures("agent")
def test_without_torchruns_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has gone, or there is none: what is in the directory decides."""
    begin(Path("run"))
    monkeypatch.setattr(ranks, "_SECONDS_TO_CONNECT", 0.1)
    monkeypatch.setenv("MASTER_PORT", "1")
    for uses in ("True", "False"):
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", uses)
        for count, expected in (("0", False), ("1", True)):
            monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", count)
            assert ranks.settled(Path("run")) == (Path("run"), expected)
        assert ranks.settled(Path("none")) == (Path("none"), False)


def test_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    begin(tmp_path / "run")
    assert ranks.settled(tmp_path / "run") == (tmp_path / "run", False)


SCHEDULED = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29999"}


@pytest.fixture
def scheduled(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """This process as one of a scheduler's, which sets these four and no more."""
    for name in [name for name in os.environ if worker._is_of_a_launcher(name)]:
        monkeypatch.delenv(name)
    for name, value in SCHEDULED.items():
        monkeypatch.setenv(name, value)
    return SCHEDULED


def test_who_speaks_and_who_trains_know_the_same_processes(
    scheduled: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ranks._NEEDED == distributed._LAUNCHED
    assert ranks.is_one_of_several()
    assert distributed.was_launched()
    for name in scheduled:
        with monkeypatch.context() as patch:
            patch.delenv(name)
            assert not ranks.is_one_of_several()
            assert not distributed.was_launched()


@pytest.mark.usefixtures("scheduled")
def test_a_mistake_of_any_of_them_is_a_line(call: Call, tmp_path: Path) -> None:
    call("train", "--batch-size", "0").mistake("--batch-size must be at least 1, got 0")
    call("sweep", "--vary", "objective=ban,cwtm", "--out", "study").mistake("a sweep is not for torchrun, ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("scheduled")
def test_what_is_missing_is_said(call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Instead of a run of each process by itself."""
    monkeypatch.delenv("MASTER_PORT")
    call("train", *SMALL, "--out", "run").mistake("this is one of 2 processes, but MASTER_PORT is not set: set it to")
    monkeypatch.delenv("MASTER_ADDR")
    call("train", *SMALL, "--out", "run").mistake("but MASTER_ADDR and MASTER_PORT are not set: set them to")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("scheduled")
@pytest.mark.parametrize(
    ("name", "value", "bounds"),
    [
        ("WORLD_SIZE", "abc", "of at least 1"),
        ("WORLD_SIZE", "0", "of at least 1"),
        ("RANK", "2", "from 0 to 1"),
        ("RANK", "-1", "from 0 to 1"),
        ("MASTER_PORT", "99999", "from 0 to 65535"),
        ("LOCAL_RANK", "1", "from 0 to 0"),
        ("LOCAL_WORLD_SIZE", "", "from 1 to 2"),
    ],
)
def test_numbers_that_can_not_be(
    call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, value: str, bounds: str
) -> None:
    for local, number in (("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "1")):
        monkeypatch.setenv(local, number)
    monkeypatch.setenv(name, value)
    call("train", *SMALL, "--out", "run").mistake(f"{name} must be a whole number {bounds}, got {value!r}: ")
    assert list(tmp_path.iterdir()) == []


def test_places_among_those_that_share_a_machines_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """By host, and by what each is shown of it: a scheduler may give each process a GPU of its own."""
    found = [("a", None), ("b", "0"), ("a", None), ("b", "1"), ("a", None)]
    monkeypatch.setattr(distributed.dist, "all_gather_object", lambda every, own: every.__setitem__(slice(None), found))
    for rank, (place, size) in enumerate([(0, 3), (0, 1), (1, 3), (0, 1), (2, 3)]):
        monkeypatch.setattr(distributed.socket, "gethostname", lambda rank=rank: found[rank][0])
        shown = found[rank][1]
        if shown is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
        assert distributed._found_locally(rank, len(found)) == (place, size)
