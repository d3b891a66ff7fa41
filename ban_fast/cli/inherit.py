"""A command that takes the flags of another one too."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import typer


def with_flags_of(command: Callable[..., int], *, without: set[str]) -> Callable[[Callable[..., int]], Any]:
    """Declare a command with the flags of another one after its own; it finds their values in `ctx.params`."""

    def declare(function: Callable[..., int]) -> Any:
        own = inspect.signature(function)
        taken = [p for name, p in inspect.signature(command).parameters.items() if name not in {"ctx", *without}]
        context, *rest = own.parameters.values()

        @functools.wraps(function)
        def declared(ctx: typer.Context, **flags: Any) -> int:
            return function(ctx, **{p.name: flags[p.name] for p in rest})

        declared.__signature__ = own.replace(parameters=[context, *rest, *taken])  # type: ignore[attr-defined]
        declared.__annotations__ = {p.name: p.annotation for p in (context, *rest, *taken)}
        return declared

    return declare
