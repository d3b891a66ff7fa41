"""Whether a teacher answers live or its outputs are kept, where, and what that saves."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config import Config
from ..errors import OptionError
from .cache_store import FileRows, MemoryRows
from .compiled import compiled
from .environment import device_name
from .learner import autocast, total_steps
from .seeds import isolated
from .task import Task
from .teacher import Frozen, LiveTeacher, Teacher, dtype_name
from .teacher_cache import CachedTeacher

FOLDER = "teacher-cache"
"""Where a run keeps its teachers' outputs, if nothing else is asked for."""
_FORMAT = 1
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_WORTH = 0.25
"""Share of a teacher's forward passes that must be saved before "auto" fills a disk for it."""
_SHARE = 0.5
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

    @classmethod
    def expected(cls, config: Config, task: Task) -> "Fill":
        """Of one generation. Needs `task.views`."""
        assert task.views is not None
        images, steps_per_epoch = task.shape["train_images"], task.shape["steps_per_epoch"]
        steps, views = total_steps(config, steps_per_epoch), task.views.each
        live = steps * _forward_batch(config, task)
        seen = views * (1 - (1 - 1 / views) ** (live / images))
        rows = min(round(images * seen), live)
        return cls(epochs=steps / steps_per_epoch, views=views, live=live, seen=seen, rows=rows)

    def saved(self, known: int, all_views: int) -> float:
        """Share of the live teacher's forward passes that a cache saves, `known` of all views being in it before."""
        return 1 - self.rows * (1 - known / all_views) / self.live

    def sentence(self, saved: float) -> str:
        """ "200 epochs show 115 of 162 views of an image: 42 % fewer forward passes"."""
        of = f"{self.seen:.3g} of {self.views} views" if self.views > 1 else "one view"
        return f"{self.epochs:.4g} epochs show {of} of an image: {saved:.0%} fewer forward passes than live"


def check_cache(config: Config, task: Task, home: Path | None) -> None:
    """OptionError, before anything is trained or written, where the cache that `config` asks for can't be."""
    if config.teacher.mode == "cache" and task.views is None:
        raise OptionError(
            "teacher.mode",
            "a DataLoader's samples may be augmented in endless ways, and can't be told apart: pass tensors or use "
            "one of ban_fast's datasets, or use live",
        )
    named = config.teacher.cache_directory
    if named is not None:
        place = Path(named)
        there = next(p for p in [place, *place.parents] if p.exists())
        if not there.is_dir():
            raise OptionError("teacher.cache_directory", f"{there} is not a directory")
        if not os.access(there, os.W_OK):
            raise OptionError("teacher.cache_directory", f"cannot write {there}: choose another place")
    if config.teacher.mode == "cache" and (problem := _too_large(config, task, home, task.shape["classes"])):
        raise OptionError("teacher.mode", f"{problem}; use --cache-dtype fp16, another --cache-dir, or live")


def choose_teacher(
    network: nn.Module, config: Config, task: Task, objectives: Sequence[str], home: Path | None, owner: bytes
) -> tuple[Teacher, str | None]:
    """The teacher that a finished network becomes for students of these objectives, and what to say of the choice.

    `home` is where caches lie unless the configuration names a place (None: in memory); `owner`, 8 bytes, tells this
    run's rows from others'. UserError where a cache is damaged beyond use, another teacher's, or in use.
    """
    forward: Callable[[Tensor], Tensor] | None = compiled(network) if config.compile else None
    mode = config.teacher.mode
    if mode == "live":
        return LiveTeacher(network, forward), None
    reason = "what a DataLoader serves can't be told apart" if task.views is None else None
    if reason is None and mode == "auto":
        reason = _too_large(config, task, home, task.shape["classes"])
    frozen = Frozen(network, forward)
    dtype, same_bits = (None, False) if reason else _probe(frozen, config, task)
    if dtype == torch.float64 and config.teacher.cache_dtype == "fp32":
        if mode == "cache":
            raise OptionError("teacher.mode", "this teacher's logits are float64, which fp32 rounds; use live")
        reason = "its logits are float64, which fp32 rounds"
    if reason is None and mode == "auto" and config.teacher.cache_dtype == "fp32" and not same_bits:
        reason = "its logits depend on the other images of a batch, so that kept ones would not be the same"
    if reason is not None:
        return LiveTeacher(network, forward), f"live: {reason}"
    return _cached(frozen, forward, config, task, objectives, home, owner, same_bits)


