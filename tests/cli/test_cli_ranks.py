"""What the processes of torchrun settle before they train: where the run is, and whether it is begun again."""

from pathlib import Path
from typing import Any

import pytest

from ban_fast.cli import ranks


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
