"""What one teacher says to the students of several runs, computed once and ahead, where each of them reads it."""

from collections.abc import Sequence
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any

from ..config import Config
from ..data import KeyedLoader, Loader, MemoryLoader, TensorLoader
from ..errors import UserError
from .cache_fill import Stop, fill_ahead, fill_in_order
from .cache_store import owner_of
from .cache_worth import check_cache, not_worth
from .distributed import ALONE
from .generations import prepared
from .jobs import make_task
from .learner import autocast, total_steps
from .observer import Interrupted
from .run_store import RunStore
from .seeds import derived_seed, generation_seed
from .task import Task, training_device
from .teacher_cache import CachedTeacher
from .teacher_choice import at, choose_teacher, gives_same_bits
from .text_cache import CachedTextTeacher


def share_outputs(teacher: Path, students: Sequence[Config], place: Path, should_stop: Stop) -> dict[str, Any]:
    """Put down in `place`, or where the students' configuration says, what their teacher says in generation 1.

    `teacher` is the directory of the run that has trained it; `students` differ in their objectives alone, and so see
    the same views. What is there already is not computed again. Returns the mode, "cache" or, where that is not worth
    it, "live"; what is said of that; and how many images or tokens the teacher was shown.
    Interrupted, with what was computed on disk, where `should_stop` says so; UserError where it can't be kept.
    """
    config = students[0] if students[0].teacher.cache_directory is not None else at(students[0], place)
    objectives = [student.objective.name for student in students]
    device = training_device(config.device)
    with ExitStack() as stack:
        stack.enter_context(prepared(device))
        task = make_task(config, device)
        check_cache(config, task, None)
        if (reason := _reason_for_live(students, task)) is not None:
            return {"mode": "live", "said": f"live: {reason}"}
        store = RunStore(teacher, ALONE)
        store.look()
        network = task.network(0)
        store.load_network(0, network)
        loader = task.train(derived_seed(generation_seed(config.seed, 1), "order"))
        owner, count = owner_of(teacher), len(students)
        chosen, said = choose_teacher(network, config, task, loader, objectives, None, owner, students=count)
        stack.callback(chosen.close)
        if not isinstance(chosen, CachedTeacher):
            return {"mode": "live", "said": said}
        _fill(chosen, config, task, loader, should_stop)
        chosen.check()
        return {**chosen.record(0, task.unit), "said": said}


def _reason_for_live(students: Sequence[Config], task: Task) -> str | None:
    """Why "auto" leaves it to each of the students, if so. A place that is named is filled for others too."""
    config = students[0]
    if config.teacher.mode != "auto" or task.views is None:
        return None
    if not (task.is_fixed or isinstance(task.train(0), (MemoryLoader, TensorLoader))):
        return "images would be read from their files once more"
    if config.teacher.cache_directory is not None:
        return None
    # Rounded rows are other bits than a live teacher's: only where each student by itself would keep them too.
    return not_worth(config, task, len(students) if config.teacher.cache_dtype == "fp32" else 1)


def _fill(teacher: CachedTeacher, config: Config, task: Task, loader: Loader, should_stop: Stop) -> None:
    """Every row that generation 1 reads: the ones that it would compute itself, to the bit."""
    total = total_steps(config, loader.steps_per_epoch)
    if isinstance(teacher, CachedTextTeacher):
        with autocast(config, task.device):
            for batch in islice(loader.epoch(0), total):
                if should_stop():
                    teacher.sync()
                    raise Interrupted
                teacher(batch)
        teacher.sync()
        return
    if not isinstance(loader, KeyedLoader):
        raise UserError("what this loader serves can't be known ahead")
    epochs = enumerate(range(0, total, loader.steps_per_epoch))
    steps = {epoch: min(loader.steps_per_epoch, total - done) for epoch, done in epochs}
    is_lazy = config.teacher.cache_fill == "lazy" and not gives_same_bits(teacher, config, task)
    (fill_in_order if is_lazy else fill_ahead)(teacher, loader, config, steps, should_stop)
