"""How a flag is declared to the command-line library: its looks in --help, and what its text becomes."""

from collections.abc import Callable
from typing import Any

import typer


def whole(text: str) -> int:
    """A whole number; BadParameter, which names the flag, for anything else."""
    try:
        return int(text)
    except ValueError:
        raise typer.BadParameter(f"must be a whole number, got {text!r}") from None


def real(text: str) -> float:
    """A number; BadParameter, which names the flag, for anything else."""
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(f"must be a number, got {text!r}") from None


def filled(text: str) -> str:
    """Not empty: an unset variable of a shell script would otherwise mean the current directory."""
    if not text:
        raise typer.BadParameter("must not be empty")
    return text


def flag(name: str, metavar: str, help: str, panel: str | None = None, parser: Callable[[str], Any] = filled) -> Any:
    """An option with a value, in a panel of the help: a metavar S stands for text, N a whole number, F a real one."""
    return typer.Option(name, metavar=metavar, help=help, rich_help_panel=panel, parser=parser, show_default=False)


def switch(name: str, help: str, panel: str) -> Any:
    """An option that is given or not."""
    return typer.Option(name, help=help, rich_help_panel=panel, show_default=False)