def _cached(
    frozen: Frozen,
    forward: Callable[[Tensor], Tensor] | None,
    config: Config,
    task: Task,
    objectives: Sequence[str],
    home: Path | None,
    owner: bytes,
    same_bits: bool,
) -> tuple[Teacher, str]:
    """The cached teacher, or for "auto" the live one where it saves too little."""
    views = task.views
    assert views is not None
    fill = Fill.expected(config, task)
    named, mode = config.teacher.cache_directory is not None, config.teacher.mode
    worth = 0.0 if named else _WORTH  # a place that is named is there for other runs too
    if mode == "auto" and not named and (saved := fill.saved(0, 1)) < worth:
        return LiveTeacher(frozen.network, forward), f"live: {fill.sentence(saved)}"
    # Only what is exact is picked unasked: kernels know confidences to more digits than fp32 has.
    by_confidence = mode == "cache" and "cwtm" in objectives
    only_confidence = by_confidence and set(objectives) == {"cwtm"}
    rows, only_confidence = _rows(frozen, config, task, only_confidence, home, owner)
    saved = fill.saved(rows.count, views.samples * views.each)
    row_bytes = rows.table.shape[1] * rows.table.element_size()
    on_device = task.device.type == "cuda" and fill.rows * row_bytes <= _SHARE * torch.cuda.mem_get_info(task.device)[0]
    teacher = CachedTeacher(
        frozen.network,
        forward,
        rows=rows,
        samples=views.samples,
        views=views.each,
        batch_size=_forward_batch(config, task),
        device=task.device,
        only_confidence=only_confidence,
        with_confidence=by_confidence and not only_confidence,
        on_device=on_device,
        is_own=not named,
    )
    what = "confidences" if only_confidence else "logits"
    place = str(rows.path.parent) if isinstance(rows, FileRows) else "memory"
    if task.device.type == "cuda" and isinstance(rows, FileRows):
        place += " and the device's memory" if on_device else " (too large for the device's memory)"
    exact = same_bits and not by_confidence and rows.table.dtype == torch.float32
    text = (
        f"cache: {fill.sentence(saved)}; {what} in {dtype_name(rows.table.dtype)}, about "
        f"{_size(fill.rows * row_bytes)} in {place}, {'the same bits as live' if exact else 'rounded'}"
    )
    if isinstance(rows, FileRows) and rows.note is not None:
        text = f"{text}; {rows.note}"
    return teacher, text


def _rows(
    frozen: Frozen, config: Config, task: Task, only_confidence: bool, home: Path | None, owner: bytes
) -> tuple[MemoryRows | FileRows, bool]:
    """Where the rows go, and whether they are confidences alone: not if the logits are there already."""
    dtype = _DTYPES[config.teacher.cache_dtype]
    parent = home if config.teacher.cache_directory is None else Path(config.teacher.cache_directory)
    classes = task.shape["classes"]
    if parent is None:
        if only_confidence:
            dtype, classes = torch.float32, 1
        fits = task.device.type == "cuda" and _too_large(config, task, None, classes, task.device) is None
        return MemoryRows(classes, dtype, task.device if fits else torch.device("cpu")), only_confidence
    logits = _description(frozen, config, task, "logits", dtype)
    if only_confidence and not (parent / _name(logits)).exists():
        confidence = _description(frozen, config, task, "confidence", torch.float32)
        return FileRows(parent / _name(confidence), confidence, 1, torch.float32, owner), True
    return FileRows(parent / _name(logits), logits, classes, dtype, owner), False


def _description(frozen: Frozen, config: Config, task: Task, outputs: str, dtype: torch.dtype) -> dict[str, Any]:
    """Everything that the bits of a row depend on."""
    views = task.views
    assert views is not None
    precision = f"amp {config.amp}, {'compiled' if config.compile else 'eager'}, batches of "
    precision += f"{_forward_batch(config, task)}{', channels last' if config.channels_last else ''}"
    return {
        "format": _FORMAT,
        "teacher": frozen.fingerprint,
        "dataset": views.fingerprint(),
        "augmentation": views.description,
        "outputs": outputs,
        "dtype": dtype_name(dtype),
        "precision": precision,
        "machine": f"{device_name(task.device)}, torch {torch.__version__}",
    }


def _name(description: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:20]


def _probe(frozen: Frozen, config: Config, task: Task) -> tuple[torch.dtype, bool]:
    """The dtype of a network's logits, and whether an image's stay the same to the bit in another place in a batch."""
    with isolated(task.device), autocast(config, task.device):
        images = next(task.train(0).epoch(0)).images
        turned = torch.empty_like(images).copy_(images.flip(0))
        logits, turned_logits = frozen.logits(images), frozen.logits(turned)
    return logits.dtype, torch.equal(logits.flip(0), turned_logits)


def _forward_batch(config: Config, task: Task) -> int:
    """Images in a batch of training."""
    return min(config.batch_size, task.shape["train_images"] or config.batch_size)


def _too_large(
    config: Config, task: Task, home: Path | None, width: int, device: torch.device | None = None
) -> str | None:
    """Why the rows would not fit, if they would not: on the disk, or in memory where there is no directory."""
    if task.views is None:
        return None
    needed = Fill.expected(config, task).rows * width * _DTYPES[config.teacher.cache_dtype].itemsize
    parent = home if config.teacher.cache_directory is None else Path(config.teacher.cache_directory)
    if device is not None:
        free, where = float(torch.cuda.mem_get_info(device)[0]), "on the device"
    elif parent is not None:
        there = next(p for p in [parent.absolute(), *parent.absolute().parents] if p.exists())
        free, where = shutil.disk_usage(there).free, f"in {parent}"
    else:
        free, where = _free_memory(), "in memory"
    if needed <= _SHARE * free:
        return None
    return f"a cache of its outputs needs about {_size(needed)}, and {_size(free)} are free {where}"


def _free_memory() -> float:
    """Bytes that the system could still hand out; where it doesn't say, all that there are."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    except OSError:
        pass
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
