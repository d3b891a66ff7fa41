"""`--cache-dir` where something is wrong with it: one line each time, and `--resume` ends as if nothing had been."""

import json
import os
import resource
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from cli_calls import SMALL, Said, Start, finish, tree

# 20 epochs show some 90 % of 9 views of 128 images: over 1,000 rows, 41 KB of room for the first 1,024 of them alone.
KEPT = (*SMALL, "--epochs", "20", "--teacher", "cache", "--cache-dir")
ROOM = 40_000
"""Bytes of a file: enough for any other."""


def figures(run: Path) -> Any:
    """What training came to, with the networks."""
    records = json.loads((run / "results.json").read_text())["generations"]
    return [record["test"] for record in records], [path.read_bytes() for path in run.glob("*/model.safetensors")]


@pytest.fixture
def whole(start: Start, tmp_path: Path) -> Any:
    """What a run comes to whose cache has room."""
    assert finish(start("train", *KEPT, "roomy", "--out", "whole")).status == 0
    return figures(tmp_path / "whole")


def resumed(start: Start, *more: str) -> Said:
    said = finish(start("train", "--out", "run", "--resume", *more))
    assert (said.status, said.err) == (0, "")
    return said


def test_a_full_disk(start: Start, tmp_path: Path, whole: Any) -> None:
    """Which stays full, then has room again; or another is taken."""

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
    shutil.copytree(tmp_path / "run", tmp_path / "kept")
    resumed(start)
    assert figures(tmp_path / "run") == whole
    assert (cache / "rows.bin").stat().st_size > ROOM
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "kept").rename(tmp_path / "run")
    resumed(start, "--cache-dir", "another")
    assert figures(tmp_path / "run") == whole


def test_a_directory_that_cannot_be_written(start: Start, tmp_path: Path, whole: Any) -> None:
    """Known at once where it can be; else, as in /proc to root, at the teacher's end: and the teacher is kept."""
    before = tree(tmp_path)
    (tmp_path / "file").touch()
    finish(start("train", *KEPT, "file/below", "--out", "run")).mistake("--cache-dir: ", "file is not a directory")
    (tmp_path / "file").unlink()
    assert tree(tmp_path) == before
    nowhere = start("train", *KEPT, "/proc/caches", "--out", "run")
    if not os.access("/proc", os.W_OK):
        finish(nowhere).mistake("--cache-dir: cannot write /proc: choose another place")
        assert tree(tmp_path) == before
        return
    finish(nowhere).line("cannot make /proc/caches", "; check the path")
    assert json.loads((tmp_path / "run" / "results.json").read_text())["generations"][0]["test"] == whole[0][0]
    resumed(start, "--cache-dir", "another")
    assert figures(tmp_path / "run") == whole


def test_a_cache_cut_short_between_two_sessions(start: Start, tmp_path: Path, whole: Any) -> None:
    process = start("train", *KEPT, "caches", "--out", "run")
    await_rows(tmp_path / "caches")
    process.send_signal(signal.SIGTERM)
    assert finish(process).status == 143
    (cache,) = (tmp_path / "caches").iterdir()
    for name in ("rows.bin", "index.bin"):
        content = (cache / name).read_bytes()
        (cache / name).write_bytes(content[: len(content) // 2])
    said = resumed(start)
    assert "was damaged after " in said.out
    assert figures(tmp_path / "run") == whole


def test_two_runs_at_once(start: Start, tmp_path: Path, whole: Any) -> None:
    """Who insists on the cache is told; who doesn't goes on without it, to the same bits."""
    first = start("train", *KEPT, "caches", "--out", "first")
    await_rows(tmp_path / "caches")
    first.send_signal(signal.SIGSTOP)
    second = finish(start("train", *KEPT, "caches", "--out", "run"))
    assert second.status == 2
    second.line("is in use by another process: wait for it, or choose another --cache-dir; --resume takes either")
    third = finish(start("train", *KEPT, "caches", "--out", "third", "--teacher", "auto"))
    assert (third.status, third.err) == (0, "")
    assert "teacher live: another process uses its cache in" in third.out
    first.send_signal(signal.SIGCONT)
    assert finish(first).status == 0
    said = resumed(start)
    assert "100% of these are kept already: 100% fewer forward passes than live" in said.out
    assert figures(tmp_path / "first") == figures(tmp_path / "third") == figures(tmp_path / "run") == whole


def await_rows(caches: Path) -> None:
    """Until some were written."""
    deadline = time.monotonic() + 120
    while not any(path.stat().st_size for path in caches.glob("*/index.bin")):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    assert os.listdir(caches)
