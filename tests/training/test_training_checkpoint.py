"""Files that are whole or not there: full disks, limits, damage, and what weights_only admits."""

import errno
import hashlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_runs import STEPS, Recorder, StopAt, config, footprint, network, own
from torch import nn

from ban_fast.errors import UserError
from ban_fast.training import Interrupted, checkpoint, run
from ban_fast.training.checkpoint import load_model, load_state, save_model, save_state, write_file, write_json
from ban_fast.training.metrics import Journal
from ban_fast.training.seeds import isolated, random_state, seed_everything, set_random_state
from ban_fast.training.teacher import fingerprint

CPU = torch.device("cpu")


def test_a_full_disk_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    """/dev/full answers as a full disk does; the temporary file's name leads there."""
    path = tmp_path / "state.pt"
    write_file(path, b"old")
    (tmp_path / "state.pt.tmp").symlink_to("/dev/full")
    with pytest.raises(UserError, match=f"^cannot write {path}: No space left on device$"):
        write_file(path, b"new" * 10000)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["state.pt"]


def test_an_interrupted_write_leaves_no_temporary_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        write_file(tmp_path / "a", b"x")
    assert os.listdir(tmp_path) == []


def test_writes_are_on_disk_before_their_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(descriptor: int) -> None:
        order.append("fsync " + os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        real_fsync(descriptor)

    def replace(source: Any, target: Any) -> None:
        order.append("rename")
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    write_json(tmp_path / "a.json", {"x": 1})
    assert order == ["fsync a.json.tmp", "rename", f"fsync {tmp_path.name}"]
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 1}


def test_json_has_no_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("call", ["state", "model", "json"])
def test_a_directory_that_is_gone(call: str, tmp_path: Path) -> None:
    path = tmp_path / "gone" / "file"
    with pytest.raises(UserError, match=f"cannot write {path}: No such file or directory"):
        {"state": save_state, "model": save_model, "json": write_json}[call](
            path,
            network() if call == "model" else {},  # type: ignore[arg-type]
        )


LIMITED = """
import json, resource, sys
from pathlib import Path
from small_runs import config, own
from ban_fast.errors import UserError
from ban_fast.training import run
out, limit, resume = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "resume"
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    run(config(checkpoint_seconds=0.0), out=out, resume=resume, **own())
except UserError as error:
    print(error)
"""


def limited(out: Path, limit: int, how: str = "new") -> str:
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(out), str(limit), how],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_run_that_may_not_write_more(tmp_path: Path) -> None:
    """RLIMIT_FSIZE, so that the kernel itself refuses: at the first file, and at a checkpoint of a run in progress."""
    assert limited(tmp_path / "a", 50).startswith(f"cannot write {tmp_path / 'a' / 'environment.json'}: File too large")
    assert not (tmp_path / "a").exists()

    path = tmp_path / "b"
    with pytest.raises(Interrupted):
        run(config(checkpoint_seconds=0.0), out=path, should_stop=StopAt(4), **own())
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    assert limited(path, 4000, "resume").startswith(
        f"cannot write {path / 'generation-0' / 'state.pt'}: File too large"
    )
    assert {file: file.read_bytes() for file in path.rglob("*") if file.is_file()} == before
    run(config(), out=path, resume=True, **own())
    run(config(), out=tmp_path / "whole", **own())
    assert footprint(path) == footprint(tmp_path / "whole")


