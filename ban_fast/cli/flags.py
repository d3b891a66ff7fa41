"""From flags to a `Config`: which configuration a run starts from, and what the flags given change in it."""

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import recipes
from ..config import FREE, Config
from ..errors import UserError, suggest
from ..recipes.changes import OPTIONS, change

# Every flag of `ban-fast train` that sets one field: the parameter's name -> the field's path in Config.
FIELDS = {
    "data": "data.name",
    "data_dir": "data.directory",
    "image_size": "data.image_size",
    "level": "text.level",
    "window": "text.window",
    "over_time": "text.over_time",
    "model": "model.name",
    "objective": "objective.name",
    "students": "students",
    "teacher": "teacher.mode",
    "cache_dtype": "teacher.cache_dtype",
    "cache_dir": "teacher.cache_directory",
    "cache_fill": "teacher.cache_fill",
    "fold_teacher": "teacher.fold",
    "kd_weight": "objective.kd_weight",
    "label_weight": "objective.label_weight",
    "generations": "generations",
    "epochs": "epochs",
    "batch_size": "batch_size",
    "micro_batch_size": "micro_batch_size",
    "sync_statistics": "sync_statistics",
    "lr": "optimizer.lr",
    "weight_decay": "optimizer.weight_decay",
    "temperature": "objective.temperature",
    "schedule": "optimizer.schedule",
    "lr_decay": "optimizer.lr_decay",
    "clip_norm": "optimizer.clip_norm",
    "seed": "seed",
    "device": "device",
    "amp": "amp",
    "step": "step",
    "compile": "compile",
    "val_fraction": "data.val_fraction",
    "limit_train": "data.limit_train",
    "limit_test": "data.limit_test",
    "loader": "data.loader",
    "max_steps": "max_steps",
}
_OTHER_FLAGS = {"recipe": "--recipe", "model.options": "--model-option"}
_FOLDERS = ("data.name", "data.directory", "teacher.cache_directory")
_BASES = {"digits": "demo", "cifar10": "cifar10", "cifar100": "cifar100", "ptb": "ptb-lstm"}

Values = Mapping[str, Any]
"""The flags of `ban-fast train` by parameter name; None and empty stand for not given."""


def flag_of(path: str) -> str | None:
    """The flag that sets a field ("optimizer.lr" -> "--lr"), or None where only a configuration file does."""
    if path in _OTHER_FLAGS:
        return _OTHER_FLAGS[path]
    return next(("--" + name.replace("_", "-") for name, known in FIELDS.items() if known == path), None)


@dataclass
class Request:
    """A configuration, and where its values came from."""

    config: Config
    file: Path | None = None
    """The configuration file it began as; None: a recipe."""
    given: set[str] = field(default_factory=set)
    """Paths of the fields that flags set; "recipe" for --recipe, which sets others."""

    def name_of(self, path: str) -> str:
        """What to call a field in a message: its flag, or its path and the file it was read from."""
        if self.file is not None and path not in self.given:
            return f"{path} in {self.file}"
        return flag_of(path) or path


def requested(values: Values) -> Request:
    """The configuration that the flags of a new run ask for. UserError for what no configuration can be."""
    if values["config"] is not None and values["recipe"] is not None:
        raise UserError("--config and --recipe each give a whole configuration; leave one of them out")
    if values["config"] is not None:
        file = Path(values["config"])
        return overridden(Request(read(file, "--config"), file), values)
    if values["recipe"] is not None:
        return overridden(Request(_recipe(values["recipe"]), given={"recipe"}), values)
    return overridden(Request(recipes.get(_base(values["data"] or "digits", values["data_dir"]))), values)


def _base(name: str, directory: str | None) -> str:
    """The recipe that data begin with; a folder's by what is in it."""
    if name in _BASES:
        return _BASES[name]
    from ..data import is_text  # torch comes with it: only who names a folder waits for it

    return "ptb-lstm" if is_text(name, directory) else "paper"


