"""Whether a teacher answers live or its outputs are kept, where, and what that saves."""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config import Config
from ..data import KeyedLoader, Loader
from ..errors import OptionError
from .cache_store import FileRows, MemoryRows, count_rows, descriptions
from .compiled import compiled
from .environment import device_name
from .learner import autocast, total_steps
from .locks import InUse
from .reader import Forward
from .seeds import isolated
from .step_choice import COMPILE
from .task import Task, Views
from .teacher import Frozen, LiveTeacher, Teacher, dtype_name
from .teacher_cache import CachedTeacher
from .teacher_folding import answering, first_images
from .text_cache import CachedTextTeacher

FOLDER = "teacher-cache"
"""Where a run keeps its teachers' outputs, if nothing else is asked for."""
_FORMAT = 2
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_WORTH = 0.25
"""Share of a teacher's forward passes that must be saved before "auto" fills a disk for it."""
_OPERATIONS_A_BYTE = 400
"""That a few cores do (1e11 a second) while an ordinary disk takes or gives one (2.5e8)."""
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
    is_fixed: bool
    """Whether every epoch serves the same batches."""

    @classmethod
    def expected(cls, config: Config, task: Task) -> "Fill":
        """Of one generation. Needs `task.views`."""
        assert task.views is not None
        images = task.views.samples if task.is_fixed else task.shape["train_images"]
        steps_per_epoch = task.shape["steps_per_epoch"]
        steps, views = total_steps(config, steps_per_epoch), task.views.each
        live = steps * task.rows_per_step
        seen = views * (1 - (1 - 1 / views) ** (live / images))
        rows = min(round(images * seen), live)
        return cls(epochs=steps / steps_per_epoch, views=views, live=live, seen=seen, rows=rows, is_fixed=task.is_fixed)

    def saved(self, left: int | None = None) -> float:
        """Share of the live teacher's forward passes that a cache saves; `left` rows are not in it yet, None: all."""
        return 1 - (self.rows if left is None else left) / self.live

    def sentence(self, left: int | None = None) -> str:
        """ "200 epochs show 115 of 162 views of an image, 50% of these are kept already: 82% fewer forward passes"."""
        of = f"{self.seen:.3g} of {self.views} views" if self.views > 1 else "one view"
        there = "" if left is None else f", {max(1 - left / self.rows, 0):.0%} of these are kept already"
        shown = "the same windows" if self.is_fixed else f"{of} of an image"
        epochs = "1 epoch shows" if self.epochs == 1 else f"{self.epochs:.4g} epochs show"
        what = f"{epochs} {shown}{there}"
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
    only_confidence = _only_confidence(config, config.students or [config.objective.name])
    if config.teacher.mode == "cache" and (problem := _too_large(config, task, home, only_confidence)):
        remedy = (
            "free some, or use another --cache-dir"
            if resume
            else "use --cache-dtype fp16, another --cache-dir, or live"
        )
        raise OptionError("teacher.mode", f"{problem}; {remedy}")


def choose_teacher(
    network: nn.Module,
    config: Config,
    task: Task,
    loader: Loader,
    objectives: Sequence[str],
    home: Path | None,
    owner: bytes,
    before: str | None = None,
) -> tuple[Teacher, str | None]:
    """The teacher that a finished network becomes for students of these objectives, and what to say of the choice.

    `loader` is that of their training. `home` is where caches lie unless the configuration names a place (None: in
    memory); `owner`, 8 bytes, tells this run's rows from others'. `before` is the mode that was chosen for these
    students in an earlier session: "auto" keeps it, as rounded rows in place of a live teacher, or the other way round,
    would be other bits.
    UserError where a cache is damaged beyond use, another teacher's, or in use.
    """
    frozen = _frozen(network, config, task)
    live = partial(LiveTeacher, network, frozen.reader, is_folded=frozen.is_folded)
    if config.teacher.mode == "live":
        return live(), None
    # Ranks must go one way: rank 0, which keeps the files, finds it.
    reason, same_bits = task.ranks.first(lambda: _reason_for_live(frozen, config, task, home, before))
    if reason is not None:
        return live(), f"live: {reason}"
    try:
        return _cached(frozen, config, task, loader, objectives, home, owner, same_bits)
    except InUse:
        if not _may_change(config, task, before):
            raise
        return live(), f"live: another process uses its cache in {_place(config, home)}"


