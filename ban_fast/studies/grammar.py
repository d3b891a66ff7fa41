"""What can be varied, and how it is written: configuration keys, lists of values, every combination of them."""

import copy
import dataclasses
import functools
import itertools
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from ..config import OBJECTIVES, Config
from ..errors import UserError, suggest
from ..recipes.changes import OPTIONS, change


@functools.cache
def known_keys() -> dict[str, tuple[type, ...]]:
    """Every configuration key that takes one value, by its dotted name ("optimizer.lr"), with the types it takes."""
    return dict(_keys(Config, ""))


def _keys(section: Any, prefix: str) -> Iterator[tuple[str, tuple[type, ...]]]:
    hints = typing.get_type_hints(section)
    for field in dataclasses.fields(section):
        hint = hints[field.name]
        kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            yield from _keys(hint, f"{prefix}{field.name}.")
        elif all(kind in (bool, int, float, str, types.NoneType) for kind in kinds):
            yield prefix + field.name, kinds


def label(path: str) -> str:
    """What a key is called in names and tables: "optimizer.lr" is "lr", "model.name" is "model"."""
    section, _, last = path.rpartition(".")
    return section if last in ("name", "mode") and section else last


def written(value: Any) -> str:
    """A value in a name or a table; of a path its last part."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return PurePath(value).name if isinstance(value, str) and "/" in value else str(value)


def parsed(path: str, texts: Sequence[str], name: str) -> list[Any]:
    """The values of a key, of its type, as they were written; `name` is what a message calls it.

    UserError for a key that can't be varied, no value, one that is no value of it, and the same one twice.
    """
    check_key(path)
    values = [_value(path, text.strip(), name) for text in texts]
    for number, value in enumerate(values):
        if value in values[:number]:
            raise UserError(f"{name}: {texts[number].strip()} is given twice; leave one of them out")
    return values


def is_key(path: str) -> bool:
    """Whether a value can be set there; the network's own arguments are known to the network alone."""
    return path in known_keys() or (path.startswith(OPTIONS) and path.removeprefix(OPTIONS).isidentifier())


def check_key(path: str) -> None:
    """UserError unless a value can be set there, with the nearest key where one can."""
    if not is_key(path):
        raise UserError(f"unknown configuration key {path!r}{suggest(path, known_keys())}")


def _value(path: str, text: str, name: str) -> Any:
    kinds = known_keys().get(path)
    if not text:
        raise UserError(f"{name}: a value is missing; write them with commas between, {label(path)}=A,B for example")
    if kinds is None:
        return _guessed(text)
    if types.NoneType in kinds and text.lower() == "none":
        return None
    if str in kinds:
        return text
    value = _guessed(text)
    if (bool in kinds) != isinstance(value, bool) or not isinstance(value, (*kinds, *[int] * (float in kinds))):
        wanted = "true or false" if bool in kinds else "a number" if float in kinds else "a whole number"
        raise UserError(f"{name}: must be {wanted}, got {text!r}")
    return float(value) if float in kinds else value


def _guessed(text: str) -> bool | int | float | str:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if re.fullmatch(r"[+-]?[0-9]+", text):
        return int(text)
    if re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?", text):
        return float(text)
    return text


def combinations(axes: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    """Every way to choose one value for each key, the last key's changing fastest."""
    for values in itertools.product(*axes.values()):
        yield dict(zip(axes, values, strict=True))


def configured(base: Config, chosen: Mapping[str, Any], objectives: Sequence[str] = ()) -> Config:
    """`base` with the chosen values in it, validated. Where `objectives` are varied, settings that the chosen one has
    not are left out; one that none of them has is an OptionError, as everything that no run could use."""
    config = copy.deepcopy(base)
    if "objective.name" in chosen:
        if set(objectives) <= set(OBJECTIVES):
            config.students = tuple(objectives)
            config.validate()
        config = config.of_student(chosen["objective.name"])
    for path in chosen:
        check_key(path)
    change(config, chosen)
    config.validate()
    return config
