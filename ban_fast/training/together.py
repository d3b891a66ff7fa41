"""Several students of one teacher, side by side: batches are drawn, and the teacher is asked, once for all."""

import os
from collections.abc import Callable
from contextlib import ExitStack

from torch.utils.data import DataLoader

from ..config import STUDENT_FOLDERS, Config
from ..errors import OptionError, UserError
from .distributed import joined
from .generations import begin, everyones_task, grow, never, stored_networks
from .lineage import Lineage
from .observer import Observer
from .results import Results
from .run_store import RunStore
from .task import ModelFactory, Samples, Task, with_own


def run_together(
    config: Config,
    *,
    model: ModelFactory | None = None,
    train: Samples | None = None,
    test: Samples | None = None,
    validation: Samples | None = None,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    observer: Observer | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> dict[str, Results]:
    """One run for each objective of `config.students`, as `run` would make it, all at once; by objective.

    Each has a whole run directory below `out`, named after its objective ("ban_l" for "ban+l"), that can be resumed,
    reported and repeated by itself; `out` itself holds the configuration of all. The teacher, generation 0, is trained
    once. From then on the lines go side by side: the same batches and views, one teacher for all students of
    generation 1, and each line's own from generation 2 on. Weights and figures are those of separate runs, on the CPU
    to the bit.

    Args:
        config: of all; `config.students` names the objectives, `config.of_student` what each is trained by.
        model: as for `run`.
        train: as for `run`, but no DataLoader, whose order may depend on what else is drawn.
        test: as for `run`.
        validation: as for `run`.
        out: the directory of all run directories. None: no files.
        resume: go on with the runs in `out`, or return their results if they are finished.
        observer: as for `run`.
        should_stop: as for `run`.

    Raises:
        UserError: as `run`; no objective, or a DataLoader.
        Interrupted, RankLost: as `run`.
    """
    config = with_own(config, model, train, [test, validation])
    config.validate()
    if not config.students:
        raise OptionError("students", "names no objective; run trains a single line")
    if isinstance(train, DataLoader):
        raise OptionError(
            "students", "need data that ban_fast draws batches of: pass tensors, or train them one by one"
        )
    observer = observer or Observer()
    should_stop = should_stop or never
    settings = {name: config.of_student(name) for name in config.students}
    with ExitStack() as stack:
        ranks = stack.enter_context(joined(config.device))
        family = None if out is None else stack.enter_context(RunStore(out, ranks))
        stores = _stores(family, settings, stack)
        if resume:
            if family is None:
                raise UserError("resume=True needs out=, the directory of the runs to go on with")
            family.reopen(config)
            _reopen(stores, settings)
            if all(len(store.results["generations"]) > config.generations for store in stores.values()):
                return {name: _stored(settings[name], store, model) for name, store in stores.items()}
        elif family is not None:
            family.refuse_existing()
            for store in stores.values():
                store.refuse_existing()
        home = None if family is None else family.path
        own = {"train": train, "test": test, "validation": validation}
        task = everyones_task(config, ranks, stack, home, resume, model, own)
        if family is not None:
            _begin(family, stores, config, settings, task, resume, observer)
        evaluator = task.evaluator(config.seed, ranks.agreed(should_stop))
        trained: set[int] = set()
        lineages = {
            name: Lineage(settings[name], task, stores.get(name), evaluator, observer, trained)
            for name in config.students
        }
        grow(list(lineages.values()), config, task, home, observer, should_stop)
        return {name: lineage.as_results() for name, lineage in lineages.items()}


def _stores(family: RunStore | None, settings: dict[str, Config], stack: ExitStack) -> dict[str, RunStore]:
    if family is None:
        return {}
    return {name: stack.enter_context(RunStore(family.path / STUDENT_FOLDERS[name], family.ranks)) for name in settings}


def _reopen(stores: dict[str, RunStore], settings: dict[str, Config]) -> None:
    """Take up the runs that were begun: a kill may have come before all were."""
    for name, store in stores.items():
        if store.exists:
            store.reopen(settings[name])


def _begin(
    family: RunStore,
    stores: dict[str, RunStore],
    config: Config,
    settings: dict[str, Config],
    task: Task,
    resume: bool,
    observer: Observer,
) -> None:
    """Put down first what all are, then each: from then on the whole can be resumed."""
    begin(family, config, task, resume, observer)
    silent = Observer()  # what is to be said of another footing was said of the whole
    for name, store in stores.items():
        begin(store, settings[name], task, store.environment is not None, silent)


def _stored(config: Config, store: RunStore, model: ModelFactory | None) -> Results:
    return Results(store.results, lambda: stored_networks(config, store, model))
