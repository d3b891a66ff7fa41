"""The commands and their flags, as they are declared to the command-line library. What they do is in `commands`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from typer.core import TyperGroup
from typer.main import get_command

from .. import __version__
from ..config import (
    AMP_MODES,
    CACHE_DTYPES,
    CACHE_FILLS,
    DEVICES,
    FOLDS,
    LEVELS,
    LOADERS,
    OBJECTIVES,
    OVER_TIME,
    SCHEDULES,
    STEPS,
    TEACHERS,
)
from ..errors import UserError, suggest
from .flags import Request
from .inherit import with_flags_of
from .signals import Signals


@dataclass
class Session:
    """What one call of the command carries along."""

    signals: Signals
    request: Request | None = None
    """The configuration asked for, once it is known: it knows which flag a field came from."""


class _Group(TyperGroup):
    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and not args[0].startswith("-") and args[0] not in self.commands:
            raise UserError(f"unknown command {args[0]!r}{suggest(args[0], self.commands)}")
        return super().resolve_command(ctx, args)


app = typer.Typer(cls=_Group, add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)


def command() -> Any:
    """The command as an object of the command-line library, to be run with `main(args=..., obj=Session(...))`."""
    return get_command(app)


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise typer.BadParameter(f"must be a whole number, got {text!r}") from None


def _real(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(f"must be a number, got {text!r}") from None


def _text(text: str) -> str:
    """Not empty: an unset variable of a shell script would otherwise mean the current directory."""
    if not text:
        raise typer.BadParameter("must not be empty")
    return text


def _flag(flag: str, metavar: str, help: str, panel: str | None = None, parser: Callable[[str], Any] = _text) -> Any:
    return typer.Option(flag, metavar=metavar, help=help, rich_help_panel=panel, parser=parser, show_default=False)


def _switch(flag: str, help: str, panel: str) -> Any:
    return typer.Option(flag, help=help, rich_help_panel=panel, show_default=False)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"ban-fast {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _main(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Born-again networks: a teacher, students of its own kind taught one by the other, and their vote.

    [bold]ban-fast train[/bold] alone grows a teacher and three students on handwritten digits, in about a minute.
    """
    if ctx.invoked_subcommand is None:
        print(ctx.get_help(), end="")


_SWEEP, _RUN, _IMAGES, _TEXTS = "Sweep", "Run", "Images", "Texts"
_NETWORKS, _TRAINING, _MACHINE = "Networks and teaching", "Training", "Machine"

# Option types by their looks in --help: S takes text, N a whole number, F a real one.


