"""What `ban-fast sweep` does: from flags to a study, its execution, and what is said meanwhile."""

import re
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..config import Config
from ..errors import UserError, suggest
from ..recipes.changes import check_read
from . import flags
from .app import Session
from .commands import find_own_modules, new_directory, print_content
from .signals import Stopped

_BASE = {"recipe": "recipe", "data.name": "data", "model.name": "model"}
"""Keys whose flag chooses more than its own field: recipes, sizes, options."""
_OF_A_TABLE = ("vary", "recipe", "config", "data", "model", "objective", "generations")
"""Flags that --paper leaves no room for."""
_PLACES = ("data_dir", "loader", "cache_dir")
"""Flags that a study's continuation may change: nothing that is computed depends on them."""
_MOST_SEEDS = 10_000
"""In one range: a slip of the finger is not to fill the memory."""
_NOT_TAKEN = {"seed": None, "students": None}
"""Flags of train that a sweep has others for: --seeds, --vary objective=."""
_SCHEDULING = ("out", "resume", "engine", "workers", "cpus_per_run", "gpus_per_run", "retries")


def sweep(session: Session, values: Mapping[str, Any]) -> int:
    """`ban-fast sweep`; `values` are its flags by parameter name, None or empty where not given."""
    resume, signals = values["resume"], session.signals
    if resume and values["out"] is None:
        raise UserError("--resume needs --out DIR, the directory of the study to continue")
    out = Path(values["out"]) if values["out"] is not None else new_directory("sweep")
    signals.remark = " before any run began"
    find_own_modules()
    from .. import studies, training
    from ..backends.dispatch import check_environment
    from .sweep_progress import narrator

    check_environment()  # its runs have the same
    study = _continued(session, values, out) if resume else _planned(session, values)
    again = f"continue with `ban-fast sweep --out {shlex.quote(str(out))} --resume`"
    with narrator(signals, out, again) as watching:
        try:
            failed = studies.run_study(
                study,
                out,
                engine=values["engine"] or "auto",
                workers=values["workers"],
                cpus_per_run=values["cpus_per_run"],
                gpus_per_run=values["gpus_per_run"],
                retries=2 if values["retries"] is None else values["retries"],
                resume=resume,
                observer=watching,
                should_stop=signals.requested,
            )
        except training.Interrupted:
            signals.remark = f" with {watching.counts()}: all is saved; {again}"
            raise Stopped from None
    signals.answer, signals.remark = "raise", " after all runs had ended"
    print_content(studies.table(out))
    if failed:
        print(f"ban-fast: {len(failed)} of {watching.total} runs failed; {again}", file=sys.stderr)
    return 1 if failed else 0


def _planned(session: Session, values: Mapping[str, Any]) -> Any:
    """The study that the flags of a new sweep ask for."""
    study = _varied(session, values) if values["paper"] is None else _of_the_paper(session, values)
    if session.request is not None:
        check_read(session.request.given, [run.config for run in study.runs if not run.is_helper])
    return study


def _varied(session: Session, values: Mapping[str, Any]) -> Any:
    """The study of every combination of what is varied."""
    from .. import studies

    axes = _axes(values)
    train = {**_NOT_TAKEN, **values}

    def base(chosen: Mapping[str, Any]) -> Config:
        given = {flag: chosen[path] for path, flag in _BASE.items() if path in chosen}
        session.request = flags.requested({**train, **given})
        return session.request.config

    seeds = axes.pop("seed", None) or [base({}).seed]
    return studies.Study.vary(base, axes, seeds)


def _of_the_paper(session: Session, values: Mapping[str, Any]) -> Any:
    """The study of a table, with the flags given put into each of its runs."""
    from ..studies import grammar, paper

    for name in _OF_A_TABLE:
        if values[name] not in (None, [], ()):
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag}: --paper says that for each run; leave one of them out")

    def adjusted(config: Config) -> Config:
        session.request = flags.overridden(flags.Request(config), {**_NOT_TAKEN, **values})
        return session.request.config

    seeds = [0] if values["seeds"] is None else grammar.parsed("seed", _ranges(values["seeds"]), "--seeds")
    return paper.table(values["paper"], seeds, adjusted)


def _continued(session: Session, values: Mapping[str, Any], out: Path) -> Any:
    """The study in `out`, with data where the flags say they lie now. None: as it stands.

    UserError where the flags ask for another study.
    """
    from .. import studies

    given = {name for name, value in values.items() if value not in (None, [], ()) and name not in _SCHEDULING}
    if not given:
        return None
    if not given <= set(_PLACES):
        return _planned(session, values)
    stored = studies.Study.load(out)
    moved = [flags.overridden(flags.Request(run.config), {**_NOT_TAKEN, **values}) for run in stored.runs]
    return stored.with_configs([request.config for request in moved])


def _axes(values: Mapping[str, Any]) -> dict[str, list[Any]]:
    """What is varied: configuration keys with their values, by `--vary` and `--seeds`."""
    from ..studies import grammar

    paths = {name.replace("_", "-"): path for name, path in flags.FIELDS.items() if name != "students"}
    axes: dict[str, list[Any]] = {}
    for text in values["vary"] or []:
        key, equals, listed = text.partition("=")
        if not equals:
            raise UserError(f"--vary must be KEY=VALUE,VALUE,... (lr=0.1,0.05 for example), got {text!r}")
        path = paths.get(key.replace("_", "-"), key)
        if not grammar.is_key(path):
            raise UserError(f"--vary: unknown key {key!r}{suggest(key, [*paths, *grammar.known_keys()])}")
        if path in axes:
            raise UserError(f"--vary {key} is given twice; write all its values in one, with commas between")
        axes[path] = [_absolute(path, value) for value in grammar.parsed(path, listed.split(","), f"--vary {key}")]
        if given := _given(path, values):
            raise UserError(f"{given} and --vary {key} each set {path}; leave one of them out")
    if values["seeds"] is not None:
        if "seed" in axes:
            raise UserError("--seeds and --vary seed each list seeds; leave one of them out")
        axes["seed"] = grammar.parsed("seed", _ranges(values["seeds"]), "--seeds")
    return axes


def _given(path: str, values: Mapping[str, Any]) -> str | None:
    """The flag that already sets a field."""
    flag = flags.flag_of(path)
    if flag is None or values.get(flag.removeprefix("--").replace("-", "_")) in (None, [], ()):
        return None
    return flag


def _absolute(path: str, value: Any) -> Any:
    if path in ("data.name", "data.directory", "teacher.cache_directory") and isinstance(value, str):
        return flags.absolute(path, value)
    return value


def _ranges(text: str) -> list[str]:
    """ "0,1,5-7" as "0", "1", "5", "6", "7"."""
    seeds: list[str] = []
    for part in text.split(","):
        ends = re.fullmatch(r"\s*(\d{1,18})-(\d{1,18})\s*", part)
        if ends is None:
            seeds.append(part)
            continue
        first, last = int(ends[1]), int(ends[2])
        if not first <= last < first + _MOST_SEEDS:
            raise UserError(f"--seeds: {part} must be FIRST-LAST, from 1 to {_MOST_SEEDS:,} seeds")
        seeds += map(str, range(first, last + 1))
    return seeds
