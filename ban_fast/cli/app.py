"""The commands and their flags, as they are declared to the command-line library. What they do is in `commands`."""

from dataclasses import dataclass
from typing import Annotated, Any

import typer
from typer.core import TyperGroup
from typer.main import get_command

from .. import __version__
from ..errors import UserError, suggest
from .declare import filled, flag, whole
from .flags import Request
from .signals import Signals
from .sweep_flags import sweep
from .train_flags import train


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


app.command()(train)
app.command()(sweep)


def _run_directory(help: str) -> Any:
    return typer.Argument(metavar="RUN", help=help, parser=filled, show_default=False)


_DataDir = Annotated[
    str | None, flag("--data-dir", "DIR", "The dataset's directory, or its parent. Default: as the run had it.")
]


@app.command()
def evaluate(
    ctx: typer.Context,
    run: Annotated[str, _run_directory("Directory of a run.")],
    members: Annotated[str | None, flag("--members", "1,2", "Only these generations, and their ensemble.")] = None,
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
            parser=filled,
            show_default=False,
        ),
    ],
    data_dir: Annotated[
        str | None, flag("--data-dir", "DIR", "Where to put it. Default: $BAN_FAST_DATA, else ~/.cache/ban_fast.")
    ] = None,
    format: Annotated[
        str | None, flag("--format", "ffcv", "Also write FFCV's .beton files, for train --loader ffcv.")
    ] = None,
    image_size: Annotated[
        int | None,
        flag("--image-size", "S", "Side in pixels that a folder's images have in FFCV's files.", parser=whole),
    ] = None,
) -> int:
    """Download a dataset and check it against its published sum; what is there already is kept."""
    from . import commands

    return commands.prepare(ctx.obj, data, data_dir, format, image_size)


@app.command()
def report(
    ctx: typer.Context,
    run: Annotated[str, _run_directory("Directory of a run, or of a sweep.")],
    out: Annotated[str | None, flag("--out", "DIR", "Directory for the plots. Default: RUN/report.")] = None,
) -> int:
    """Print a run's table, draw error or perplexity by generation, curves and reliability as PNG; a study's table."""
    from . import commands

    return commands.report(ctx.obj, run, out)


@app.command()
def info(
    data_dir: Annotated[
        str | None,
        flag("--data-dir", "DIR", "Where to look for datasets. Default: $BAN_FAST_DATA, else ~/.cache/ban_fast."),
    ] = None,
) -> int:
    """Print versions, devices, and which backends, datasets and extras are there, or why not."""
    from . import commands

    return commands.info(data_dir)
