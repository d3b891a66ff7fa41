"""The command as a process: signals, a reader that leaves, a disk that is full, a terminal."""

import contextlib
import os
import pty
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from cli_calls import SMALL, Said, Start, finish, tree

SHORT = ("--model", "held:Held", "--max-steps", "20", "--generations", "1", "--limit-test", "64")
"""Flags of a run whose network waits before its seventh step."""

HELD = """
import os, signal, time
from pathlib import Path
from torch import nn

class Held(nn.Module):
    steps = 0

    def __init__(self, num_classes):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))

    def forward(self, x):
        if len(x) > 2:  # not while training only looks whether the network fits
            Held.steps += 1
        if Held.steps == 7 and not Path("go").exists():
            heed = signal.getsignal(signal.SIGINT)
            signal.signal(signal.SIGINT, lambda *received: (heed(*received), os.write(1, b"heeded\\n")))
            print("waiting", flush=True)
            while not Path("go").exists():
                time.sleep(0.01)
        return self.layers(x)
"""
"""Waits for a file `go`; says so, and when it was interrupted."""


@pytest.fixture
def held(tmp_path: Path) -> Path:
    """The file that the network in `held.py` waits for."""
    (tmp_path / "held.py").write_text(HELD)
    return tmp_path / "go"


def wait_for(process: "subprocess.Popen[str]", words: str) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if words in line:
            return
    raise AssertionError(f"it ended without saying {words!r}: {process.communicate()}")


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)]
)
def test_a_signal_saves_and_the_run_goes_on_to_the_same_bits(
    start: Start, tmp_path: Path, held: Path, number: signal.Signals, status: int
) -> None:
    process = start("train", *SHORT, "--out", "a run")
    wait_for(process, "waiting")
    process.send_signal(number)
    held.touch()
    said = finish(process)
    assert said.status == status, said
    said.line(
        f"stopped by {number.name} at generation 0, step 7: saved; "
        "continue with `ban-fast train --out 'a run' --resume`",
    )
    assert (tmp_path / "a run" / "generation-0" / "state.pt").exists()
    if number == signal.SIGINT:
        resumed = finish(start("train", "--out", "a run", "--resume"))
        assert (resumed.status, resumed.err) == (0, ""), resumed
        assert finish(start("train", *SHORT, "--out", "whole")).status == 0
        for generation in ("generation-0", "generation-1"):
            weights = (tmp_path / "a run" / generation / "model.safetensors").read_bytes()
            assert weights == (tmp_path / "whole" / generation / "model.safetensors").read_bytes()


@pytest.mark.usefixtures("held")
def test_a_second_signal_leaves_at_once(start: Start) -> None:
    process = start("train", *SHORT, "--out", "run")
    wait_for(process, "waiting")
    process.send_signal(signal.SIGINT)
    wait_for(process, "heeded")  # and goes on: the first waits for the step
    process.send_signal(signal.SIGINT)
    said = finish(process)
    assert said.status == 130
    said.line("stopped by SIGINT at once", "ban-fast train --out run --resume")


@pytest.fixture
def importing(start: Start, tmp_path: Path) -> Start:
    """The command as a process, with an environment of its own, that doesn't come to the end of importing torch."""
    (tmp_path / "library").mkdir()
    (tmp_path / "library" / "torch.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(600)\n")
    path = os.pathsep.join([str(tmp_path / "library"), *filter(None, [os.environ.get("PYTHONPATH")])])

    def begin(**environment: str) -> "subprocess.Popen[str]":
        process = start("train", "--out", "run", env={"PYTHONPATH": path, **environment})
        wait_for(process, "importing")
        return process

    return begin


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_during_imports(importing: Start, tmp_path: Path, number: signal.Signals, status: int) -> None:
    process = importing()
    process.send_signal(number)
    said = finish(process)
    assert said.status == status
    said.only_line(f"stopped by {number.name} before training began")
    assert not (tmp_path / "run").exists()


