"""Every way a command can fail, as one line and an exit status: 2 for a user's mistake, 1 for a failure of ours."""

import errno
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import typer

from ..errors import OptionError, UserError, suggest
from .flags import Request, flag_of
from .quiet import one_line

# Typer carries its own copy of click, older ones import it: BadParameter's base is the usage error of either.
UsageError: type[Exception] = typer.BadParameter.__mro__[1]

_LONGEST = 800
"""Letters of a line: timm alone has 25,000 letters of names to choose from."""
_SECONDS_FOR_THE_CAUSE = 1.0
_LEAVE_OUT = "leave it out"
_TOO_LARGE = "DefaultCPUAllocator: can't allocate memory", "Storage size calculation overflowed"
"""What torch's RuntimeErrors say of more memory than there is, and than there could be."""
_PACKAGE = Path(__file__).resolve().parent.parent
_CALLERS_OF_NETWORKS = Path("training/reader.py"), Path("training/evaluator.py")
_BUILDING = {(_PACKAGE / "models/registry.py", "create"), (_PACKAGE / "training/task.py", "placed")}
"""Functions in which networks are made."""
_REMEDIES = {
    errno.ENOSPC: "free some space, or choose another place",
    errno.EDQUOT: "free some space, or choose another place",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f)",
    errno.EROFS: "choose another place",
    errno.EACCES: "choose another place, or change its permissions",
    errno.EPERM: "choose another place, or change its permissions",
    errno.EEXIST: "choose another name",
    errno.ENOTDIR: "a part of this path is a file; choose another place",
    errno.EISDIR: "name a file, not a directory",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOENT: "check the path",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
}


def explain(error: BaseException, request: Request | None) -> tuple[str, int]:
    """The line, without "ban-fast: ", and the exit status. `request` knows what set a field of the configuration."""
    line, status = _explain(error, request)
    line = one_line(line)
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]} ...", status


def _explain(error: BaseException, request: Request | None) -> tuple[str, int]:
    if isinstance(error, OptionError):
        return _of_option(error, request), 2
    if isinstance(error, UserError):
        return _named(error, request), 2
    if isinstance(error, UsageError):
        return _usage(error), 2
    if isinstance(error, OSError) and error.errno in _REMEDIES:
        place = f"{error.filename}: " if error.filename is not None else ""
        return f"{place}{error.strerror}; {_REMEDIES[error.errno]}", 2
    if _is_loss_of_a_rank(error):
        time.sleep(_SECONDS_FOR_THE_CAUSE)  # whoever ended for a reason says that
        return str(error), 1
    if _out_of_memory(error):
        if request is not None and _is_of_building(error):
            name = f"{request.name_of('model.name')}: {request.config.model.name}"
            return f"{name} is too large for the memory that there is; choose a smaller one", 2
        return f"out of memory; a smaller --batch-size needs less{_less_of_a_densenet(request)}", 2
    detail = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    if request is not None and _is_of_a_factory(error, request.config.model.name):
        name = f"{request.name_of('model.name')}: {request.config.model.name}"
        return f"{name} fails with {detail}; mend it, BAN_FAST_DEBUG=1 shows the traceback", 2
    return f"internal error: {detail}{_place(error)}; BAN_FAST_DEBUG=1 shows the traceback", 1


def _of_option(error: OptionError, request: Request | None) -> str:
    """The problem of a field by its flag; what only --recipe set is left out with that."""
    problem = error.problem
    if request is None:
        name = flag_of(error.field) or error.field
    else:
        name = request.name_of(error.field)
        is_of_a_recipe = request.file is None and "recipe" in request.given and error.field not in request.given
        if is_of_a_recipe and problem.endswith(_LEAVE_OUT):
            between = " " if problem.startswith("is ") else ": "
            cause = f"{error.field}{between}{problem.removesuffix(_LEAVE_OUT)}"
            return f"--recipe {request.config.recipe}: {cause}leave --recipe out, or name another"
    return f"{name}{' ' if problem.startswith('must be ') else ': '}{problem}"


