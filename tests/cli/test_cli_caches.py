"""`--cache-dir` where something is wrong with it: one line each time, and `--resume` ends as if nothing had been."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cli_calls import SMALL, Said, Start, await_there, finish, tree

# 20 epochs show some 90 % of 9 views of 128 images: over 1,000 rows, 41 KB of room for the first 1,024 of them alone.
KEPT = (*SMALL[2:], "--model", "held:Held", "--epochs", "20", "--teacher", "cache", "--cache-dir")
HELD = """
import os, time
from pathlib import Path
from torch import nn

class Held(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))

    def forward(self, x):
        if "HOLD" in os.environ and self.training and any(path.stat().st_size for path in Path().glob("*/*/index.bin")):
            Path("held").touch()
            while not Path("go").exists():
                time.sleep(0.01)
        return self.layers(x)
"""
"""With HOLD set, a student waits for a file `go` as soon as some of its teacher's rows are there, and says so."""

ROOM = 40_000
"""Bytes of a file: enough for any other."""


def figures(run: Path) -> Any:
    """What training came to, with the networks."""
    records = json.loads((run / "results.json").read_text())["generations"]
    return [record["test"] for record in records], [path.read_bytes() for path in run.glob("*/model.safetensors")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What a run comes to whose cache has room."""
    place = tmp_path_factory.mktemp("whole")
    (place / "held.py").write_text(HELD)
    command = [sys.executable, "-m", "ban_fast", "train", *KEPT, "caches", "--out", "run"]
    subprocess.run(command, cwd=place, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, check=True)
    return figures(place / "run")


@pytest.fixture(autouse=True)
def network(tmp_path: Path) -> None:
    (tmp_path / "held.py").write_text(HELD)


def resumed(start: Start, *more: str) -> Said:
    said = finish(start("train", "--out", "run", "--resume", *more))
    assert (said.status, said.err) == (0, "")
    return said


@pytest.mark.slow
def test_a_full_disk(start: Start, tmp_path: Path, whole: Any) -> None:
    """Which stays full, then has room again."""

    def fill() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM, resource.RLIM_INFINITY))

    finish(start("train", *KEPT, "caches", "--out", "run", preexec_fn=fill)).line(
        "cannot write ", "rows.bin: File too large; "
    )
    (cache,) = (tmp_path / "caches").iterdir()
    before = tree(tmp_path / "caches")
    said = finish(start("train", "--out", "run", "--resume", preexec_fn=fill))
    assert said.status == 2
    said.line("rows.bin: File too large; ")
    assert tree(tmp_path / "caches") == before
    assert json.loads((tmp_path / "run" / "results.json").read_text())["generations"][0]["test"] == whole[0][0]
    resumed(start)
    assert figures(tmp_path / "run") == whole
    assert (cache / "rows.bin").stat().st_size > ROOM


@pytest.mark.slow
def test_a_place_that_is_none(start: Start, tmp_path: Path, whole: Any) -> None:
    """From the start, or since the last session; and files of a cache that can't be opened. Then another is taken."""
    before = tree(tmp_path)
    finish(start("train", *KEPT, "/proc/caches", "--out", "run")).mistake("--", " /proc")  # root may, and can't
    (tmp_path / "file").touch()
    finish(start("train", *KEPT, "file/below", "--out", "run")).mistake("--cache-dir: ", "file is not a directory")
    (tmp_path / "file").unlink()
    assert tree(tmp_path) == before
    stop_with_rows(start, tmp_path)
    (cache,) = (tmp_path / "caches").iterdir()
    (cache / "rows.bin").unlink()
    (cache / "rows.bin").mkdir()
    before = tree(tmp_path)
    said = finish(start("train", "--out", "run", "--resume"))
    assert said.status == 2
    said.line("cannot write ", "rows.bin: Is a directory; ")
    shutil.rmtree(tmp_path / "caches")
    (tmp_path / "caches").touch()
    finish(start("train", "--out", "run", "--resume")).mistake("caches is not a directory", "--cache-dir")
    (tmp_path / "caches").unlink()
    assert tree(tmp_path) == {name: content for name, content in before.items() if not name.startswith("caches")}
    resumed(start, "--cache-dir", "another")
    assert figures(tmp_path / "run") == whole


@pytest.mark.slow
def test_a_cache_cut_short_between_two_sessions(start: Start, tmp_path: Path, whole: Any) -> None:
    stop_with_rows(start, tmp_path)
    (cache,) = (tmp_path / "caches").iterdir()
    (cache / "rows.bin").write_bytes((cache / "rows.bin").read_bytes()[:100])  # two and a half of them
    said = resumed(start)
    assert "was damaged after " in said.out
    assert figures(tmp_path / "run") == whole


@pytest.mark.slow
def test_two_runs_at_once(start: Start, tmp_path: Path, whole: Any) -> None:
    """Who insists on the cache is told; who doesn't keeps rows of its own, to the same bits."""
    first = held(start, tmp_path, "first")
    second = finish(start("train", *KEPT, "caches", "--out", "run"))
    assert second.status == 2
    second.line("is in use by another process: wait for it, or choose another --cache-dir; --resume takes either")
    third = finish(start("train", *KEPT, "caches", "--out", "third", "--teacher", "auto"))
    assert (third.status, third.err) == (0, "")
    assert "; another process fills its cache in" in third.out
    assert not (tmp_path / "third" / "teacher-cache").exists()
    (tmp_path / "go").touch()
    assert finish(first).status == 0
    said = resumed(start)
    assert "100% of these are kept already: 100% fewer forward passes than live" in said.out
    assert figures(tmp_path / "first") == figures(tmp_path / "third") == figures(tmp_path / "run") == whole


def stop_with_rows(start: Start, home: Path) -> None:
    """A run in `home` that was told to stop when it had some rows."""
    process = held(start, home, "run")
    process.send_signal(signal.SIGTERM)
    (home / "go").touch()
    assert finish(process).status == 143


def held(start: Start, home: Path, out: str) -> "subprocess.Popen[str]":
    """A run in `home` that has some rows, and waits."""
    process = start("train", *KEPT, "caches", "--out", out, env={"HOLD": "1"})
    await_there(home / "held", process)
    return process