def test_what_torchrun_ends_before_training_says_nothing(importing: Start) -> None:
    """Another of its processes has: one that was quicker to find what is wrong."""
    process = importing(RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    process.send_signal(signal.SIGTERM)
    said = finish(process)
    assert (said.status, said.err) == (143, "")


@pytest.mark.slow
def test_a_signal_during_evaluation(start: Start, tmp_path: Path, held: Path) -> None:
    held.touch()
    short = ("--model", "held:Held", "--max-steps", "2", "--generations", "0")  # with 360 test images, two batches
    assert finish(start("train", *short, "--out", "run")).status == 0
    held.unlink()
    (tmp_path / "held.py").write_text(HELD.replace("steps == 7", "steps == 1"))
    before = tree(tmp_path / "run")
    process = start("evaluate", "run")
    wait_for(process, "waiting")
    process.send_signal(signal.SIGINT)
    said = finish(process)
    assert said.status == 130
    said.line("stopped by SIGINT")
    assert tree(tmp_path / "run") == before


def test_a_reader_that_leaves_does_not_end_the_training(start: Start, tmp_path: Path, held: Path) -> None:
    process = start("train", *SHORT, "--out", "run")
    assert process.stdout is not None
    assert process.stderr is not None
    wait_for(process, "waiting")
    process.stdout.close()
    held.touch()
    assert process.stderr.read() == ""
    process.wait()
    assert (tmp_path / "run" / "generation-1" / "model.safetensors").exists()


def test_a_full_device_on_stdout(start: Start) -> None:
    with open("/dev/full", "w") as full:
        process = start("info", stdout=full)
        _, err = process.communicate(timeout=600)
    said = Said(process.returncode, "", err)
    said.mistake("No space left on device")


@pytest.mark.parametrize("limit", [0, *(pytest.param(limit, marks=pytest.mark.slow) for limit in (2000, 20000))])
def test_a_full_disk(start: Start, tmp_path: Path, limit: int) -> None:
    """A limit on file sizes stands for it: what was whole stays whole; where nothing could begin, nothing is left."""

    def lower() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

    env = {"PYTHONDONTWRITEBYTECODE": "1"}
    process = start("train", "--model", "mlp-64", "--max-steps", "40", "--out", "runs/a", env=env, preexec_fn=lower)
    said = finish(process)
    assert said.status == 2, said
    said.line("File too large")
    if limit == 0:
        assert tree(tmp_path) == {}
    else:
        assert not [name for name in tree(tmp_path) if name.endswith((".tmp", ".part"))]
        assert not (tmp_path / "runs" / "a" / "generation-0" / "model.safetensors").exists()
        resumed = finish(start("train", "--out", "runs/a", "--resume"))
        assert resumed.status == 0, resumed


def test_a_terminal_sees_a_bar_and_its_table_goes_where_stdout_goes(start: Start) -> None:
    master, slave = pty.openpty()
    process = start("train", *SMALL, "--out", "run", stderr=slave, env={"TERM": "xterm", "COLUMNS": "100"})
    os.close(slave)
    shown = b""
    while True:
        try:
            piece = os.read(master, 4096)
        except OSError:  # the other end was closed
            break
        if not piece:
            break
        shown += piece
    out, _ = process.communicate(timeout=600)
    os.close(master)
    assert process.returncode == 0
    assert b"images/s" in shown
    assert b"epoch" in shown
    assert shown.rstrip().endswith((b"\x1b[?25h", b"\x1b[2K", b"\x1b[1A")) or b"\x1b[?25h" in shown, (
        "the cursor is back"
    )
    assert "BAN-1" in out
    assert "images/s" not in out


@pytest.mark.slow
def test_a_narrow_terminal_cuts_no_figure(start: Start) -> None:
    """It wraps lines instead."""
    said = finish(start("train", *SMALL, "--out", "run"))
    master, slave = pty.openpty()
    process = start("evaluate", "run", stdout=slave, env={"TERM": "xterm", "COLUMNS": "40", "NO_COLOR": "1"})
    os.close(slave)
    shown = b""
    with contextlib.suppress(OSError):  # the other end was closed
        while piece := os.read(master, 4096):
            shown += piece
    os.close(master)
    assert process.wait() == 0
    assert "\N{HORIZONTAL ELLIPSIS}" not in shown.decode()
    figures = re.findall(r"\d\.\d{4}", said.out)
    assert len(figures) == 4
    assert all(figure in shown.decode() for figure in figures)


@pytest.mark.slow
def test_nobody_listens(start: Start, tmp_path: Path) -> None:
    """stdout closed by who started the command: all is done, and nothing is said about it."""
    assert finish(start("train", *SMALL, "--out", "run")).status == 0
    process = start("report", "run", stdout=None, preexec_fn=lambda: os.close(1))
    assert (process.communicate(timeout=600)[1], process.returncode) == ("", 0)
    assert len(list((tmp_path / "run" / "report").iterdir())) == 3


def test_the_console_script_is_the_same_command() -> None:
    script = Path(sys.executable).with_name("ban-fast")
    versions = [
        subprocess.run([*command, "--version"], capture_output=True, text=True, check=True).stdout
        for command in ([str(script)], [sys.executable, "-m", "ban_fast"])
    ]
    assert versions[0] == versions[1]
