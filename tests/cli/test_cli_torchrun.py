"""The command under torchrun: processes that share a run, one that speaks, and what remains when one of them dies."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch
from cli_calls import SMALL, await_there, tree

from ban_fast.config import Config, DataConfig, ModelConfig, OptimizerConfig

NETWORK = """
import os, time
from pathlib import Path
from torch import nn

class Held(nn.Module):
    def __init__(self, num_classes, in_channels):
        super().__init__()
        Path(f"pid-{os.environ.get('RANK', 0)}").write_text(str(os.getpid()))
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))
    def forward(self, x):
        if "HOLD" in os.environ and self.training and any(Path().glob("**/generation-1/state.pt")):
            Path("held").touch()
            while not Path("go").exists():
                time.sleep(0.01)
        return self.layers(x)
"""
"""With HOLD set, it waits for a file `go` when there is a checkpoint of a student to go on from, and says so."""

Torchrun = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def torchrun(tmp_path: Path, port: int) -> Iterator[Torchrun]:
    """torchrun with its options before "--", the command's after, as a process, in a directory with a network."""
    (tmp_path / "held.py").write_text(NETWORK)
    settings = Config(
        data=DataConfig(limit_train=128, limit_test=64),
        model=ModelConfig(name="held:Held"),
        optimizer=OptimizerConfig(lr=0.05),
        generations=1,
        epochs=5,
        batch_size=16,
        checkpoint_seconds=0.0,
    )
    (tmp_path / "config.json").write_text(json.dumps(settings.to_dict()))

    started: list[subprocess.Popen[str]] = []

    def start(*words: str, ranks: int = 2, hold: bool = False) -> "subprocess.Popen[str]":
        cut = words.index("--")
        options = ("--nproc-per-node", str(ranks), *words[:cut])
        if "--rdzv-endpoint" not in options:
            options = ("--master-port", str(port), *options)
        process = subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *options, "-m", "ban_fast", *words[cut + 1 :]],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1", **({"HOLD": "1"} if hold else {})},
        )
        started.append(process)
        return process

    yield start
    for process in started:  # none, where the test has not failed
        if process.poll() is None:
            process.terminate()  # and the ranks with it
            process.communicate()


@pytest.fixture
def port() -> Iterator[int]:
    """A port for a store of torchrun's. Bound as it binds it, so that it may, and no connection is given that port."""
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("127.0.0.1", 0))
        yield int(taken.getsockname()[1])


def ended(process: "subprocess.Popen[str]") -> tuple[str, list[str], str]:
    """What it printed; the command's lines on stderr; all of stderr, with torchrun's report."""
    out, err = process.communicate(timeout=1200)
    return out, [line for line in err.splitlines() if line.startswith("ban-fast: ")], err


def kill(rank: int, number: signal.Signals, process: "subprocess.Popen[str]", directory: Path) -> None:
    """Send a signal to a rank of a run that was to hold; then it goes on."""
    await_there(directory / "held", process)
    os.kill(int((directory / f"pid-{rank}").read_text()), number)
    (directory / "go").touch()


def weights(directory: Path) -> list[dict[str, torch.Tensor]]:
    return [safetensors.torch.load_file(directory / f"generation-{n}" / "model.safetensors") for n in range(2)]


def check_same(found: Path, expected: Path) -> None:
    """To rounding: a gradient summed in another order, 60 steps on."""
    for ours, theirs in zip(weights(found), weights(expected), strict=True):
        for name, tensor in ours.items():
            torch.testing.assert_close(tensor, theirs[name], rtol=1e-5, atol=1e-6)


def test_a_mistake_is_said_once_and_ends_all(torchrun: Torchrun, tmp_path: Path) -> None:
    out, lines, err = ended(torchrun("--", "train", *SMALL, "--batch-size", "1", "--out", "run"))
    assert lines == ["ban-fast: --batch-size: 1 images can't be shared by 2 processes: use fewer, or a larger batch"]
    assert out == ""
    codes = set(re.findall(r"exitcode +: (-?\d+)", err))
    assert "2" in codes, err
    assert codes <= {"2", "143"}, "torchrun ends whoever comes to it later than the other"
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_sweep_is_refused_once_and_leaves_nothing(torchrun: Torchrun, tmp_path: Path) -> None:
    before = tree(tmp_path)
    out, lines, err = ended(torchrun("--", "sweep", *SMALL, "--vary", "objective=ban,cwtm", "--out", "study"))
    assert len(lines) == 1, err
    assert lines[0].startswith("ban-fast: a sweep is not for torchrun, ")
    assert (out, tree(tmp_path)) == ("", before)