def _frozen(network: nn.Module, config: Config, task: Task) -> Frozen:
    """A finished network, and how it answers."""
    network = network.eval().requires_grad_(False)
    chosen, is_folded, _ = answering(network, config, task.device, first_images(task))
    reader = Forward(compiled(chosen)) if config.steps == COMPILE else task.reader(chosen)
    return Frozen(network, reader, is_folded=is_folded)


def _may_change(config: Config, task: Task, before: str | None) -> bool:
    """Whether a teacher may still be live that could be cached.

    What was rounded in an earlier session remains so, and a text's teacher has read on only in what it kept.
    """
    is_exact = config.teacher.cache_dtype == "fp32" and not task.is_fixed
    return config.teacher.mode == "auto" and (before is None or is_exact)


def _reason_for_live(
    frozen: Frozen, config: Config, task: Task, home: Path | None, before: str | None
) -> tuple[str | None, bool]:
    """Why a teacher that may be cached is not, if so; whether kept logits would be the live ones to the bit."""
    is_auto, is_exact = config.teacher.mode == "auto", config.teacher.cache_dtype == "fp32"
    if task.views is None:
        several = "several processes keep no outputs of a text"
        return several if task.is_fixed else "what a DataLoader serves can't be told apart", False
    if is_auto and before == "live":
        return "as this generation began", False
    if _may_change(config, task, before) and (reason := _too_large(config, task, home, False, frozen.fingerprint)):
        return reason, False
    dtype, same_bits = _probe(frozen, config, task)
    is_even = task.rows_per_step % task.ranks.size == 0
    if dtype == torch.float64 and is_exact:
        if not is_auto:
            raise OptionError("teacher.mode", "this teacher's logits are float64, which fp32 rounds; use live")
        return "its logits are float64, which fp32 rounds", same_bits
    if is_auto and is_exact and not is_even:
        return "some processes have more images of a batch than others: kept logits would not be the same", False
    if is_auto and is_exact and not same_bits:
        return "its logits depend on the other images of a batch, so that kept ones would not be the same", same_bits
    # A place that is named is there for other runs too.
    if is_auto and before is None and config.teacher.cache_directory is None:
        fill = Fill.expected(config, task)
        if fill.saved() < _WORTH:
            return fill.sentence(), same_bits
        if task.is_fixed and (reason := _costs_more(config, task)):
            return reason, same_bits
    return None, same_bits and is_even


def _costs_more(config: Config, task: Task) -> str | None:
    """Why reading a language model's rows would take as long as computing them, if so."""
    if task.device.type == "cuda":
        return _too_large(config, task, None, False, None, task.device)
    row_bytes, parameters = (
        _row_bytes(task.shape["classes"], _DTYPES[config.teacher.cache_dtype]),
        task.shape["parameters"],
    )
    if 2 * parameters >= _OPERATIONS_A_BYTE * row_bytes:
        return None
    return f"a network of {parameters:,} parameters computes its outputs as fast as {_size(row_bytes)} a token are read"


def remove_own(config: Config, home: Path) -> None:
    """Delete a run's own caches, of earlier sessions too: its teacher may be live by now, or kept elsewhere."""
    named = config.teacher.cache_directory
    if named is None or not Path(named).resolve().is_relative_to(home.resolve()):
        shutil.rmtree(home, ignore_errors=True)


