"""The command, called in this process or started as one of its own."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cli_calls import Call, Said, Start

from ban_fast.cli import main


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Call:
    """The command in this process, in an empty directory."""
    monkeypatch.chdir(tmp_path)

    def run(*args: str | Path) -> Said:
        capsys.readouterr()
        status = main([str(arg) for arg in args])
        return Said(status, *capsys.readouterr())

    return run


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """The command as a process, in an empty directory, on one thread: other such processes compute the same bits.

    One that a test has left, as it failed, is killed.
    """
    started: list[subprocess.Popen[str]] = []

    def run(*args: str | Path, **more: Any) -> "subprocess.Popen[str]":
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": tmp_path}
        environment = os.environ | {"OMP_NUM_THREADS": "1"} | more.pop("env", {})
        command = [sys.executable, "-m", "ban_fast", *map(str, args)]
        started.append(subprocess.Popen(command, **{**pipes, "env": environment, **more}))
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.wait()
