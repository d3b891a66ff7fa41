"""Processes for several ranks: one that has torch in memory, and forks them. It trains nothing itself.

`python rank_nursery.py FOLDER RANKS NAME...` runs the jobs of `JOBS` named, one after the other, on RANKS ranks of a
gloo group, and leaves what each rank got from it, or its UserError's text, in FOLDER/RANKS/NAME-RANK.pt.
"""

import contextlib
import importlib
import os
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rank_runs import COMPILED, EXACT, KEPT, KEPT_DIGITS, LIVE, RESUMED, interrupted, of_digits, of_text, outcome, short
from small_runs import IMAGES, StopAt, digits, samples
from torch.utils.data import DataLoader, TensorDataset

from ban_fast.config import DataConfig, TeacherConfig
from ban_fast.errors import UserError
from ban_fast.training import Interrupted


def wrapped() -> DataLoader[Any]:
    return DataLoader(TensorDataset(*samples(IMAGES, 0)), batch_size=16)


def on_one_rank_alone(folder: Path, rank: int) -> Any:
    """Data that only rank 0 can read."""
    place = str(folder) if rank else None
    return of_digits(digits(data=DataConfig(name="cifar10" if rank else "digits", directory=place)))


JOBS: dict[str, Callable[[Path, int], Any]] = {
    **{
        name: lambda folder, rank, network=network, settings=settings: outcome(settings, network, double=True)
        for name, (network, settings) in EXACT.items()
    },
    "norm": lambda folder, rank: outcome(short("ban+l"), "norm", double=True),
    "norm, uneven": lambda folder, rank: outcome(short("ban+l", batch_size=18), "norm", double=True),
    "fp32": lambda folder, rank: outcome(short("ban"), "plain"),
    "densenets": lambda folder, rank: [
        outcome(short("cwtm", max_steps=1, teacher=LIVE), memory) for memory in ("checkpoint", "shared")
    ],
    "compiled": lambda folder, rank: outcome(COMPILED, "plain"),
    "family": lambda folder, rank: outcome(EXACT["together"][1], "plain", double=True, out=folder / "family"),
    "memory cache": lambda folder, rank: of_digits(digits("ban", teacher=KEPT)),
    "no cache": lambda folder, rank: of_digits(digits("ban", teacher=LIVE)),
    "file cache": lambda folder, rank: of_digits(KEPT_DIGITS, out=folder / "cached"),
    "file cache, stopped": lambda folder, rank: stopped_cache(folder, rank),
    "file cache, resumed": lambda folder, rank: of_digits(KEPT_DIGITS, out=folder / "stopped cache", resume=True),
    "auto": lambda folder, rank: of_digits(digits("ban"), out=folder / "auto"),
    "auto, uneven": lambda folder, rank: of_digits(digits("ban", batch_size=15), out=folder / "auto, uneven"),
    "whole": lambda folder, rank: outcome(RESUMED, "dropout", out=folder / "whole"),
    "stopped": lambda folder, rank: interrupted(RESUMED, "dropout", 18 if rank == 1 else 999, folder / "resumed"),
    "resumed": lambda folder, rank: outcome(RESUMED, "dropout", out=folder / "resumed", resume=True),
    "stop in double": lambda folder, rank: interrupted(RESUMED, "plain", 18, folder / "double", double=True),
    "double to the end": lambda folder, rank: outcome(RESUMED, "plain", True, out=folder / "double", resume=True),
    "small batch": lambda folder, rank: outcome(short("ban", batch_size=rank_count() - 1), "plain"),
    "single images": lambda folder, rank: outcome(short("ban", batch_size=9, micro_batch_size=1), "plain"),
    "DataLoader": lambda folder, rank: outcome(short("ban"), "plain", train=wrapped()),
    "synced, compiled": lambda folder, rank: outcome(short("ban", sync_statistics=True, compile=True), "norm"),
    "ahead": lambda folder, rank: of_digits(digits(teacher=TeacherConfig(mode="cache", cache_fill="ahead"))),
    "text": lambda folder, rank: of_text(folder, double=True),
    "text by cwtm": lambda folder, rank: of_text(folder, double=True, settings={"objective": "cwtm"}),
    "text, whole": lambda folder, rank: of_text(folder, out=folder / "whole text"),
    "text, stopped": lambda folder, rank: stopped_text(folder, rank),
    "text, resumed": lambda folder, rank: of_text(folder, out=folder / "text", resume=True),
    "text, stopped in double": lambda folder, rank: stopped_text(folder, rank, double=True),
    "text, double to the end": lambda folder, rank: of_text(folder, True, out=folder / "double text", resume=True),
    "text, uneven": lambda folder, rank: of_text(folder, settings={"batch_size": 5}),
    "text, kept": lambda folder, rank: of_text(folder, settings={"teacher": KEPT}),
    "unused": lambda folder, rank: outcome(short("ban"), "unused"),
    "one rank alone": on_one_rank_alone,
    "diverged": lambda folder, rank: outcome(
        short("ban"), "plain", train=(samples(IMAGES, 0)[0] * float("nan" if rank == 1 else 1), samples(IMAGES, 0)[1])
    ),
}


def stopped_cache(folder: Path, rank: int) -> None:
    """Stopped in the student's fourth epoch."""
    with contextlib.suppress(Interrupted):
        of_digits(KEPT_DIGITS, out=folder / "stopped cache", should_stop=StopAt(54))
    assert (folder / "stopped cache" / "generation-1" / "state.pt").exists()
    assert not (folder / "stopped cache" / "generation-1" / "model.safetensors").exists()


def stopped_text(folder: Path, rank: int, double: bool = False) -> None:
    """In the midst of the student's first epoch: two of 13 windows for the teacher, their evaluations, and some."""
    with contextlib.suppress(Interrupted):
        of_text(folder, double, out=folder / ("double text" if double else "text"), should_stop=StopAt(45))
    assert (folder / ("double text" if double else "text") / "generation-1" / "state.pt").exists()
    assert not (folder / ("double text" if double else "text") / "generation-1" / "model.safetensors").exists()


def rank_count() -> int:
    return dist.get_world_size()


def work(folder: Path, rank: int, size: int, names: list[str]) -> None:
    torch.set_num_threads(1)
    results = folder / str(size)
    results.mkdir(exist_ok=True)
    dist.init_process_group("gloo", init_method=f"file://{results}/rendezvous", rank=rank, world_size=size)
    for name in names:
        try:
            result = JOBS[name](folder, rank)
        except UserError as error:
            result = str(error)
        torch.save(result, results / f"{name}-{rank}.pt")
    dist.destroy_process_group()


def forked(action: Callable[[], None]) -> int:
    """The id of a new process that does it."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        action()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def main() -> None:
    importlib.import_module("torch._dynamo")  # the first optimizer of a process does, for seconds: children inherit it
    folder, size, names = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    children = [forked(partial(work, folder, rank, size, names)) for rank in range(size)]
    raise SystemExit(any([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]))


if __name__ == "__main__":
    main()