def _only_confidence(config: Config, objectives: Sequence[str]) -> bool:
    """Whether all that students need is CWTM's number. Kernels know it to more digits than fp32: never unasked."""
    return config.teacher.mode == "cache" and set(objectives) == {"cwtm"}


def _cached(
    frozen: Frozen,
    config: Config,
    task: Task,
    loader: Loader,
    objectives: Sequence[str],
    home: Path | None,
    owner: bytes,
    same_bits: bool,
) -> tuple[Teacher, str]:
    """The cached teacher, and what to say of it."""
    views = task.views
    assert views is not None
    fill = Fill.expected(config, task)
    by_confidence = config.teacher.mode == "cache" and "cwtm" in objectives
    held: list[MemoryRows | FileRows] = []

    def open_rows() -> tuple[int, torch.dtype, bool]:
        rows, only_confidence = _rows(frozen, config, task, _only_confidence(config, objectives), home, owner)
        held.append(rows)
        return rows.table.shape[1], rows.table.dtype, only_confidence

    width, dtype, only_confidence = task.ranks.first(open_rows)  # files are rank 0's
    row_bytes = _row_bytes(width, dtype)
    on_device = task.device.type == "cuda" and fill.rows * row_bytes <= _SHARE * torch.cuda.mem_get_info(task.device)[0]
    options: dict[str, Any] = {
        "rows": held[0] if held else MemoryRows(width, dtype, task.device if on_device else torch.device("cpu")),
        "samples": views.samples,
        "views": views.each,
        "batch_size": task.rows_per_forward,
        "device": task.device,
        "only_confidence": only_confidence,
        "with_confidence": by_confidence and not only_confidence,
        "on_device": on_device,
        "is_own": config.teacher.cache_directory is None,
        "is_folded": frozen.is_folded,
        "ranks": task.ranks,
    }
    if task.is_fixed:
        options["windows"] = lambda: loader.epoch(0)
    with task.ranks.alike():
        teacher = (CachedTextTeacher if task.is_fixed else CachedTeacher)(frozen.network, frozen.reader, **options)
    teacher.share()
    rows = options["rows"]
    left = _left(rows.keys, loader, config, views, fill) if isinstance(rows, FileRows) and rows.count else None
    what = "confidences" if only_confidence else "logits"
    place = str(rows.path.parent) if isinstance(rows, FileRows) else "memory"
    if task.device.type == "cuda" and isinstance(rows, FileRows):
        place += " and the device's memory" if on_device else " (too large for the device's memory)"
    exact = same_bits and not by_confidence and rows.table.dtype == torch.float32
    text = (
        f"cache: {fill.sentence(left)}; {what} in {dtype_name(rows.table.dtype)}, about "
        f"{_size(fill.rows * row_bytes)} in {place}, {'the same bits as live' if exact else 'rounded'}"
    )
    if isinstance(rows, FileRows) and rows.note is not None:
        text = f"{text}; {rows.note}"
    return teacher, text


def _left(known: Tensor, loader: Loader, config: Config, views: Views, fill: Fill) -> int:
    """How many rows of those that a generation from its start asks for are not under the keys `known`, int64 [n]."""
    if not isinstance(loader, KeyedLoader):
        return max(fill.rows - len(known), 0)
    shown = torch.zeros(views.samples * views.each, dtype=torch.bool)
    steps = total_steps(config, loader.steps_per_epoch)
    for epoch, done in enumerate(range(0, steps, loader.steps_per_epoch)):
        ids, shows = loader.shown(epoch, min(loader.steps_per_epoch, steps - done))
        shown[(ids * views.each + shows).cpu()] = True
    shown[known] = False
    return int(shown.sum())


