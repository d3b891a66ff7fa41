"""What a run ran on, for the record: no user, no host name, no path."""

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

import ban_fast
from ban_fast.training.environment import processor

ROOT = Path(__file__).resolve().parent.parent
BUSY = 0.5  # of a load average: above it something else was running


def describe(device: str, commit: str | None = None) -> dict[str, Any]:
    """Machine, versions, commit, date and load; `commit` where the checkout has no .git to ask."""
    return {
        "device": device,
        "machine": _cpu() | ({"gpu": _gpu()} if device == "cuda" else {}),
        "versions": _versions(device),
        "source": {"commit": commit, "dirty": None} if commit else _source(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "load_at_start": os.getloadavg()[0],
    }


def name(described: dict[str, Any]) -> str:
    """The machine in a few words."""
    machine = described["machine"]
    if "gpu" in machine:
        return str(machine["gpu"]["name"])
    return f"{machine['cpu']}, {machine['cores']} cores"


def file_name(described: dict[str, Any]) -> str:
    """One file a machine and commit."""
    slug = re.sub(r"[^a-z0-9]+", "-", name(described).lower()).strip("-")
    commit = (described["source"]["commit"] or "unknown")[:10]
    return f"{slug}-{commit}{'-modified' if described['source']['dirty'] else ''}.json"


def write(path: Path, text: str) -> None:
    """Whole or not at all, whenever this process is killed."""
    temporary = path.with_suffix(".part")
    temporary.write_text(text)
    temporary.replace(path)


def gpu_state() -> dict[str, str] | None:
    """Clocks, temperature and power now, where nvidia-smi tells them."""
    fields = ("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw", "clocks_event_reasons.active")
    answer = _run("nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "--id=0")
    if answer is None:
        return None
    return dict(zip(fields, (each.strip() for each in answer.split(",")), strict=False))


def _cpu() -> dict[str, Any]:
    caches = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
    huge = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return {
        "cpu": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "vector": torch.backends.cpu.get_cpu_capability(),
        "l3": caches.read_text().strip() if caches.exists() else None,
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9),
        "huge_pages": huge.read_text().strip() if huge.exists() else None,
        "system": f"{platform.system()} {platform.release().split('-')[0]}",
        "libc": " ".join(platform.libc_ver()).strip() or None,
    }


def _gpu() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "capability": f"sm_{properties.major}{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "memory_bytes": properties.total_memory,
        "driver": _run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"),
        "state_at_start": gpu_state(),
    }


def _versions(device: str) -> dict[str, str | None]:
    found: dict[str, str | None] = {
        "python": platform.python_version(),
        "ban_fast": ban_fast.__version__,
        "torch": torch.__version__,
        "compiler": (_run("c++", "--version") or "none").splitlines()[0],
    }
    for package in ("triton", "liger-kernel"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    if device == "cuda":
        found["cuda"] = torch.version.cuda
    return found


def _source() -> dict[str, Any]:
    """The commit, and whether files other than results and their tables differ from it."""
    commit = _run("git", "-C", str(ROOT), "rev-parse", "HEAD")
    if commit is None:
        return {"commit": None, "dirty": None}
    written_here = tuple(
        f":!{path}"
        for path in ("benchmarks/results", "benchmarks/README.md", "README.md", "ban_fast/backends/table.json")
    )
    status = _run("git", "-C", str(ROOT), "status", "--porcelain", "--", ".", *written_here)
    return {"commit": commit, "dirty": bool(status)}


def _run(*command: str) -> str | None:
    """What a command prints, or None where it is not there or fails."""
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None
