"""Whether a teacher answers live or its outputs are kept, where, and what that saves."""

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config import Config
from ..data import KeyedLoader, Loader
from ..errors import OptionError, UserError
from .cache_store import FileRows, MemoryRows
from .cache_worth import (
    DTYPES,
    FORMAT,
    SHARE,
    Fill,
    device_bytes,
    manner_of,
    not_worth,
    only_confidence_of,
    place_of,
    row_bytes_of,
    size_text,
    too_large,
)
from .compiled import compiled
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


def choose_teacher(
    network: nn.Module,
    config: Config,
    task: Task,
    loader: Loader,
    objectives: Sequence[str],
    home: Path | None,
    owner: bytes,
    before: str | None = None,
    students: int = 1,
) -> tuple[Teacher, str | None]:
    """The teacher that a finished network becomes for students of these objectives, and what to say of the choice.

    `loader` is that of their training. `home` is where caches lie unless the configuration names a place (None: in
    memory); `owner`, 8 bytes, tells this run's rows from others'. `before` is the mode that was chosen for these
    students in an earlier session: "auto" keeps it, as rounded rows in place of a live teacher, or the other way round,
    would be other bits. `students`: how many there are who would each ask a live teacher by themselves; beyond one, a
    cache that another process fills is an InUse.
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
        return _cached(frozen, config, task, loader, objectives, home, owner, same_bits, students)
    except InUse:
        if students > 1 or not _may_change(config, task, before):
            raise
    taken = f"another process fills its cache in {place_of(config, home)}"
    config = at(config, None)
    reason, same_bits = task.ranks.first(lambda: _reason_for_live(frozen, config, task, home, before))
    if reason is not None:
        return live(), f"live: {taken}; {reason}"
    teacher, said = _cached(frozen, config, task, loader, objectives, home, owner, same_bits)
    return teacher, f"{said}; {taken}"


def at(config: Config, place: Path | None) -> Config:
    """The same with another place for what teachers say; None: the run's own."""
    return replace(config, teacher=replace(config.teacher, cache_directory=None if place is None else str(place)))


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
    if _may_change(config, task, before) and (reason := too_large(config, task, home, False, frozen.fingerprint)):
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
    if is_auto and before is None and config.teacher.cache_directory is None and (reason := not_worth(config, task)):
        return reason, same_bits
    return None, same_bits and is_even


def remove_own(config: Config, home: Path) -> None:
    """Delete a run's own caches, of earlier sessions too: its teacher may be live by now, or kept elsewhere."""
    named = config.teacher.cache_directory
    if named is None or not Path(named).resolve().is_relative_to(home.resolve()):
        shutil.rmtree(home, ignore_errors=True)


