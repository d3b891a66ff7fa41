"""Executing a study: what is left of it, in order, as many runs at once as there is room for, with retries."""

import os
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from ..config import Config
from ..data.folder import cores
from ..errors import UserError
from ..evaluation.run_directory import CONFIG, RunDirectory
from ..training import Interrupted
from ..training.checkpoint import make_directories
from ..training.distributed import was_launched
from ..training.locks import DirectoryLock
from ..training.run_store import config_differences
from . import sharing
from .engines import ENGINES, Engine, LocalPool
from .on_ray import RayEngine, is_asked_for
from .resources import Resources, gpus_here, local_slots, threads_asked
from .study import STUDY, Study, StudyRun
from .worker import Outcome

_TICK = 0.25
"""Seconds between two questions whether to stop."""


class StudyObserver:
    """Told of everything in a study as it happens. Each method does nothing: override those you want."""

    def study_started(self, study: Study, finished: frozenset[str]) -> None:
        """Runs are about to be started; those `finished` were so before."""

    def run_started(self, run: StudyRun, attempt: int) -> None:
        """A run's process was started, for the first time (1) or once more."""

    def run_ended(self, run: StudyRun, outcome: Outcome, again: bool) -> None:
        """A run's process has ended; `again` says that the run will be tried again."""

    def tick(self) -> None:
        """Some time has gone by, a second at most."""


