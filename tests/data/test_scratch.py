"""Directories of what is not finished: a killed process's are removed by the next one, a living one's never."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ban_fast import data
from ban_fast.data import ptb
from ban_fast.data.cifar import CIFAR
from ban_fast.data.scratch import remove_abandoned, scratch

PREPARE = """
import sys
from ban_fast import data
def hold(done, total):
    if any(".ban-fast-" in path for path in os.listdir(sys.argv[1])):
        print("writing", flush=True)
        sys.stdin.read()
import os
data.prepare_ffcv("digits", sys.argv[1], progress=hold)
"""
"""Begins to write FFCV's files, says so, and waits in the middle of it for its standard input's end."""

Writer = Callable[[], "subprocess.Popen[str]"]


@pytest.fixture
def writer(tmp_path: Path) -> Any:
    """Starts a process that is at work on the digits' files in `tmp_path`."""
    started: list[subprocess.Popen[str]] = []

    def start() -> "subprocess.Popen[str]":
        command = [sys.executable, "-c", PREPARE, str(tmp_path)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def unfinished(place: Path) -> set[str]:
    return {path.name for path in place.glob(".ban-fast-*")}


def test_what_a_killed_process_left_is_removed_by_the_next(writer: Writer, tmp_path: Path) -> None:
    killed = writer()
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert len(unfinished(tmp_path)) == 1
    files = data.prepare_ffcv("digits", tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted(files)


def test_what_a_living_process_has_is_left_alone(writer: Writer, tmp_path: Path) -> None:
    process = writer()
    (living,) = unfinished(tmp_path)
    files = data.prepare_ffcv("digits", tmp_path)
    assert unfinished(tmp_path) == {living}
    process.communicate("", timeout=600)
    assert process.returncode == 0
    assert sorted(tmp_path.iterdir()) == sorted(files)


def test_also_where_all_is_there_already(tmp_path: Path, make_cifar: Callable[..., Path]) -> None:
    """What another process had finished meanwhile."""
    make_cifar(CIFAR["cifar100"], tmp_path, 3)
    data.prepare_ffcv("cifar100", tmp_path)
    own = tmp_path / CIFAR["cifar100"].directory
    for place in (tmp_path, own):
        (place / ".ban-fast-0aby_z19").mkdir()
        (place / ".ban-fast-0aby_z19" / "archive").write_bytes(b"half")
    data.prepare_ffcv("cifar100", own)
    assert unfinished(tmp_path) | unfinished(own) == set()


def test_also_where_a_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / ".ban-fast-0aby_z19").mkdir()
    (tmp_path / "ptb").mkdir()
    (tmp_path / "ptb" / "ptb.train.txt").write_text("another text\n")
    with pytest.raises(ValueError, match=r"ptb"):
        ptb.prepare_ptb(tmp_path)
    assert unfinished(tmp_path) == set()


def test_what_only_looks_alike_stays(tmp_path: Path) -> None:
    """A user's own, a file, a link to a directory elsewhere."""
    (tmp_path / ".ban-fast-notes").mkdir()
    (tmp_path / ".ban-fast-abcdefgh").write_text("mine")
    (tmp_path / "kept").mkdir()
    (tmp_path / ".ban-fast-linkedto").symlink_to(tmp_path / "kept")
    before = sorted(tmp_path.rglob("*"))
    remove_abandoned(tmp_path)
    assert sorted(tmp_path.rglob("*")) == before


def test_one_that_is_taken_for_abandoned_before_it_is_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another is made."""
    opened, taken = os.open, []

    def open_late(path: Any, *args: Any, **options: Any) -> int:
        if not taken and ".ban-fast-" in str(path):
            taken.append(path)
            os.rmdir(path)
        return opened(path, *args, **options)

    monkeypatch.setattr(os, "open", open_late)
    with scratch(tmp_path) as place:
        assert taken
        assert unfinished(tmp_path) == {place.name}
    assert unfinished(tmp_path) == set()


def test_without_locks_nothing_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody could tell whose it is."""

    def refuse(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", refuse)
    (tmp_path / ".ban-fast-0aby_z19").mkdir()
    with scratch(tmp_path) as place:
        assert unfinished(tmp_path) == {place.name, ".ban-fast-0aby_z19"}
    assert unfinished(tmp_path) == {".ban-fast-0aby_z19"}