def test_a_disk_that_fills_at_any_write_leaves_a_run_to_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ENOSPC at the nth fsync, for every n: one line, no temporary file, and a resume ends as if nothing had been."""
    settings = config(epochs=1, max_steps=1)
    run(settings, out=tmp_path / "whole", **own())
    expected = footprint(tmp_path / "whole")
    real = os.fsync
    nth = 0
    while True:
        nth += 1
        left = nth
        path = tmp_path / str(nth)

        def fsync(descriptor: int) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            real(descriptor)

        monkeypatch.setattr(os, "fsync", fsync)
        said = None
        try:
            run(settings, out=path, **own())
        except UserError as error:
            said = str(error)
        monkeypatch.setattr(os, "fsync", real)
        if said is None:
            break
        assert said.startswith(f"cannot write {path}")
        assert said.endswith(": No space left on device")
        assert not list(path.rglob("*.tmp"))
        run(settings, out=path, resume=(path / "config.json").exists(), **own())
        assert footprint(path) == expected, f"failed at fsync {nth}"
    assert nth > 20


def test_a_line_of_metrics_is_whole_or_not_there(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "metrics.jsonl")
    journal.append({"epoch": 1})
    kept = journal.bytes
    journal.append({"epoch": 2})
    journal.cut(kept)
    journal.append({"epoch": 3})
    assert journal.path.read_text() == '{"epoch": 1}\n{"epoch": 3}\n'
    assert journal.bytes == len(journal.path.read_bytes())
    full = Journal(tmp_path / "full.jsonl")
    full.path.symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"cannot write .*full\.jsonl: No space left on device"):
        full.append({"epoch": 1})


# Training states


def test_states_come_back_and_weights_only_admits_them(tmp_path: Path) -> None:
    seed_everything(5, CPU)
    state = {"n": 1, "none": None, "dtype": torch.float16, "random": random_state(CPU), "t": torch.randn(3)}
    save_state(tmp_path / "s", state)
    loaded = load_state(tmp_path / "s")
    assert loaded["dtype"] == torch.float16
    assert torch.equal(loaded["t"], state["t"])

    def draws() -> tuple[Any, ...]:
        return torch.rand(2).tolist(), random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn()

    with isolated(CPU):
        random.gauss(0, 1), np.random.randn()  # both keep half of a pair of draws
        kept = random_state(CPU)
        expected = draws()
        draws()
        save_state(tmp_path / "r", {"random": kept})
        set_random_state(load_state(tmp_path / "r")["random"], CPU)
        assert draws() == expected


def test_a_state_that_would_run_code_is_refused(tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "ran",)

    torch.save({"x": Hostile()}, tmp_path / "s")
    with pytest.raises(UserError, match="cut short or corrupted"):
        load_state(tmp_path / "s")
    assert not (tmp_path / "ran").exists()
    torch.save([1], tmp_path / "s")
    with pytest.raises(UserError, match="not a training state"):
        load_state(tmp_path / "s")
    with pytest.raises(UserError, match="cannot read .*: No such file"):  # noqa: RUF043
        load_state(tmp_path / "none")


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.9, 0.999])
def test_a_state_cut_anywhere_is_refused(share: float, tmp_path: Path) -> None:
    save_state(tmp_path / "s", {"t": torch.randn(1000)})
    data = (tmp_path / "s").read_bytes()
    (tmp_path / "s").write_bytes(data[: int(share * len(data))])
    with pytest.raises(UserError, match="cut short or corrupted; delete it"):
        load_state(tmp_path / "s")


def test_a_flipped_bit_in_a_tensor_is_noticed(tmp_path: Path) -> None:
    """torch.load itself does not look at the archive's sums."""
    save_state(tmp_path / "s", {"t": torch.zeros(1000)})
    data = bytearray((tmp_path / "s").read_bytes())
    at = data.index(bytes(2000)) + 1000
    data[at] ^= 4
    (tmp_path / "s").write_bytes(data)
    assert torch.load(tmp_path / "s", weights_only=True)["t"].count_nonzero() == 1
    with pytest.raises(UserError, match="cut short or corrupted"):
        load_state(tmp_path / "s")


# Weights


def test_weights_come_back(tmp_path: Path) -> None:
    first, second = network(), network().to(memory_format=torch.channels_last)
    sha256 = save_model(tmp_path / "m", first)
    assert sha256 == hashlib.sha256((tmp_path / "m").read_bytes()).hexdigest()
    load_model(tmp_path / "m", second, sha256)
    assert fingerprint(first) == fingerprint(second)
    assert save_model(tmp_path / "n", second) == sha256, "the layout in memory is not part of a network"


def test_tied_weights_come_back_tied(tmp_path: Path) -> None:
    def tied() -> nn.Module:
        made = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        made[1].weight = made[0].weight
        return made

    first, second = tied(), tied()
    save_model(tmp_path / "m", first)
    load_model(tmp_path / "m", second)
    assert second[0].weight is second[1].weight
    assert fingerprint(first) == fingerprint(second)


def test_weights_that_are_not_right(tmp_path: Path) -> None:
    sha256 = save_model(tmp_path / "m", network())
    data = (tmp_path / "m").read_bytes()
    with pytest.raises(UserError, match=r"is of another network: 0\.weight is \[8, 1, 3, 3\], here \[8, 36\]"):
        load_model(tmp_path / "m", nn.Sequential(nn.Linear(36, 8, bias=False)))
    for damaged in (data[:-4], data[:50], b"", b"\xff" * 100):
        (tmp_path / "m").write_bytes(damaged)
        with pytest.raises(UserError, match="cut short or corrupted"):
            load_model(tmp_path / "m", network(), sha256)
    (tmp_path / "m").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(UserError, match="SHA-256 differs"):
        load_model(tmp_path / "m", network(), sha256)


def test_a_network_with_state_that_is_no_tensor(tmp_path: Path) -> None:
    class Extra(nn.Linear):
        def get_extra_state(self) -> Any:
            return {"a": 1}

    with pytest.raises(UserError, match="has '_extra_state', a dict"):
        save_model(tmp_path / "m", Extra(2, 2))


# When a checkpoint is written


def test_checkpoints_come_by_the_clock_and_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that moves 2 seconds a step: every third step is due at 5 seconds, and no step is at an hour."""
    import ban_fast.training.loop as loop

    written: list[int] = []
    real = checkpoint.save_state

    def save(path: Path, state: dict[str, Any]) -> None:
        written.append(state["step"])
        real(path, state)

    monkeypatch.setattr("ban_fast.training.run_store.save_state", save)
    observer = Recorder()
    monkeypatch.setattr(loop.time, "perf_counter", lambda: 2.0 * sum(observer.steps.values()))
    run(config(generations=0, checkpoint_seconds=5.0), out=tmp_path / "a", observer=observer, **own())
    assert written == [3, 6, 9, 12, 12]
    written.clear()
    run(config(generations=0, checkpoint_seconds=3600.0), out=tmp_path / "b", observer=observer, **own())
    assert written == [STEPS]
