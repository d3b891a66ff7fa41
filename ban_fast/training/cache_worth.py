"""What keeping a teacher's outputs saves, and what room it takes: the arithmetic, before anything is kept."""

import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..config import Config
from ..errors import OptionError
from .cache_store import count_rows, descriptions
from .environment import device_name
from .learner import total_steps
from .step_choice import COMPILE
from .task import Task
from .teacher import dtype_name

FORMAT = 2
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
WORTH = 0.25
"""Share of a teacher's forward passes that must be saved before "auto" fills a disk for it."""
_OPERATIONS_A_BYTE = 400
"""That a few cores do (1e11 a second) while an ordinary disk takes or gives one (2.5e8)."""
SHARE = 0.5
"""Share of the free disk or memory that a cache may take."""


@dataclass(frozen=True, kw_only=True)
class Fill:
    """The arithmetic of one teacher's cache, for all students that share it: they are shown the same views."""

    epochs: float
    views: int
    """Of each image."""
    live: int
    """Images that a live teacher is shown."""
    seen: float
    """Views of an image that come up at least once, in expectation: each time it is shown, one of them is drawn."""
    rows: int
    """The same of all images."""
    is_fixed: bool
    """Whether every epoch serves the same batches."""
    students: int = 1
    """Who would each ask a live teacher by themselves."""

    @classmethod
    def expected(cls, config: Config, task: Task, students: int = 1) -> "Fill":
        """Of one generation. Needs `task.views`."""
        assert task.views is not None
        images = task.views.samples if task.is_fixed else task.shape["train_images"]
        steps_per_epoch = task.shape["steps_per_epoch"]
        steps, views = total_steps(config, steps_per_epoch), task.views.each
        live = steps * task.rows_per_step
        seen = views * (1 - (1 - 1 / views) ** (live / images))
        rows = min(round(images * seen), live)
        return cls(
            epochs=steps / steps_per_epoch,
            views=views,
            live=live,
            seen=seen,
            rows=rows,
            is_fixed=task.is_fixed,
            students=students,
        )

    @property
    def most(self) -> int:
        """Rows, and hardly more: draws spread by less than sqrt(rows) / 2, and this is four times that above."""
        return self.rows if self.is_fixed or self.views == 1 else min(self.rows + 2 * math.isqrt(self.rows), self.live)

    def saved(self, left: int | None = None) -> float:
        """Share of the live teacher's forward passes that a cache saves; `left` rows are not in it yet, None: all."""
        return 1 - (self.rows if left is None else left) / (self.live * self.students)

    def sentence(self, left: int | None = None) -> str:
        """ "200 epochs show 115 of 162 views of an image, 50% of these are kept already: 82% fewer forward passes"."""
        of = f"{self.seen:.3g} of {self.views} views" if self.views > 1 else "one view"
        there = "" if left is None else f", {max(1 - left / self.rows, 0):.0%} of these are kept already"
        shown = "the same windows" if self.is_fixed else f"{of} of an image"
        epochs = "1 epoch shows" if self.epochs == 1 else f"{self.epochs:.4g} epochs show"
        whom = "" if self.students == 1 else f" to {self.students} students"
        what = f"{epochs} {shown}{whom}{there}"
        return f"{what}: {self.saved(left):.0%} fewer forward passes than live"


def check_cache(config: Config, task: Task, home: Path | None, resume: bool = False) -> None:
    """OptionError, before anything is trained or written, where the cache that `config` asks for can't be."""
    if config.teacher.mode == "cache" and task.views is None:
        raise OptionError(
            "teacher.mode",
            "a DataLoader's samples may be augmented in endless ways, and can't be told apart: pass tensors or use "
            "one of ban_fast's datasets, or use live",
        )
    if config.teacher.cache_fill == "ahead" and not task.ranks.is_alone:
        raise OptionError("teacher.cache_fill", "several processes fill a cache together while they train; use lazy")
    named = config.teacher.cache_directory
    if named is not None:
        place = Path(named)
        there = next(p for p in [place, *place.parents] if p.exists())
        if not there.is_dir():
            raise OptionError("teacher.cache_directory", f"{there} is not a directory; name another with --cache-dir")
        if not os.access(there, os.W_OK):
            raise OptionError("teacher.cache_directory", f"cannot write {there}; name another place with --cache-dir")
    only_confidence = only_confidence_of(config, config.students or [config.objective.name])
    if config.teacher.mode == "cache" and (problem := too_large(config, task, home, only_confidence)):
        remedy = (
            "free some, or use another --cache-dir"
            if resume
            else "use --cache-dtype fp16, another --cache-dir, or live"
        )
        raise OptionError("teacher.mode", f"{problem}; {remedy}")