@app.command()
def train(
    ctx: typer.Context,
    recipe: Annotated[
        str | None,
        _flag(
            "--recipe",
            "R",
            "Settings to begin with: demo, cifar10, cifar100, paper, ptb-lstm, ptb-cnn-lstm, ptb-small. Default: by "
            "--data.",
            _RUN,
        ),
    ] = None,
    config: Annotated[
        str | None, _flag("--config", "FILE", "Begin with a run's config.json instead: repeats that run.", _RUN)
    ] = None,
    out: Annotated[
        str | None, _flag("--out", "DIR", "Directory to write the run to. Default: runs/RECIPE-DATE-TIME.", _RUN)
    ] = None,
    resume: Annotated[
        bool, _switch("--resume", "Continue the run in --out where it was stopped, to the same bits.", _RUN)
    ] = False,
    seed: Annotated[
        int | None, _flag("--seed", "N", "Every random draw of the run derives from it.", _RUN, _whole)
    ] = None,
    data: Annotated[
        str | None,
        _flag(
            "--data",
            "NAME|DIR",
            "digits, cifar10, cifar100, or a folder of train/CLASS/* and test/CLASS/*; ptb, or a folder with "
            "train.txt, valid.txt and test.txt.",
            _RUN,
        ),
    ] = None,
    data_dir: Annotated[
        str | None,
        _flag(
            "--data-dir",
            "DIR",
            "The dataset's directory, or its parent. Default: $BAN_FAST_DATA, else ~/.cache/ban_fast.",
            _RUN,
        ),
    ] = None,
    image_size: Annotated[
        int | None, _flag("--image-size", "S", "Side in pixels that a folder's images are resized to.", _IMAGES, _whole)
    ] = None,
    val_fraction: Annotated[
        float | None,
        _flag("--val-fraction", "F", "Share of the training images held out to validate on.", _IMAGES, _real),
    ] = None,
    limit_train: Annotated[
        int | None, _flag("--limit-train", "N", "Use only N training images.", _IMAGES, _whole)
    ] = None,
    limit_test: Annotated[int | None, _flag("--limit-test", "N", "Use only N test images.", _IMAGES, _whole)] = None,
    loader: Annotated[
        str | None,
        _flag(
            "--loader",
            "|".join(LOADERS),
            "Keep images in memory (the default), read their files batch by batch, or FFCV's (see prepare): the same "
            "batches, bit for bit.",
            _IMAGES,
        ),
    ] = None,
    level: Annotated[
        str | None, _flag("--level", "|".join(LEVELS), "What is predicted. Default: the next word.", _TEXTS)
    ] = None,
    window: Annotated[
        int | None, _flag("--window", "N", "Places of the text in a step: how far gradients go back.", _TEXTS, _whole)
    ] = None,
    over_time: Annotated[
        str | None,
        _flag(
            "--over-time",
            "|".join(OVER_TIME),
            "How the losses of a window's places become its own; sum, the default, is the paper's scale of --lr.",
            _TEXTS,
        ),
    ] = None,
    model: Annotated[
        str | None,
        _flag(
            "--model",
            "M",
            "Network of every generation: wrn-28-1, densenet-90-60, lstm-1500, timm:NAME, package.module:factory, ...",
            _NETWORKS,
        ),
    ] = None,
    model_option: Annotated[
        list[str] | None,
        _flag(
            "--model-option",
            "KEY=VALUE",
            "Argument of that network, memory=checkpoint for example; repeatable.",
            _NETWORKS,
        ),
    ] = None,
    objective: Annotated[
        str | None, _flag("--objective", "O", f"What students learn from: {', '.join(OBJECTIVES)}.", _NETWORKS)
    ] = None,
    students: Annotated[
        str | None,
        _flag(
            "--students",
            "O,O,...",
            "Instead of one: a student for each of these objectives, side by side on one teacher, in DIR/O "
            "(ban+l in DIR/ban_l).",
            _NETWORKS,
        ),
    ] = None,
    kd_weight: Annotated[
        float | None, _flag("--kd-weight", "F", "Weight of the teacher's outputs. Default: 1.", _NETWORKS, _real)
    ] = None,
    label_weight: Annotated[
        float | None,
        _flag("--label-weight", "F", "Weight of the labels. Default: 1 for ban+l, else 0.", _NETWORKS, _real),
    ] = None,
    temperature: Annotated[
        float | None, _flag("--temperature", "F", "Temperature of both softmaxes. Default: 1.", _NETWORKS, _real)
    ] = None,
    generations: Annotated[
        int | None,
        _flag("--generations", "N", "Students after the teacher; 0 trains the teacher alone.", _NETWORKS, _whole),
    ] = None,
    teacher: Annotated[
        str | None,
        _flag(
            "--teacher",
            "|".join(TEACHERS),
            "Ask the teacher for each batch, or keep its outputs for each view of an image. Default: auto, by what "
            "that saves, the same bits either way.",
            _NETWORKS,
        ),
    ] = None,
    cache_dtype: Annotated[
        str | None,
        _flag("--cache-dtype", "|".join(CACHE_DTYPES), "Of outputs kept; fp32, the default, is exact.", _NETWORKS),
    ] = None,
    cache_dir: Annotated[
        str | None,
        _flag(
            "--cache-dir",
            "DIR",
            "Keep outputs there, for other runs too. Default: in the run, until its student is trained.",
            _NETWORKS,
        ),
    ] = None,
    cache_fill: Annotated[
        str | None,
        _flag(
            "--cache-fill",
            "|".join(CACHE_FILLS),
            "Compute outputs when a view is first shown, or all before training. Default: lazy; the same bits.",
            _NETWORKS,
        ),
    ] = None,
    fold_teacher: Annotated[
        str | None,
        _flag(
            "--fold-teacher",
            "|".join(FOLDS),
            "Fold its batch norms: the same but for rounding. Default: auto, on a GPU.",
            _NETWORKS,
        ),
    ] = None,
    epochs: Annotated[
        int | None, _flag("--epochs", "N", "Passes over the training data, for each generation.", _TRAINING, _whole)
    ] = None,
    max_steps: Annotated[
        int | None, _flag("--max-steps", "N", "Stop each generation after N optimizer steps.", _TRAINING, _whole)
    ] = None,
    batch_size: Annotated[
        int | None, _flag("--batch-size", "N", "Images, or streams of a text, a step.", _TRAINING, _whole)
    ] = None,
    micro_batch_size: Annotated[
        int | None,
        _flag(
            "--micro-batch-size",
            "N",
            "Images at a time through the network, where a batch needs too much memory; gradients add up.",
            _TRAINING,
            _whole,
        ),
    ] = None,
    sync_statistics: Annotated[
        bool | None,
        _switch(
            "--sync-statistics/--no-sync-statistics",
            "Under torchrun: batch norm by the statistics of whole batches, not of each process's share.",
            _TRAINING,
        ),
    ] = None,
    lr: Annotated[float | None, _flag("--lr", "F", "Peak learning rate.", _TRAINING, _real)] = None,
    weight_decay: Annotated[
        float | None, _flag("--weight-decay", "F", "L2 penalty on every parameter.", _TRAINING, _real)
    ] = None,
    schedule: Annotated[
        str | None, _flag("--schedule", "S", f"Learning-rate schedule: {', '.join(SCHEDULES)}.", _TRAINING)
    ] = None,
    lr_decay: Annotated[
        float | None, _flag("--lr-decay", "F", "Factor of schedules step and plateau.", _TRAINING, _real)
    ] = None,
    clip_norm: Annotated[
        float | None, _flag("--clip-norm", "F", "Scale gradients down to this norm, all together.", _TRAINING, _real)
    ] = None,
    device: Annotated[str | None, _flag("--device", "|".join(DEVICES), "Where to train.", _MACHINE)] = None,
    amp: Annotated[str | None, _flag("--amp", "|".join(AMP_MODES), "Mixed precision.", _MACHINE)] = None,
    step: Annotated[
        str | None,
        _flag(
            "--step",
            "|".join(STEPS),
            "Make each step operation by operation, through torch.compile, or as one CUDA graph. Default: auto, a "
            "graph where all of a step can be recorded.",
            _MACHINE,
        ),
    ] = None,
    compile: Annotated[bool | None, _switch("--compile/--no-compile", "The same as --step compile.", _MACHINE)] = None,
) -> int:
    """Train a teacher, then students of the same architecture, each on the outputs of the one before.

    Without flags: a teacher and three students on the bundled digits.
    """
    from . import commands

    return commands.train(ctx.obj, ctx.params)