@pytest.mark.slow
def test_a_scheduler_that_says_no_more_than_it_must(tmp_path: Path, torchrun: Torchrun, port: int) -> None:
    """RANK, WORLD_SIZE and the address of rank 0: the ranks of a machine find each other's places by themselves."""
    words = ("train", "--config", "config.json", "--out")
    several = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "ban_fast", *words, "run"],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **several, "RANK": str(rank)},
        )
        for rank in range(2)
    ]
    ends = [ended(process) for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], ends
    assert ["BAN-1" in out for out, _, _ in ends] == [True, False]
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["ranks"] == 2
    ended(torchrun("--", *words, "whole"))
    check_same(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
def test_a_signal_to_one_stops_all_and_one_process_goes_on(torchrun: Torchrun, tmp_path: Path) -> None:
    """Two processes, then one, then four: the weights of one process from beginning to end."""
    process = torchrun("--", "train", "--config", "config.json", "--out", "run", hold=True)
    kill(1, signal.SIGTERM, process, tmp_path)
    _, lines, _ = ended(process)
    (line,) = lines
    assert re.search(
        r"stopped by (SIGTERM|a signal to another of its processes) at generation 1, step \d+: saved", line
    )
    for name in ("held", "go"):
        (tmp_path / name).unlink()
    command = [sys.executable, "-m", "ban_fast", "train"]
    resume = ["--out", "run", "--resume"]
    environment = {**os.environ, "HOLD": "1", "OMP_NUM_THREADS": "1"}  # as torchrun's processes have
    alone = subprocess.Popen([*command, *resume], cwd=tmp_path, stdout=subprocess.PIPE, text=True, env=environment)
    await_there(tmp_path / "held", alone)
    alone.send_signal(signal.SIGINT)
    (tmp_path / "go").touch()
    assert "resumed on another footing (processes 2 then, 1 now" in alone.communicate(timeout=1200)[0]
    assert alone.returncode == 130
    out, lines, err = ended(torchrun("--", "train", *resume, ranks=4))
    assert (lines, "BAN-1" in out) == ([], True), err
    subprocess.run(
        [*command, "--config", "config.json", "--out", "whole"], cwd=tmp_path, check=True, capture_output=True
    )
    check_same(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_one_that_is_killed_ends_the_run_with_a_line(torchrun: Torchrun, tmp_path: Path, rank: int) -> None:
    process = torchrun("--", "train", "--config", "config.json", "--out", "run", hold=True)
    kill(rank, signal.SIGKILL, process, tmp_path)
    _, lines, _ = ended(process)
    assert lines == [
        "ban-fast: another process of this run has ended, or can't be reached; the last checkpoint stands: "
        "continue with `ban-fast train --out run --resume`"
    ]
    out, lines, err = ended(torchrun("--", "train", "--out", "run", "--resume"))
    assert (lines, "BAN-1" in out) == ([], True), err


@pytest.mark.slow
def test_torchrun_restarts_what_was_killed(torchrun: Torchrun, tmp_path: Path) -> None:
    words = ("train", "--config", "config.json", "--out")
    process = torchrun("--max-restarts", "1", "--", *words, "run", hold=True)
    kill(1, signal.SIGKILL, process, tmp_path)
    out, _, err = ended(process)
    assert process.returncode == 0, err
    assert "BAN-1" in out
    ended(torchrun("--", *words, "whole"))
    check_same(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
def test_a_run_that_was_named_after_the_time_is_restarted_too(torchrun: Torchrun, tmp_path: Path) -> None:
    """It goes on in the directory that it had, which the line about the killed process names."""

    def begun() -> list[Path]:
        return list(tmp_path.glob("runs/*/generation-1/state.pt"))

    process = torchrun("--max-restarts", "1", "--", "train", "--config", "config.json", hold=True)
    await_there(tmp_path / "held", process)
    (state,) = begun()
    before = state.stat().st_mtime_ns
    kill(0, signal.SIGKILL, process, tmp_path)
    out, (line,), err = ended(process)
    assert process.returncode == 0, err
    assert [state] == begun()
    assert state.stat().st_mtime_ns > before
    assert f"continue with `ban-fast train --out {state.parents[1].relative_to(tmp_path)} --resume`" in line
    assert out.count("teacher  test") == 1, "trained once"


@pytest.mark.slow
def test_a_restart_does_not_go_on_with_another_run(torchrun: Torchrun, tmp_path: Path) -> None:
    """Whoever has it in --out is told so, as often as torchrun tries."""
    (tmp_path / "run").mkdir()
    shutil.copy(tmp_path / "config.json", tmp_path / "run")
    before = tree(tmp_path / "run")
    process = torchrun("--max-restarts", "1", "--", "train", "--config", "config.json", "--out", "run")
    _, lines, _ = ended(process)
    assert lines == ["ban-fast: run holds a run already: continue it with --resume, or choose another --out"] * 2
    assert tree(tmp_path / "run") == before


@pytest.mark.slow
def test_what_happens_while_python_is_torn_down_fails_no_run(torchrun: Torchrun, tmp_path: Path) -> None:
    """Threads of gloo's abort there now and then; here an object's end does, always."""
    (tmp_path / "odd.py").write_text(
        "import atexit, os\n"
        "from pathlib import Path\n"
        "from torch import nn\n\n"
        "class Last:\n"
        "    def __del__(self):\n"
        "        os.abort()\n\n"
        "LAST = Last()\n"
        "atexit.register(Path(f'left-{os.environ[\"RANK\"]}').touch)\n\n"
        "def network(num_classes):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))\n"
    )
    process = torchrun("--", "train", *SMALL[2:], "--model", "odd:network", "--out", "run")
    out, lines, err = ended(process)
    assert (process.returncode, lines) == (0, []), err
    assert out.endswith("plots: ban-fast report run\n")
    assert (tmp_path / "left-0").exists()
    assert (tmp_path / "left-1").exists()


@pytest.mark.slow
def test_two_machines(torchrun: Torchrun, tmp_path: Path, port: int) -> None:
    """Two agents that find each other by a rendezvous on the loopback, one process each."""
    meeting = (
        "--nnodes",
        "2",
        "--rdzv-backend",
        "c10d",
        "--rdzv-id",
        "1",
        "--rdzv-endpoint",
        f"127.0.0.1:{port}",
    )
    words = (*meeting, "--local-addr", "127.0.0.1", "--", "train", "--config", "config.json", "--out", "run")
    agents = [torchrun(*words, ranks=1) for _ in range(2)]
    ends = [ended(agent) for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], ends
    assert sorted("BAN-1" in out for out, _, _ in ends) == [False, True]
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["ranks"] == 2
    ended(torchrun("--", "train", "--config", "config.json", "--out", "whole"))
    check_same(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
def test_a_script_of_several_runs(tmp_path: Path, port: int) -> None:
    """Each joins anew, whoever of them comes first, and leaves no thread of gloo's, which could abort Python's end."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, time\n"
        "from pathlib import Path\n"
        "from ban_fast.config import Config, DataConfig, ModelConfig\n"
        "from ban_fast.training import run\n"
        "for seed in range(3):\n"
        "    time.sleep(0.5 * ((int(os.environ['RANK']) + seed) % 2))\n"
        "    data = DataConfig(limit_train=64, limit_test=32)\n"
        "    model = ModelConfig(name='mlp-8')\n"
        "    config = Config(data=data, model=model, generations=0, epochs=1, batch_size=16, seed=seed)\n"
        "    error = run(config).generations[0]['test']['error']\n"
        f"Path({str(tmp_path)!r}, 'error-' + os.environ['RANK']).write_text(str(error))\n"
        "threads = [path.read_text().strip() for path in Path('/proc/self/task').glob('*/comm')]\n"
        "assert not [name for name in threads if 'gloo' in name], threads\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, str(script)], capture_output=True, text=True, timeout=1200, env=environment)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "error-0").read_text() == (tmp_path / "error-1").read_text()
