"""Some fields of a configuration set anew, by flags or in a sweep, and what then has no meaning left."""

from collections.abc import Iterable, Mapping
from typing import Any

from ..config import Config, ModelConfig, OptimizerConfig
from ..errors import OptionError

OPTIONS = "model.options."
"""Paths of the network's own arguments begin so."""

_DECAYING = ("step", "plateau")
_FIRST = ("model.name", "optimizer.schedule")
"""Set before all others: what they drop may be among those."""


def change(config: Config, values: Mapping[str, Any]) -> None:
    """Set fields by path ("optimizer.lr", "model.options.dropout"), in place.

    Another network has other options than the one before, and a schedule other than plateau has none of its settings.
    """
    for path in sorted(values, key=lambda path: path not in _FIRST):
        value = values[path]
        if path.startswith(OPTIONS):
            config.model.options = {**config.model.options, path.removeprefix(OPTIONS): value}
            continue
        if path == "model.name" and value != config.model.name:
            config.model = ModelConfig()
        if path == "optimizer.schedule" and value != "plateau":
            config.optimizer.plateau_threshold = OptimizerConfig.plateau_threshold
            config.optimizer.plateau_against = OptimizerConfig.plateau_against
        section, _, key = path.rpartition(".")
        setattr(getattr(config, section) if section else config, key, value)


def check_read(paths: Iterable[str], configs: Iterable[Config]) -> None:
    """OptionError for the first of these fields, which someone set, that none of the configurations reads.

    No part of `Config.validate`: a recipe leaves such values to whoever changes what reads them.
    """
    configs = list(configs)
    for path in sorted(paths):
        problems = [_unread(path, config) for config in configs]
        if problems and None not in problems:
            raise OptionError(path, f"{problems[0]}; leave it out")


def _unread(path: str, config: Config) -> str | None:
    """Why a configuration does not read a field, if so."""
    if path == "optimizer.lr_decay" and config.optimizer.schedule not in _DECAYING:
        return f"is for schedules {' and '.join(_DECAYING)}"
    asks_for_a_cache = path.startswith("teacher.cache_") or (path == "teacher.mode" and config.teacher.mode == "cache")
    if asks_for_a_cache and set(config.students or [config.objective.name]) == {"label"}:
        return "objective 'label' has no teacher"
    return None