def only_confidence_of(config: Config, objectives: Sequence[str]) -> bool:
    """Whether only CWTM's confidences are stored (1 number a row).

    Only if asked for, by mode "cache", since fp32 rounds what kernels compute more exactly. In a place that is named
    logits are stored, from which the other objectives' students learn too.
    """
    is_own = config.teacher.cache_directory is None
    return is_own and config.teacher.mode == "cache" and set(objectives) == {"cwtm"}


def not_worth(config: Config, task: Task, students: int = 1) -> str | None:
    """Why "auto" keeps nothing for students that are each shown the same, if so: it saves too little."""
    fill = Fill.expected(config, task, students)
    if fill.saved() < WORTH:
        return fill.sentence()
    return _costs_more(config, task) if task.is_fixed else None


def _costs_more(config: Config, task: Task) -> str | None:
    """Why reading a language model's rows would take as long as computing them, if so."""
    if task.device.type == "cuda":
        return too_large(config, task, None, False, None, task.device)
    row_bytes = row_bytes_of(task.shape["classes"], DTYPES[config.teacher.cache_dtype])
    parameters = task.shape["parameters"]
    if 2 * parameters >= _OPERATIONS_A_BYTE * row_bytes:
        return None
    row = size_text(row_bytes)
    return f"a network of {parameters:,} parameters computes its outputs as fast as {row} a token are read"


def device_bytes(rows: int, width: int, dtype: torch.dtype, with_confidence: bool, views: int) -> int:
    """Of a device's memory: the rows, their confidences, and where the row of each of all samples' views lies."""
    return rows * (width * dtype.itemsize + 4 * with_confidence) + 4 * views


def place_of(config: Config, home: Path | None) -> Path | None:
    """The directory that caches lie in; None: memory."""
    return home if config.teacher.cache_directory is None else Path(config.teacher.cache_directory)


def manner_of(config: Config, task: Task) -> dict[str, Any]:
    """What is known of a description before there is a teacher, and without reading the images."""
    assert task.views is not None
    precision = f"amp {config.amp}, {'compiled' if config.steps == COMPILE else 'eager'}, batches of "
    precision += f"{task.rows_per_forward}{', channels last' if config.channels_last else ''}"
    return {
        "augmentation": task.views.description,
        "precision": precision,
        "machine": f"{device_name(task.device)}, torch {torch.__version__}",
    }


def too_large(
    config: Config,
    task: Task,
    home: Path | None,
    only_confidence: bool,
    teacher: str | None = None,
    device: torch.device | None = None,
) -> str | None:
    """Why rows that are missing would not fit, if so: on the disk, or in memory where there is no directory.

    `teacher`: its fingerprint; None before there is one, when any cache made in the same manner may turn out to be its.
    """
    if task.views is None:
        return None
    dtype = DTYPES[config.teacher.cache_dtype]
    row_bytes = row_bytes_of(1, torch.float32) if only_confidence else row_bytes_of(task.shape["classes"], dtype)
    count, parent = Fill.expected(config, task).rows, place_of(config, home)
    if device is not None:
        free, where = float(torch.cuda.mem_get_info(device)[0]), "on the device"
    elif parent is not None:
        there = next(p for p in [parent.absolute(), *parent.absolute().parents] if p.exists())
        free, where = shutil.disk_usage(there).free, f"in {parent}"
        if known := _rows_there(parent, config, task, only_confidence, teacher):
            # What is expected is a mean, of draws that spread by less than sqrt(count) / 2: four times that is all.
            count = max(count - known - 2 * math.isqrt(count), 0)
    else:
        free, where = _free_memory(), "in memory"
    needed = count * row_bytes
    if needed <= SHARE * free:
        return None
    return f"a cache of its outputs needs about {size_text(needed)}, and {size_text(free)} are free {where}"


def row_bytes_of(width: int, dtype: torch.dtype) -> int:
    """Of a row, and the confidence beside it where it is rounded."""
    return width * dtype.itemsize + (0 if dtype == torch.float32 else torch.float32.itemsize)


def _rows_there(parent: Path, config: Config, task: Task, only_confidence: bool, teacher: str | None) -> int:
    """Rows in the fullest cache below `parent` that is, or may be, this teacher's."""
    wanted = {"format": FORMAT, **manner_of(config, task)} | ({} if teacher is None else {"teacher": teacher})
    kinds = [("logits", dtype_name(DTYPES[config.teacher.cache_dtype]))]
    kinds += [("confidence", "float32")] if only_confidence else []
    return max(
        (
            count_rows(path)
            for path, found in descriptions(parent)
            if (found.get("outputs"), found.get("dtype")) in kinds
            and all(found.get(name) == value for name, value in wanted.items())
        ),
        default=0,
    )


def _free_memory() -> float:
    """Bytes that the system could still hand out; where it doesn't say, all that there are."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    except OSError:
        pass
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def size_text(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