_SWEEP = "Sweep"


@app.command()
@with_flags_of(train, without={"seed", "students", "out", "resume"})
def sweep(
    ctx: typer.Context,
    seeds: Annotated[
        str | None, _flag("--seeds", "N,N,...", "A run for each of these seeds; 0-4 stands for 0,1,2,3,4.", _SWEEP)
    ] = None,
    vary: Annotated[
        list[str] | None,
        _flag(
            "--vary",
            "KEY=V,V,...",
            "A run for each of these values of a flag of train (objective=ban,ban+l) or a configuration key "
            "(optimizer.momentum=0,0.9); repeatable: every combination.",
            _SWEEP,
        ),
    ] = None,
    paper: Annotated[
        int | None,
        _flag("--paper", "1|2|3|6", "Instead, the runs of that table of the paper; weeks of a GPU.", _SWEEP, _whole),
    ] = None,
    out: Annotated[
        str | None,
        _flag("--out", "DIR", "Directory of the study, each run in DIR/NAME. Default: runs/sweep-...", _SWEEP),
    ] = None,
    resume: Annotated[
        bool, _switch("--resume", "Do what is left of the study in --out; its flags may be left out.", _SWEEP)
    ] = False,
    engine: Annotated[
        str | None,
        _flag(
            "--engine",
            "auto|local|ray",
            "Processes of this machine, or Ray's cluster, whose machines must share --out. Default: Ray if RAY_ADDRESS "
            "is set.",
            _SWEEP,
        ),
    ] = None,
    workers: Annotated[
        int | None,
        _flag("--workers", "N", "Runs at once. Default: one for each GPU, or core.", _SWEEP, _whole),
    ] = None,
    cpus_per_run: Annotated[
        float | None,
        _flag("--cpus-per-run", "F", "Cores, and so threads, of each. Default: an equal share.", _SWEEP, _real),
    ] = None,
    gpus_per_run: Annotated[
        float | None, _flag("--gpus-per-run", "F", "GPUs of each; 0.5 lets two runs share one.", _SWEEP, _real)
    ] = None,
    retries: Annotated[
        int | None,
        _flag("--retries", "N", "Times that a run is tried again from its checkpoint. Default: 2.", _SWEEP, _whole),
    ] = None,
) -> int:
    """Train many runs: seeds, objectives, networks, or whatever is varied; all other flags are those of train.

    Runs that would train the same teacher share one. A table of means and standard deviations over seeds ends it.
    """
    from .sweep import sweep as execute

    return execute(ctx.obj, ctx.params)