def resumed(values: Values, directory: Path) -> Request:
    """The configuration of the run in `directory`. UserError where a flag, recipe or file beside it says otherwise."""
    file = directory / "config.json"
    if not file.exists():
        raise UserError(
            f"--resume: there is no run in {directory} (no config.json); put it back, or start one without --resume"
        )
    stored = read(file, "--resume")
    if values["config"] is not None:
        asked = requested(values)
    else:
        asked = overridden(Request(read(file, "--resume"), file), values)
        if values["recipe"] is not None:
            asked.config.recipe = _recipe(values["recipe"]).recipe
            asked.given.add("recipe")
    for path, old, new in _differences(stored.as_computed(), asked.config.as_computed()):
        if path in FREE:
            continue
        raise UserError(
            f"{asked.name_of(path)} is {_show(new)}, but {_show(old)} in the run to resume, {directory}; "
            "leave it out, or start another run in another --out"
        )
    return Request(asked.config, file, asked.given)


def _recipe(name: str) -> Config:
    if name not in recipes.names():
        raise UserError(f"--recipe: unknown recipe {name!r}{suggest(name, recipes.names())}")
    return recipes.get(name)


def read(file: Path, option: str) -> Config:
    """The configuration in a config.json that `option` names. UserError where it can't be read, or isn't one."""
    if file.is_dir():
        raise UserError(f"{option}: {file} is a directory; name its config.json")
    try:
        return Config.from_dict(json.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise UserError(f"{option}: there is no file {file}; name the config.json of a run") from None
    except OSError as error:
        raise UserError(f"{option}: cannot read {file}: {error.strerror}") from None
    except UserError as error:
        raise UserError(f"{option}: {file}: {error}") from None
    except (ValueError, RecursionError) as error:  # not JSON, or not text
        raise UserError(f"{option}: {file} is not a configuration in JSON, or is cut short: {error}") from None


def overridden(request: Request, values: Values) -> Request:
    """`request` with every flag given put into its configuration."""
    if values["objective"] is not None and values["students"] is not None:
        raise UserError("--objective and --students each say what students learn from; leave one of them out")
    if values["objective"] is not None and request.config.students:
        request.config = request.config.of_student(values["objective"])  # one line of a file's several
    config = request.config
    if values["objective"] not in (None, config.objective.name):
        config.objective.kd_weight = config.objective.label_weight = None
    changes = {path: _value(path, values[name]) for name, path in FIELDS.items() if values[name] is not None}
    request.given |= set(changes)
    for key, value in map(_option, values["model_option"] or []):
        changes[OPTIONS + key] = value
        request.given.add("model.options")
    change(config, changes)
    return request


def _value(path: str, value: Any) -> Any:
    if path == "students":
        return tuple(value.split(","))
    return absolute(path, value) if path in _FOLDERS else value


def absolute(path: str, value: str) -> str:
    """Folders are recorded with their whole path: the run may be resumed, or repeated, from another place."""
    folder = Path(value).expanduser()
    if path == "data.name" and (value in _BASES or not folder.is_dir()):
        return value
    return str(folder.absolute())


def _option(text: str) -> tuple[str, int | float | bool | str]:
    key, equals, value = text.partition("=")
    if not equals or not key.isidentifier():
        raise UserError(f"--model-option must be KEY=VALUE, memory=shared for example, got {text!r}")
    if value.lower() in ("true", "false"):
        return key, value.lower() == "true"
    if re.fullmatch(r"[+-]?[0-9]+", value):
        return key, int(value)
    if re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?", value):
        return key, float(value)
    return key, value


def _differences(old: Any, new: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    for f in dataclasses.fields(old):
        before, after = getattr(old, f.name), getattr(new, f.name)
        if dataclasses.is_dataclass(before):
            yield from _differences(before, after, f"{prefix}{f.name}.")
        elif before != after:
            yield prefix + f.name, before, after


def _show(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{k}={v}" for k, v in value.items()) or "none"
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "not set"
    return "not set" if value is None else str(value)