def run_study(
    study: Study | None,
    out: str | os.PathLike[str],
    *,
    engine: str = "auto",
    workers: int | None = None,
    cpus_per_run: float | None = None,
    gpus_per_run: float | None = None,
    retries: int = 2,
    resume: bool = False,
    observer: StudyObserver | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> dict[str, str]:
    """Execute every run of a study, each in its directory `out`/NAME; returns why runs failed, by name: {} is success.

    Results are those of separate runs: on as many CPU threads, to the bit.

    Args:
        study: the runs. None, with `resume`: the study stored in `out`.
        out: the study's directory; on Ray one that all its machines share.
        engine: "local" (processes of this machine), "ray", or "auto": Ray where RAY_ADDRESS names a cluster.
        workers: runs at once. None: as many as fit.
        cpus_per_run: cores of each run, which has as many threads, one at least. None: what there is, shared equally;
            on Ray 1.
        gpus_per_run: GPUs of each run; 0.5 lets two share one. None: 1 where there are GPUs, or what there is for each
            of `workers`.
        retries: how often a run whose process fails is tried again from its checkpoint. A user's mistake is not tried
            again; neither ends the other runs.
        resume: continue the study stored in `out`; a `study` given with it must be that one.
        observer: told of everything as it happens. None: nobody.
        should_stop: where it is true, all runs save themselves and Interrupted is raised.

    Raises:
        UserError: nothing to resume, a directory in use, resources that are not there, Ray asked for and not installed;
            in one of torchrun's processes.
        Interrupted: `should_stop` said so; what was done is in `out`.
    """
    if engine not in ENGINES:
        raise UserError(f"--engine must be one of {', '.join(ENGINES)}, got {engine!r}")
    if retries < 0:
        raise UserError(f"--retries must be at least 0, got {retries}")
    if was_launched() and int(os.environ["WORLD_SIZE"]) > 1:
        raise UserError(
            "a sweep is not for torchrun, each of whose processes would start it: run it without (--workers says how "
            "many runs go on at once), or train one run in several processes"
        )
    directory = Path(out).absolute()
    asked = Resources(workers=workers, cpus_per_run=cpus_per_run, gpus_per_run=gpus_per_run)
    if not resume and study is None:
        raise UserError("without a study there must be one to resume: pass study=, or resume=True")
    with ExitStack() as stack:
        if resume:
            study = _reopened(study, directory, stack)
        else:
            assert study is not None
            _refuse_existing(directory)
        started = _engine(engine, directory, asked, study)
        stack.callback(started.close)
        if not resume:
            make_directories(directory)
            stack.enter_context(_Hold(directory))
            _refuse_existing(directory)
            study.save(directory)
        execution = _Execution(study, directory, started, retries, observer or StudyObserver())
        execution.run(should_stop or (lambda: False))
        return execution.failed


def finished(directory: Path, run: StudyRun) -> bool:
    """Whether a run is done, by what its directory holds. A damaged one is not: going on with it tells why."""
    try:
        found = RunDirectory(directory / run.name)
        done = len(found.results()["generations"])
        same = not any(config_differences(Config.from_dict(found.config()), run.config))
    except UserError:
        return False
    return same and done > run.config.generations


class _Hold:
    """The study's directory, held by one process at a time."""

    def __init__(self, directory: Path) -> None:
        self._lock = DirectoryLock(directory, "wait for it, or choose another --out")

    def __enter__(self) -> "_Hold":
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def _refuse_existing(directory: Path) -> None:
    if directory.exists() and not directory.is_dir():
        raise UserError(f"{directory} is not a directory: choose another --out")
    for file, what in ((STUDY, "study"), (CONFIG, "run")):
        if (directory / file).exists():
            remedy = "continue it with --resume, or choose" if what == "study" else "choose"
            raise UserError(f"{directory} holds a {what} already: {remedy} another --out")


def _reopened(asked: Study | None, directory: Path, stack: ExitStack) -> Study:
    stored = Study.load(directory)
    stack.enter_context(_Hold(directory))
    if asked is None:
        return stored
    stored.refuse_other(asked, directory)
    asked.save(directory)  # data may lie elsewhere now
    return asked


def _engine(name: str, directory: Path, asked: Resources, study: Study) -> Engine:
    wants_gpus = any(run.config.device != "cpu" for run in study.runs)
    if name == "ray" or (name == "auto" and is_asked_for()):
        return RayEngine(directory, asked, wants_gpus)
    slots = local_slots(asked, cores(), gpus_here() if wants_gpus else [], threads_asked())
    return LocalPool(directory, slots)


class _Execution:
    """What is left of a study, and how it goes."""

    def __init__(self, study: Study, directory: Path, engine: Engine, retries: int, observer: StudyObserver) -> None:
        self.failed: dict[str, str] = {}
        self._study, self._engine, self._retries, self._observer = study, engine, retries, observer
        self._directory = directory
        self._done = {run.name for run in study.runs if finished(directory, run)}
        for run in study.runs:  # of a teacher's run, what it is to put down for others is a part
            if run.name in self._done and self._pupils(run.name) - self._done:
                if sharing.is_due(directory, study, run.name):
                    self._done.remove(run.name)
            else:
                sharing.clear(directory, run.name)
        self._waiting = [run for run in study.runs if run.name not in self._done]
        self._attempts: Counter[str] = Counter()

    def run(self, should_stop: Callable[[], bool]) -> None:
        """Everything, or Interrupted once all that ran have saved themselves."""
        self._observer.study_started(self._study, frozenset(self._done))
        stopping = False
        while True:
            if not stopping and should_stop():
                stopping = True
                self._engine.ask_to_stop()
            if not stopping:
                self._start_ready()
            if not self._engine.running:
                break
            for name, outcome in self._engine.ended(_TICK):
                self._ended(self._study[name], outcome, stopping)
            self._observer.tick()
        if self._waiting:
            raise Interrupted

    def _start_ready(self) -> None:
        for run in list(self._waiting):
            if run.teacher in self.failed:
                self._waiting.remove(run)
                self._fail(run, Outcome(kind="mistake", text=f"not run, as its teacher's run, {run.teacher}, failed"))
            elif (run.teacher is None or run.teacher in self._done) and self._engine.has_room():
                self._waiting.remove(run)
                self._attempts[run.name] += 1
                try:
                    self._engine.start(run.name)
                except OSError as error:  # no more processes, memory or files: the others go on
                    self._ended(run, Outcome(kind="failed", text=f"could not be started: {error.strerror}"), False)
                    continue
                self._observer.run_started(run, self._attempts[run.name])

    def _ended(self, run: StudyRun, outcome: Outcome, stopping: bool) -> None:
        if outcome.kind == "done":
            self._done.add(run.name)
            self._observer.run_ended(run, outcome, False)
            self._clear(run)
        elif outcome.kind != "mistake" and (stopping or self._attempts[run.name] <= self._retries):
            self._waiting.insert(0, run)  # before those that were never begun
            self._observer.run_ended(run, outcome, True)
        else:
            self._fail(run, outcome)

    def _fail(self, run: StudyRun, outcome: Outcome) -> None:
        self.failed[run.name] = outcome.text or "stopped by a signal"
        self._observer.run_ended(run, outcome, False)
        self._clear(run)

    def _pupils(self, teacher: str) -> set[str]:
        return {run.name for run in self._study.runs if run.teacher == teacher}

    def _clear(self, ended: StudyRun) -> None:
        """What a teacher says is kept until the last of those that it is for."""
        if ended.teacher is not None and self._pupils(ended.teacher) <= self._done | set(self.failed):
            sharing.clear(self._directory, ended.teacher)
