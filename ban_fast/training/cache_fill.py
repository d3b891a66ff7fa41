"""A teacher's cache filled before training: every row that the epochs to come will read, and no other.

Which views those are is known without an image being made: loaders key them by (seed, epoch, sample id).
"""

from collections.abc import Callable, Mapping
from functools import partial
from itertools import islice

import torch
from torch import Tensor

from ..config import Config
from ..data import KeyedLoader, MemoryLoader, TensorLoader
from .learner import autocast
from .observer import Interrupted
from .teacher_cache import CachedTeacher

# Batches of training in a batch of filling, where the bits allow. On a CPU they cost more: one core took 0.46 ms for an
# image in WRN-16-1 at 32 of them, and 1.2 ms at 512, whose features leave its caches.
_LARGE, _LARGE_ON = 16, "cuda"

Stop = Callable[[], bool]


def fill_ahead(
    teacher: CachedTeacher,
    loader: KeyedLoader,
    config: Config,
    steps: Mapping[int, int],
    should_stop: Stop,
) -> int:
    """Compute the rows that the first `steps[e]` batches of each of these epochs e will read and that are not known.

    Returns how many. Interrupted where `should_stop` says so, with all that was computed on disk: it is not computed
    again. Loaders whose images lie in memory are asked for those images alone that are needed, in large batches where
    the bits allow; others serve their epochs.
    """
    before = teacher.known
    with autocast(config, teacher.device):
        if isinstance(loader, (MemoryLoader, TensorLoader)):
            _fill_from_memory(teacher, loader, steps, should_stop)
        else:
            _fill_by_epochs(teacher, loader, steps, should_stop)
    teacher.sync()
    return teacher.known - before


def fill_in_order(
    teacher: CachedTeacher,
    loader: KeyedLoader,
    config: Config,
    steps: Mapping[int, int],
    should_stop: Stop,
) -> int:
    """The same in the very batches of a training that computes what it misses: where others would be other bits."""
    before = teacher.known
    with autocast(config, teacher.device):
        _fill_by_epochs(teacher, loader, steps, should_stop)
    teacher.sync()
    return teacher.known - before


def _fill_from_memory(
    teacher: CachedTeacher,
    loader: MemoryLoader | TensorLoader,
    steps: Mapping[int, int],
    should_stop: Stop,
) -> None:
    order, views, keys = _wanted(teacher, loader, steps)
    size = loader.whole_batch
    spare = -len(keys) % size  # whole batches: the last place fills the last one up
    order, views = (torch.cat([each, each[-1:].expand(spare)]) for each in (order, views))
    large = size
    if teacher.device.type == _LARGE_ON and len(order) >= _LARGE * size:
        first = slice(_LARGE * size)
        gather = partial(loader.gather, order[first], views[first])
        large = _LARGE * size if _same_bits(teacher, gather, size) else size
    start = 0
    while start < len(order):
        _continue_or_stop(teacher, should_stop)
        part = slice(start, start + (large if len(order) - start >= large else size))
        teacher.compute(keys[part], loader.gather(order[part], views[part]))
        start = part.stop


def _wanted(
    teacher: CachedTeacher, loader: KeyedLoader, steps: Mapping[int, int]
) -> tuple[Tensor, Tensor, Tensor]:  # int64 [n] each
    """Places, views and keys of what is not known: each once, in the order of training."""
    is_wanted = torch.zeros(teacher.capacity, dtype=torch.bool, device=teacher.device)
    found = []
    for epoch, count in steps.items():
        plan = loader.plan(epoch)
        shown = slice(count * loader.whole_batch)
        keys = teacher.keys(plan.sample_ids[shown], plan.views[shown])
        new = teacher.unknown(keys) & ~is_wanted[keys]
        is_wanted[keys] = True
        found.append(torch.stack((plan.order[shown][new], plan.views[shown][new], keys[new])))
    order, views, keys = torch.cat(found, 1)
    return order, views, keys


def _same_bits(teacher: CachedTeacher, gather: Callable[[], Tensor], size: int) -> bool:
    """Whether the teacher's outputs for a large batch fit into memory, and are those for batches of training."""
    try:
        images = gather()
        together = teacher.logits(images)
    except torch.OutOfMemoryError:
        return False
    return torch.equal(together, torch.cat([teacher.logits(part) for part in torch.split(images, size)]))


def _fill_by_epochs(teacher: CachedTeacher, loader: KeyedLoader, steps: Mapping[int, int], should_stop: Stop) -> None:
    for epoch, count in steps.items():
        if not teacher.unknown(teacher.keys(*loader.shown(epoch, count))).any():
            continue
        batches = islice(loader.epoch(epoch), count)
        for batch in batches:
            _continue_or_stop(teacher, should_stop)
            teacher.prepare([batch, *islice(batches, teacher.ahead(batch) - 1)])


def _continue_or_stop(teacher: CachedTeacher, should_stop: Stop) -> None:
    if should_stop():
        teacher.sync()
        raise Interrupted
