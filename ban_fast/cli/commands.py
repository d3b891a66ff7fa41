"""What each command does: build, call, print. Each returns its exit status."""

import os
import re
import shlex
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from ..config import STUDENT_FOLDERS, Config
from ..errors import UserError
from ..recipes.changes import check_read
from . import flags, ranks
from .app import Session
from .signals import Stopped


def train(session: Session, values: flags.Values) -> int:
    """`ban-fast train`; `values` are its flags by parameter name, None or empty where not given."""
    signals = session.signals
    resume = values["resume"]
    if resume and values["out"] is None:
        raise UserError("--resume needs --out DIR, the directory of the run to continue")
    session.request = flags.resumed(values, Path(values["out"])) if resume else flags.requested(values)
    session.request.config.validate()
    if not resume:
        check_read(session.request.given, [session.request.config])
    out, is_restarted = ranks.settled(
        Path(values["out"]) if values["out"] is not None else new_directory(session.request.config.recipe)
    )
    if is_restarted and not resume:
        resume, session.request = True, flags.resumed(values, out)
    config = session.request.config
    signals.remark = " before training began"
    find_own_modules()
    from .. import training
    from ..evaluation import RunDirectory
    from ..report import table
    from .progress import narrator

    again = f"continue with `ban-fast train --out {shlex.quote(str(out))} --resume`"
    with narrator(signals, again) as watching:
        try:
            train_all = training.run_together if config.students else training.run
            train_all(config, out=out, resume=resume, observer=watching, should_stop=signals.requested)
        except training.RankLost as error:
            where = again if (out / "config.json").exists() else "start it again"
            raise training.RankLost(f"{error}; the last checkpoint stands: {where}") from error
        except training.Interrupted:
            signals.follow()
            signals.remark = f" at generation {watching.generation}, step {watching.done:,}: saved; {again}"
            raise Stopped from None
    signals.answer, signals.remark = "raise", " after training had ended"
    if not ranks.is_first():
        return 0
    for run in _runs(out, config):
        print_content(table(RunDirectory(run)))
    print(f"plots: ban-fast report {shlex.quote(str(out))}")
    return 0


def evaluate(session: Session, run: str, members: str | None, data_dir: str | None) -> int:
    """`ban-fast evaluate`."""
    chosen = None if members is None else _members(members)
    find_own_modules()
    from .. import training
    from ..evaluation import RunDirectory
    from ..report import table

    session.signals.answer = "raise"
    directory = RunDirectory(run)
    for path in _runs(directory.path, flags.read(directory.path / "config.json", "RUN")):
        figures = training.evaluate_run(path, members=chosen, data_dir=data_dir)
        print_content(table(RunDirectory(path), figures))
    return 0


def report(session: Session, run: str, out: str | None) -> int:
    """`ban-fast report`."""
    import matplotlib.figure  # noqa: F401  before signals may interrupt an import

    from .. import studies
    from ..evaluation import RunDirectory
    from ..report import plots, table

    session.signals.answer = "raise"
    if (Path(run) / studies.STUDY).exists():
        if out is not None:
            raise UserError(f"--out: {run} is a study, which has a table and no plots; report one of its runs")
        print_content(studies.table(run))
        return 0
    directory = RunDirectory(run)
    config = flags.read(directory.path / "config.json", "RUN")
    for path in _runs(directory.path, config):
        below = path.relative_to(directory.path)  # "." for a run by itself
        print_content(table(RunDirectory(path)))
        for plot in plots(RunDirectory(path), path / "report" if out is None else Path(out) / below):
            print(plot)
    return 0


def prepare(session: Session, data: str, data_dir: str | None, format: str | None, image_size: int | None) -> int:
    """`ban-fast prepare`."""
    if format not in (None, "ffcv"):
        raise UserError(f"--format must be ffcv, got {format!r}; without it the dataset is left as it is published")
    if format is None and image_size is not None:
        raise UserError("--image-size is for FFCV's files: add --format ffcv")
    from .. import data as datasets

    session.signals.answer = "raise"
    bar, progress = _download_bar()
    with bar:
        if format is None:
            places = [datasets.prepare(data, data_dir, progress=progress)]
        else:
            places = datasets.prepare_ffcv(data, data_dir, image_size=image_size, progress=progress)
    print(f"{data} is ready: {' and '.join(map(str, places))}")
    return 0


def info(data_dir: str | None) -> int:
    """`ban-fast info`."""
    from .info import lines

    for line in lines(data_dir):
        print(line)
    return 0


def _runs(path: Path, config: Config) -> list[Path]:
    """The run in a directory, or those of the students that were trained side by side below it."""
    return [path / STUDENT_FOLDERS[name] for name in config.students] or [path]


def find_own_modules() -> None:
    """Let `--model module:factory` name a file of the current directory. Last in line, so that it hides no other."""
    sys.path.append(os.getcwd())


def new_directory(recipe: str) -> Path:
    """runs/RECIPE-DATE-TIME; with a number after it where a run of the same second has the name."""
    word = re.sub(r"[^\w.+-]", "_", recipe).lstrip(".")  # a file's recipe can be any text, a path too
    base = Path("runs") / (word + time.strftime("-%Y%m%d-%H%M%S"))
    path, number = base, 2
    while path.exists():
        path, number = base.with_name(f"{base.name}-{number}"), number + 1
    return path


def _members(text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise UserError(f"--members must be generations with commas between, 1,2 for example, got {text!r}") from None


def print_content(content: Any) -> None:
    """On a terminal as wide as it is, or 80 columns, or figures would be cut; 120 columns where it goes to a file."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    console.width = max(console.width, 80)
    with console.capture() as capture:
        console.print(content)
    sys.stdout.write(capture.get())  # rich would end the process at a broken pipe


def _download_bar() -> tuple[AbstractContextManager[Any], Any]:
    """A progress bar and the function that moves it; nothing where nobody watches."""
    if not sys.stderr.isatty():
        return nullcontext(), None
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    bar = Progress(*columns, console=Console(file=sys.stderr), transient=True)
    task = bar.add_task("", total=None)
    return bar, lambda done, total: bar.update(task, completed=done, total=total)
