"""environment.json: what a run ran on. No user name, no path."""

import platform
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import __version__


def environment(device: torch.device, shape: dict[str, Any], ranks: int = 1) -> dict[str, Any]:
    """Versions, device, threads, processes, and `shape`, what the data and the network look like."""
    return {
        "ban_fast": __version__,
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "platform": platform.platform(),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "ranks": ranks,
        "shape": shape,
    }


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's with the vector instructions that torch uses there."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{processor()}, {torch.backends.cpu.get_cpu_capability()}"


def differences(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What of it changes the bits of a result and is not as it was, one phrase each."""
    names = {"threads": "CPU threads", "device": "device", "torch": "torch", "ranks": "processes"}
    then = {"ranks": 1, **then}
    return [
        f"{label} {then.get(key)} then, {now[key]} now" for key, label in names.items() if then.get(key) != now[key]
    ]


def processor() -> str:
    """The CPU's model, as the system calls it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _git_commit() -> str | None:
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        answer = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()