def _rows(
    frozen: Frozen, config: Config, task: Task, only_confidence: bool, home: Path | None, owner: bytes
) -> tuple[MemoryRows | FileRows, bool]:
    """Where the rows go, and whether they are confidences alone: not if the logits are there already."""
    dtype = _DTYPES[config.teacher.cache_dtype]
    parent = _place(config, home)
    classes = task.shape["classes"]
    if parent is None:
        if only_confidence:
            dtype, classes = torch.float32, 1
        fits = task.device.type == "cuda" and _too_large(config, task, None, only_confidence, None, task.device) is None
        return MemoryRows(classes, dtype, task.device if fits else torch.device("cpu")), only_confidence
    logits = _description(frozen, config, task, "logits", dtype)
    if only_confidence and not (parent / _name(logits)).exists():
        confidence = _description(frozen, config, task, "confidence", torch.float32)
        return FileRows(parent / _name(confidence), confidence, 1, torch.float32, owner), True
    # Whoever made them, rounded logits have exact confidences beside them: CWTM's bits don't depend on what is kept.
    return FileRows(parent / _name(logits), logits, classes, dtype, owner, dtype != torch.float32), False


def _place(config: Config, home: Path | None) -> Path | None:
    """The directory that caches lie in; None: memory."""
    return home if config.teacher.cache_directory is None else Path(config.teacher.cache_directory)


def _description(frozen: Frozen, config: Config, task: Task, outputs: str, dtype: torch.dtype) -> dict[str, Any]:
    """Everything that the bits of a row depend on."""
    assert task.views is not None
    return {
        "format": _FORMAT,
        "teacher": frozen.fingerprint,
        "dataset": task.views.fingerprint(),
        **_manner(config, task),
        "outputs": outputs,
        "dtype": dtype_name(dtype),
        **frozen.manner(),
    }


def _manner(config: Config, task: Task) -> dict[str, Any]:
    """What is known of a description before there is a teacher, and without reading the images."""
    assert task.views is not None
    precision = f"amp {config.amp}, {'compiled' if config.steps == COMPILE else 'eager'}, batches of "
    precision += f"{task.rows_per_forward}{', channels last' if config.channels_last else ''}"
    return {
        "augmentation": task.views.description,
        "precision": precision,
        "machine": f"{device_name(task.device)}, torch {torch.__version__}",
    }


def _name(description: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:20]


def _probe(frozen: Frozen, config: Config, task: Task) -> tuple[torch.dtype, bool]:
    """The dtype of a network's logits, and whether an image's stay the same to the bit in another place in a batch."""
    with isolated(task.device), autocast(config, task.device):
        images = next(task.train(0).epoch(0)).images
        if task.is_fixed:  # a window is always met in its own place
            dtype = frozen.logits(images).dtype
            frozen.reader.begin()
            return dtype, True
        turned = torch.empty_like(images).copy_(images.flip(0))
        logits, turned_logits = frozen.logits(images), frozen.logits(turned)
    return logits.dtype, torch.equal(logits.flip(0), turned_logits)


def _too_large(
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
    dtype = _DTYPES[config.teacher.cache_dtype]
    row_bytes = _row_bytes(1, torch.float32) if only_confidence else _row_bytes(task.shape["classes"], dtype)
    count, parent = Fill.expected(config, task).rows, _place(config, home)
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
    if needed <= _SHARE * free:
        return None
    return f"a cache of its outputs needs about {_size(needed)}, and {_size(free)} are free {where}"


def _row_bytes(width: int, dtype: torch.dtype) -> int:
    """Of a row, and the confidence beside it where it is rounded."""
    return width * dtype.itemsize + (0 if dtype == torch.float32 else torch.float32.itemsize)


def _rows_there(parent: Path, config: Config, task: Task, only_confidence: bool, teacher: str | None) -> int:
    """Rows in the fullest cache below `parent` that is, or may be, this teacher's."""
    wanted = {"format": _FORMAT, **_manner(config, task)} | ({} if teacher is None else {"teacher": teacher})
    kinds = [("logits", dtype_name(_DTYPES[config.teacher.cache_dtype]))]
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


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