def _cached(
    frozen: Frozen,
    config: Config,
    task: Task,
    loader: Loader,
    objectives: Sequence[str],
    home: Path | None,
    owner: bytes,
    same_bits: bool,
    students: int = 1,
) -> tuple[Teacher, str]:
    """The cached teacher, and what to say of it."""
    views = task.views
    assert views is not None
    fill = Fill.expected(config, task, students)
    by_confidence = config.teacher.mode == "cache" and "cwtm" in objectives
    held: list[MemoryRows | FileRows] = []

    def open_rows() -> tuple[int, torch.dtype, bool]:
        rows, only_confidence = _rows(frozen, config, task, loader, only_confidence_of(config, objectives), home, owner)
        held.append(rows)
        return rows.table.shape[1], rows.table.dtype, only_confidence

    width, dtype, only_confidence = task.ranks.first(open_rows)  # files are rank 0's
    rows = held[0] if held else None
    left = _left(rows.keys, loader, config, views, fill) if isinstance(rows, FileRows) and rows.count else None
    count = fill.most if rows is None or left is None else rows.count + left
    with_confidence = by_confidence and not only_confidence
    needed = device_bytes(count, width, dtype, with_confidence, views.samples * views.each)
    on_device = task.device.type == "cuda" and needed <= SHARE * torch.cuda.mem_get_info(task.device)[0]
    if rows is None:
        rows = MemoryRows(width, dtype, task.device if on_device else torch.device("cpu"))
    options: dict[str, Any] = {
        "rows": rows,
        "expected": count,
        "samples": views.samples,
        "views": views.each,
        "batch_size": task.rows_per_forward,
        "device": task.device,
        "only_confidence": only_confidence,
        "with_confidence": with_confidence,
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
    what = "confidences" if only_confidence else "logits"
    place = str(rows.path.parent) if isinstance(rows, FileRows) else "memory"
    if task.device.type == "cuda" and isinstance(rows, FileRows):
        place += " and the device's memory" if on_device else " (too large for the device's memory)"
    text = (
        f"cache: {fill.sentence(left)}; {what} in {dtype_name(rows.table.dtype)}, about "
        f"{size_text(fill.rows * row_bytes_of(width, dtype))} in {place}, {_precision(teacher, objectives, same_bits)}"
    )
    if isinstance(rows, FileRows) and rows.note is not None:
        text = f"{text}; {rows.note}"
    return teacher, text


def _precision(teacher: CachedTeacher, objectives: Sequence[str], same_bits: bool) -> str:
    """What the students learn from, in comparison to a live teacher."""
    if not same_bits or teacher.dtype_for("") != torch.float32:
        return "rounded"
    if not teacher.has_confidences or "cwtm" not in objectives:
        return "the same bits as live"
    return "rounded" if set(objectives) == {"cwtm"} else "the same bits as live but for CWTM's confidences, rounded"


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
    frozen: Frozen,
    config: Config,
    task: Task,
    loader: Loader,
    only_confidence: bool,
    home: Path | None,
    owner: bytes,
) -> tuple[MemoryRows | FileRows, bool]:
    """Where the rows go, and whether they are confidences alone: not if the logits are there already."""
    dtype = DTYPES[config.teacher.cache_dtype]
    parent = place_of(config, home)
    classes = task.shape["classes"]
    if parent is None:
        if only_confidence:
            dtype, classes = torch.float32, 1
        fits = task.device.type == "cuda" and too_large(config, task, None, only_confidence, None, task.device) is None
        return MemoryRows(classes, dtype, task.device if fits else torch.device("cpu")), only_confidence
    logits = _description(frozen, config, task, "logits", dtype)
    if only_confidence and not (parent / _name(logits)).exists():
        confidence = _description(frozen, config, task, "confidence", torch.float32)
        return FileRows(parent / _name(confidence), confidence, 1, torch.float32, owner), True
    # Whoever made them, rounded logits have exact confidences beside them: CWTM's bits don't depend on what is kept.
    opened = partial(FileRows, parent / _name(logits), logits, classes, dtype, owner, dtype != torch.float32)
    if config.teacher.cache_directory is not None and (whole := _whole(opened, config, task, loader)) is not None:
        return whole, False
    return opened(), False


def _whole(opened: Callable[..., FileRows], config: Config, task: Task, loader: Loader) -> FileRows | None:
    """A cache that has every row that is needed, to be read beside others; None where some are missing."""
    assert task.views is not None
    try:
        rows = opened(is_reader=True)
    except UserError:  # there is none yet, or who would fill it says what is wrong with it
        return None
    if rows.count and not _left(rows.keys, loader, config, task.views, Fill.expected(config, task)):
        return rows
    rows.close()
    return None


def _description(frozen: Frozen, config: Config, task: Task, outputs: str, dtype: torch.dtype) -> dict[str, Any]:
    """Everything that the bits of a row depend on."""
    assert task.views is not None
    return {
        "format": FORMAT,
        "teacher": frozen.fingerprint,
        "dataset": task.views.fingerprint(),
        **manner_of(config, task),
        "outputs": outputs,
        "dtype": dtype_name(dtype),
        **frozen.manner(),
    }


def _name(description: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:20]


def gives_same_bits(frozen: Frozen, config: Config, task: Task) -> bool:
    """Whether an image's logits don't depend on where in a batch it is."""
    return _probe(frozen, config, task)[1]


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
