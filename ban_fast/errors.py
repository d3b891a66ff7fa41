"""Mistakes of a user, told in one line. The lowest floor: imports nothing of ours."""

import difflib
from collections.abc import Iterable

_MOST_NAMED = 20


class UserError(ValueError):
    """A mistake that its maker can mend: the message names what was given and the remedy, on one line."""


class OptionError(UserError):
    """A config field with a value that cannot be used.

    `field` is its dotted path in `Config` ("batch_size", "optimizer.lr"); the command line prints the flag instead.
    """

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field
        self.problem = problem

    def __reduce__(self) -> tuple[type["OptionError"], tuple[str, str]]:
        return type(self), (self.field, self.problem)  # pickled, it travels from one process to the others


def first_line(error: BaseException) -> str:
    """Of an error's message, or its type's name where there is none."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def suggest(name: str, valid: Iterable[str]) -> str:
    """The rest of a message on an unknown name: "; did you mean 'x'?" with the nearest valid one, else a list."""
    valid = list(valid)
    near = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    if near:
        return f"; did you mean {near[0]!r}?"
    more = f" and {len(valid) - _MOST_NAMED} more" if len(valid) > _MOST_NAMED else ""
    return f"; choose one of: {', '.join(valid[:_MOST_NAMED])}{more}"