def _less_of_a_densenet(request: Request | None) -> str:
    """The rest of the remedy, where the network is one of ours that can do with less."""
    model = None if request is None else request.config.model
    can_share = model is not None and model.name.startswith("densenet-") and model.options.get("memory") != "shared"
    return ", so does --model-option memory=shared" if can_share else ""


def _is_of_a_factory(error: BaseException, name: str) -> bool:
    """Whether code that `--model module:factory` names raised it, called to build a network, or as one."""
    frames = traceback.extract_tb(error.__traceback__)
    if not frames or Path(frames[-1].filename).is_relative_to(_PACKAGE):
        return False
    passed = [file for file, _ in _own_frames(error)]
    if passed and passed[-1] == Path("models/external.py"):
        return True
    if not any(caller in passed for caller in _CALLERS_OF_NETWORKS):
        return False
    from ..models import reads  # torch comes with it, and is there where networks are called

    return reads(name) is None


def _named(error: UserError, request: Request | None) -> str:
    """The message, with a remedy for the disk's own, and the option that chose the network or data if they complain."""
    text, frame = str(error), _last_frame(error)
    if isinstance(error.__cause__, OSError) and error.__cause__.errno in _REMEDIES and ";" not in text:
        return f"{text}; {_REMEDIES[error.__cause__.errno]}"
    if request is None or frame is None or "--" in text:
        return text
    field = {"models": "model.name", "data": "data.name"}.get(frame[0].parts[0])
    if field == "model.name" and any(option in text for option in request.config.model.options):
        field = "model.options"
    return text if field is None else f"{request.name_of(field)}: {text}"


def _usage(error: Any) -> str:
    """A usage error of the command-line library: what was wrong, and the nearest thing that is right."""
    context = error.ctx
    see = f"see `{context.command_path if context is not None else 'ban-fast'} --help`"
    param = getattr(error, "param", None)
    if param is not None and param.param_type_name == "option":
        return f"{max(param.opts, key=len)} {error.message}"
    if param is not None:
        return f"{param.metavar or param.name} {error.message or f'is missing; {see}'}"
    wrong = getattr(error, "option_name", None)
    if wrong is not None and hasattr(error, "possibilities"):
        params = context.command.params if context is not None else []
        near = suggest(wrong, [name for p in params for name in p.opts if name.startswith("--")])
        return f"unknown option {wrong}{near if 'did you mean' in near else ''}; {see}"
    text = str(error.message).rstrip(".")
    return f"{text[:1].lower()}{text[1:]}; {see}"


def _out_of_memory(error: BaseException) -> bool:
    torch = sys.modules.get("torch")  # an error of torch can't come before its import
    return (
        isinstance(error, MemoryError)
        or (torch is not None and isinstance(error, torch.OutOfMemoryError))
        or (isinstance(error, RuntimeError) and any(words in str(error) for words in _TOO_LARGE))
    )


def _is_of_building(error: BaseException) -> bool:
    """Whether a network's weights were being made, or moved to the device: no batch was there yet."""
    return any((Path(frame.filename), frame.name) in _BUILDING for frame in traceback.extract_tb(error.__traceback__))


def _is_loss_of_a_rank(error: BaseException) -> bool:
    training = sys.modules.get("ban_fast.training")
    return training is not None and isinstance(error, training.RankLost)


def _place(error: BaseException) -> str:
    """Where in this package it happened, for a report of it."""
    frame = _last_frame(error)
    return f" (ban_fast/{frame[0]}:{frame[1]})" if frame is not None else ""


def _last_frame(error: BaseException) -> tuple[Path, int | None] | None:
    """The innermost file of this package that the error passed through, and the line there."""
    return next(reversed(_own_frames(error)), None)


def _own_frames(error: BaseException) -> list[tuple[Path, int | None]]:
    """The files of this package that the error passed through, and the lines there, the innermost last."""
    frames = [(Path(frame.filename), frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    return [(file.relative_to(_PACKAGE), line) for file, line in frames if file.is_relative_to(_PACKAGE)]
