"""How many runs go on at once, and what each has of the machine."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import UserError


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What is asked for; None leaves it to what there is."""

    workers: int | None = None
    """Runs at once. None: as many as fit."""
    cpus_per_run: float | None = None
    """Cores of each; a run has as many threads, one at least. None: 1 on Ray, an equal share in a local pool."""
    gpus_per_run: float | None = None
    """GPUs of each; 0.5 lets two runs share one. None: 1 where there are GPUs, or what there is for each worker."""

    def validate(self) -> None:
        """UserError for what no run could have."""
        if self.workers is not None and self.workers < 1:
            raise UserError(f"--workers must be at least 1, got {self.workers}")
        if self.cpus_per_run is not None and not (math.isfinite(self.cpus_per_run) and self.cpus_per_run > 0):
            raise UserError(f"--cpus-per-run must be a number above 0, got {self.cpus_per_run}")
        gpus = self.gpus_per_run
        if gpus is not None and not (math.isfinite(gpus) and gpus >= 0 and (gpus < 1 or gpus == int(gpus))):
            raise UserError(f"--gpus-per-run must be a whole number, or a share of one GPU below 1, got {gpus}")


@dataclass(frozen=True, kw_only=True)
class Slot:
    """What one run of a local pool has."""

    threads: int
    gpus: tuple[str, ...] | None
    """Ids for CUDA_VISIBLE_DEVICES; None: nothing is hidden from it."""


def local_slots(asked: Resources, cores: int, gpus: Sequence[str], threads: int | None = None) -> list[Slot]:
    """A slot for each run that this machine has room for at once.

    `gpus` are those that the runs want; `threads`, at most so many a run (OMP_NUM_THREADS) unless `cpus_per_run` is
    given. UserError where not even one run has room.
    """
    asked.validate()
    gpu_share = asked.gpus_per_run
    if gpu_share is None:
        gpu_share = min(1.0, len(gpus) / (asked.workers or 1)) if gpus else 0.0
        gpu_share = 1 / math.ceil(1 / gpu_share) if gpu_share else 0.0
    room = cores if asked.cpus_per_run is None else max(1, int(cores / asked.cpus_per_run))
    if gpu_share:
        fit = len(gpus) * int(1 / gpu_share + 1e-9) if gpu_share < 1 else len(gpus) // int(gpu_share)
        if not fit:
            raise UserError(f"--gpus-per-run is {gpu_share:g}, but there are {len(gpus)} GPUs for runs here")
        if asked.workers is not None and asked.workers > fit:
            raise UserError(
                f"--workers is {asked.workers}, but {len(gpus)} GPUs have room for {fit} runs of {gpu_share:g} each: "
                "lower one of --workers and --gpus-per-run"
            )
        room = fit
    workers = asked.workers or room
    if asked.cpus_per_run is not None:
        threads = max(1, int(asked.cpus_per_run))
    else:
        threads = min(max(1, cores // workers), threads or cores)
    return [Slot(threads=threads, gpus=_gpus(number, gpu_share, gpus)) for number in range(workers)]


def _gpus(number: int, share: float, gpus: Sequence[str]) -> tuple[str, ...] | None:
    if not share:
        return None
    if share < 1:
        return (gpus[number // int(1 / share + 1e-9)],)
    return tuple(gpus[number * int(share) : (number + 1) * int(share)])


def gpus_here() -> list[str]:
    """Ids of the GPUs that this process may use."""
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return visible.split(",")[:count] if visible is not None else [str(number) for number in range(count)]


def threads_asked() -> int | None:
    """OMP_NUM_THREADS, where it is a number."""
    text = os.environ.get("OMP_NUM_THREADS", "")
    return int(text) if text.isdecimal() and int(text) else None
