"""What a configuration's values must be: OptionErrors that name the option and what it got."""

import math
import types
import typing
from typing import Any

from .errors import OptionError, suggest

_KINDS = {
    int: "a whole number",
    float: "a number",
    str: "a string",
    bool: "true or false",
    dict[str, Any]: "an object",
    tuple[str, ...]: "a list of strings",
    tuple[float, ...]: "a list of numbers",
    type(None): "null",
}
"""Types of fields in the words of JSON."""


def of_type(name: str, value: Any, hint: Any) -> None:
    """A value of a field with that type hint; whole numbers are numbers too, and true is no number."""
    accepted: tuple[Any, ...] = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for kind in accepted:
        origin = typing.get_origin(kind) or kind
        if origin is float and isinstance(value, int) and not isinstance(value, bool):
            return
        if origin is int and isinstance(value, bool):
            continue
        if isinstance(value, origin):
            return
    wanted = " or ".join(_KINDS[kind] for kind in accepted)
    raise OptionError(name, f"must be {wanted}, got {value!r}")


def choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """One of `choices`."""
    if value not in choices:
        raise OptionError(name, f"unknown value {value!r}{suggest(value, choices)}")


def at_least(name: str, number: int | None, least: int) -> None:
    """`least` or more, or None."""
    if number is not None and number < least:
        raise OptionError(name, f"must be at least {least}, got {number}")


def finite(name: str, number: float | None, *, positive: bool) -> None:
    """A finite number that is not negative, or None; with `positive` not 0 either."""
    if number is not None and not (_is_finite(number) and (number > 0 or (number == 0 and not positive))):
        raise OptionError(name, f"must be a finite number {'above 0' if positive else 'of at least 0'}, got {number}")


def _is_finite(number: float) -> bool:
    """Whether it is one as floating-point numbers have them: JSON's whole numbers have no end."""
    try:
        return math.isfinite(number)
    except OverflowError:
        return False