_Run = Annotated[
    str, typer.Argument(metavar="RUN", help="Directory of a run, or a sweep.", parser=_text, show_default=False)
]
_DataDir = Annotated[
    str | None, _flag("--data-dir", "DIR", "The dataset's directory, or its parent. Default: as the run had it.")
]


@app.command()
def evaluate(
    ctx: typer.Context,
    run: _Run,
    members: Annotated[str | None, _flag("--members", "1,2", "Only these generations, and their ensemble.")] = None,
    data_dir: _DataDir = None,
) -> int:
    """Compute the figures of a run's results.json anew, from its saved networks."""
    from . import commands

    return commands.evaluate(ctx.obj, run, members, data_dir)


@app.command()
def prepare(
    ctx: typer.Context,
    data: Annotated[
        str,
        typer.Argument(
            metavar="DATA",
            help="digits, cifar10, cifar100 or ptb; for FFCV also a folder of images.",
            parser=_text,
            show_default=False,
        ),
    ],
    data_dir: Annotated[
        str | None, _flag("--data-dir", "DIR", "Where to put it. Default: $BAN_FAST_DATA, else ~/.cache/ban_fast.")
    ] = None,
    format: Annotated[
        str | None, _flag("--format", "ffcv", "Also write FFCV's .beton files, for train --loader ffcv.")
    ] = None,
    image_size: Annotated[
        int | None,
        _flag("--image-size", "S", "Side in pixels that a folder's images have in FFCV's files.", parser=_whole),
    ] = None,
) -> int:
    """Download a dataset and check it against its published sum; what is there already is kept."""
    from . import commands

    return commands.prepare(ctx.obj, data, data_dir, format, image_size)


@app.command()
def report(
    ctx: typer.Context,
    run: _Run,
    out: Annotated[str | None, _flag("--out", "DIR", "Directory for the plots. Default: RUN/report.")] = None,
) -> int:
    """Print a run's table, draw error or perplexity by generation, curves and reliability as PNG; a study's table."""
    from . import commands

    return commands.report(ctx.obj, run, out)


@app.command()
def info(
    ctx: typer.Context,
    data_dir: Annotated[
        str | None,
        _flag("--data-dir", "DIR", "Where to look for datasets. Default: $BAN_FAST_DATA, else ~/.cache/ban_fast."),
    ] = None,
) -> int:
    """Print versions, devices, and which backends, datasets and extras are there, or why not."""
    from . import commands

    return commands.info(ctx.obj, data_dir)
