"""The sequence of teaching selves (Furlanello et al. 2018, eqs. 1-4): a teacher, its students, and their vote."""

import gc
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import nn

from ..backends.dispatch import check_environment
from ..config import Config
from ..data import KeyedLoader, Loader
from ..errors import OptionError, UserError
from .accumulate import parts_of
from .adoption import adopt_teacher
from .cache_fill import fill_ahead
from .cache_store import NOBODY, owner_of
from .cache_worth import check_cache
from .compiled import check_compiler
from .distributed import Ranks, joined
from .environment import device_name, differences, environment
from .jobs import make_task, network_factory
from .learner import Learner, objective_name, total_steps
from .lineage import Lineage
from .loop import Loop
from .objectives import needs_teacher
from .observer import Interrupted, Observer, Plan
from .results import Results
from .run_store import RunStore
from .seeds import derived_seed, generation_seed, isolated
from .step_choice import COMPILE, check_step
from .task import CUSTOM, ModelFactory, Samples, Task, build, training_device, with_own
from .teacher import Teacher, fingerprint
from .teacher_cache import CachedTeacher
from .teacher_choice import FOLDER, at, choose_teacher, remove_own
from .teacher_folding import check_fold


def run(
    config: Config,
    *,
    model: ModelFactory | None = None,
    train: Samples | None = None,
    test: Samples | None = None,
    validation: Samples | None = None,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    teacher_from: str | os.PathLike[str] | None = None,
    outputs_from: str | os.PathLike[str] | None = None,
    observer: Observer | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> Results:
    """Train a teacher and `config.generations` students, each on the outputs of the one before, and let them vote.

    The caller's random generators are left as found.

    Args:
        config: the run; what of network and data is not passed below, it names.
        model: builds a fresh network of the caller's own. One of images takes what `train` serves and returns logits
            [B, classes]; one of a text takes (tokens [T, B], state), None at first, and returns (logits [T, B, V],
            state).
        train: the caller's own data: two tensors (x [N, ...], y [N]), or a DataLoader of such batches.
        test: likewise; without it a run on `train` has no test figures.
        validation: likewise.
        out: the run directory. None: no files.
        resume: go on with the run in `out`, or return its results if it is finished.
        teacher_from: directory of a run whose teacher would be this one's to the bit, as its configuration differs in
            what students learn from and in their number alone: generation 0 is copied from there, unless it is here
            already.
        outputs_from: directory in which what that teacher says to generation 1 has been put down
            (`shared.share_outputs`), to be read there.
        observer: told of everything as it happens. None: nobody.
        should_stop: asked after every step, of recorded ones after every replay: where it is true, all is saved and
            Interrupted is raised.

    Raises:
        UserError: data, network or options that don't fit each other, a directory in use, a damaged or another run's
            checkpoint, a loss that is not finite, a full disk.
        Interrupted: `should_stop` said so; what was done is in `out`.
        RankLost: another process of this run has ended.
    """
    config = with_own(config, model, train, [test, validation])
    config.validate()
    if config.students:
        raise OptionError("students", "are trained by run_together; run trains one line")
    observer = observer or Observer()
    should_stop = should_stop or never
    with ExitStack() as stack:
        ranks = stack.enter_context(joined(config.device))
        store = None if out is None else stack.enter_context(RunStore(out, ranks))
        if resume:
            if store is None:
                raise UserError("resume=True needs out=, the directory of the run to go on with")
            store.reopen(config)
            if len(store.results["generations"]) > config.generations:
                return Results(store.results, lambda: stored_networks(config, store, model))
        elif store is not None:
            store.refuse_existing()
        home = None if store is None else store.path
        own = {"train": train, "test": test, "validation": validation}
        shared = None if outputs_from is None or not Path(outputs_from).is_dir() else Path(outputs_from)
        task = everyones_task(config, ranks, stack, home, resume, model, own, shared)
        if store is not None:
            begin(store, config, task, resume, observer)
        evaluator = task.evaluator(config.seed, ranks.agreed(should_stop))
        lineage = Lineage(config, task, store, evaluator, observer)
        if teacher_from is not None and not lineage.finished:
            adopt_teacher(lineage, Path(teacher_from))
        grow([lineage], config, task, home, observer, should_stop, shared)
        return lineage.as_results()


def everyones_task(
    config: Config,
    ranks: Ranks,
    stack: ExitStack,
    home: Path | None,
    resume: bool,
    model: ModelFactory | None,
    own: Mapping[str, Samples | None],
    shared: Path | None = None,
) -> Task:
    """The task, on this rank's device; what one rank lacks is every rank's UserError. `home`: the run's directory;
    `shared`: where its first teacher's outputs are."""
    with ranks.alike():
        check_environment()
        if config.sync_statistics and config.steps == COMPILE and not ranks.is_alone:
            raise OptionError("sync_statistics", "what is exchanged for them is not compiled; leave --compile out")
        device = ranks.device(training_device(config.device))
    stack.enter_context(prepared(device))
    with ranks.alike():
        task = make_task(config, device, model=model, ranks=ranks, **own)
        if config.sync_statistics and task.is_fixed and not resume:  # older runs may have it on record
            raise OptionError("sync_statistics", f"is for images, and {config.data.name} is a text; leave it out")
        check_step(config, device, task.train(0))
        kept = config if config.generations > 1 else _reading(config, shared)
        check_cache(kept, task, None if home is None else home / FOLDER, resume)
        check_fold(config, task)
        if config.steps == COMPILE:
            check_compiler(device)
    return task


def grow(
    lineages: Sequence[Lineage],
    config: Config,
    task: Task,
    home: Path | None,
    observer: Observer,
    should_stop: Callable[[], bool],
    shared: Path | None = None,
) -> None:
    """Bring every lineage to its last generation, those that stand at the same one side by side.

    They differ in their objectives alone; `config` is of all of them, `home` the directory that they have in common,
    `shared` the one in which the outputs of generation 0 are.
    """
    _share_teacher(lineages)  # a kill may have come between
    finished = min(lineage.finished for lineage in lineages)
    observer.run_started(config, _plan(config, task, finished))
    size = config.micro_batch_size
    if size is not None and task.has_batch_norm and parts_of(task.rows_per_step, size, task.ranks.size) > 1:
        observer.message(
            f"batch normalisation takes its statistics from micro-batches of {size} images at most, "
            "not from whole batches: the weights will differ from those of a run without"
        )
    if not task.ranks.is_alone and task.has_batch_norm and not config.sync_statistics:
        observer.message(
            f"batch normalisation takes its statistics from the images of each of the {task.ranks.size} processes: the "
            "weights will differ from those of one process; --sync-statistics takes them from whole batches"
        )
    agreed = task.ranks.agreed(should_stop)
    for number in range(finished, config.generations + 1):
        if agreed():
            raise Interrupted
        here = [lineage for lineage in lineages if lineage.finished == number]
        kept = _reading(config, shared) if number == 1 else config
        _grow_generation(number, here if number else here[:1], kept, task, home, observer, should_stop)
        _share_teacher(lineages)


def _reading(config: Config, shared: Path | None) -> Config:
    """The same where a teacher's outputs are found, if they were put down in a place of others'."""
    is_own = config.teacher.mode != "live" and config.teacher.cache_directory is None
    return at(config, shared) if shared is not None and is_own else config


def _share_teacher(lineages: Sequence[Lineage]) -> None:
    """Generation 0, once one lineage has it, is that of all."""
    leader = max(lineages, key=lambda lineage: lineage.finished)
    for lineage in lineages:
        if leader.finished and not lineage.finished:
            lineage.adopt_teacher(leader)


def _grow_generation(
    number: int,
    lineages: Sequence[Lineage],
    config: Config,
    task: Task,
    home: Path | None,
    observer: Observer,
    should_stop: Callable[[], bool],
) -> None:
    seed = generation_seed(config.seed, number)
    if task.device.type == "cuda":
        gc.collect()  # a learner and its recorded steps are a cycle, and hold a GPU's memory until it is found
    with ExitStack() as stack:
        loader = task.train(derived_seed(seed, "order"))
        teachers = _teachers(number, lineages, config, task, loader, home, observer, stack)
        together = len(lineages) > 1
        learners = [lineage.learner(number, loader, teachers.get(id(lineage)), together) for lineage in lineages]
        names = ", ".join(learner.objective_name for learner in learners)
        first = min(learners, key=lambda learner: learner.step)
        observer.generation_started(number, names, first.total_steps, first.step)
        if (said := first.steps.sentence(config, task.device)) is not None:
            observer.message(said)
        if config.teacher.cache_fill == "ahead":
            _fill(number, loader, learners, config, observer, should_stop)
        Loop(learners, observer, should_stop).run()
        for teacher in teachers.values():
            teacher.dismiss()
        if home is not None and not any(lineage.has_begun(number + 1) for lineage in lineages):
            task.ranks.first(lambda: remove_own(config, home / FOLDER))
        for lineage, learner in zip(lineages, learners, strict=True):
            lineage.conclude(learner)


def _fill(
    number: int,
    loader: Loader,
    learners: Sequence[Learner],
    config: Config,
    observer: Observer,
    should_stop: Callable[[], bool],
) -> None:
    """Let the teachers that keep what they say compute all of it now."""
    first = min(learner.epoch for learner in learners)
    epochs = range(first, -(-learners[0].total_steps // loader.steps_per_epoch))
    steps = {epoch: learners[0].batches(epoch) for epoch in epochs}
    if not steps:  # resumed where only the last evaluation was left
        return
    for teacher in {id(learner.teacher): learner.teacher for learner in learners}.values():
        if isinstance(teacher, CachedTeacher):
            assert isinstance(loader, KeyedLoader)
            rows = fill_ahead(teacher, loader, config, steps, should_stop)
            observer.message(f"generation {number}: {rows} rows of its teacher's cache were computed ahead")


def _teachers(
    number: int,
    lineages: Sequence[Lineage],
    config: Config,
    task: Task,
    loader: Loader,
    home: Path | None,
    observer: Observer,
    stack: ExitStack,
) -> dict[int, Teacher]:
    """The teacher of each lineage that needs one, by the lineage's id; one for all whose networks are the same."""
    pupils: dict[str, list[Lineage]] = {}
    for lineage in lineages:
        if needs_teacher(objective_name(lineage.config, number)):
            pupils.setdefault(fingerprint(lineage.network(number - 1)), []).append(lineage)
    teachers: dict[int, Teacher] = {}
    for several in pupils.values():
        objectives = [lineage.config.objective.name for lineage in several]
        cache_home = None if home is None else home / FOLDER
        network = several[0].network(number - 1)
        before = next(filter(None, (lineage.teacher_before(number) for lineage in several)), None)
        teacher, said = choose_teacher(
            network, config, task, loader, objectives, cache_home, _owner(home, config), before
        )
        stack.callback(teacher.close)
        if said is not None:
            whose = f"of {' and '.join(objectives)}, " if len(pupils) > 1 else ""
            observer.teacher_chosen(number, whose + said)
        teachers |= {id(lineage): teacher for lineage in several}
    return teachers


def _owner(home: Path | None, config: Config) -> bytes:
    """Tells a run's own rows from those of others in a place that they share."""
    if home is None or config.teacher.cache_directory is None:
        return NOBODY
    return owner_of(home)


def _plan(config: Config, task: Task, finished: int) -> Plan:
    steps_per_epoch = task.shape["steps_per_epoch"]
    steps = total_steps(config, steps_per_epoch)
    return Plan(
        generations=config.generations + 1,
        finished=finished,
        steps=steps,
        steps_per_epoch=steps_per_epoch,
        epochs=-(-steps // steps_per_epoch),
        parameters=task.shape["parameters"],
        device=device_name(task.device) if task.ranks.is_alone else f"{task.ranks.size} x {device_name(task.device)}",
        unit=task.unit,
        rows_per_step=task.rows_per_step,
        students=config.students,
    )


def begin(store: RunStore, config: Config, task: Task, resume: bool, observer: Observer) -> None:
    """Put the run down, or make sure that it is the one to go on with."""
    now = environment(task.device, task.shape, task.ranks.size)
    if not resume:
        store.create(config, now)
    store.identify(config, task.shape, task.structure)
    assert store.environment is not None
    if changed := differences(store.environment, now):
        observer.message(
            f"resumed on another footing ({'; '.join(changed)}): the weights will differ from an uninterrupted run's"
        )


def stored_networks(config: Config, store: RunStore, model: ModelFactory | None) -> list[nn.Module]:
    """The networks of a finished run, on the CPU; needs none of its data."""
    if model is None and config.model.name == CUSTOM:
        raise UserError("this run's network was the caller's own: pass its factory as model=")
    assert store.environment is not None
    shape, cpu = store.environment["shape"], torch.device("cpu")
    factory = model or network_factory(config.model, shape)
    networks = []
    for number in range(len(store.results["generations"])):
        with isolated(cpu):
            network = build(factory, shape, cpu, channels_last=False)
        store.load_network(number, network)
        networks.append(network.eval().requires_grad_(False))
    return networks


@contextmanager
def prepared(device: torch.device) -> Iterator[None]:
    """The caller's generators are left as found, and cuDNN tries its algorithms once for each of a run's few shapes."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        with isolated(device):
            yield
    finally:
        torch.backends.cudnn.benchmark = before


def never() -> bool:
    """Nothing asks this run to stop."""
    return False
