"""What the teacher of several runs of a study says to them: computed once, by the run that trains it."""

import contextlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..training import Observer
from ..training.checkpoint import write_json
from ..training.locks import InUse
from ..training.objectives import needs_teacher
from ..training.shared import share_outputs
from ..training.teacher_choice import FOLDER
from .study import Study, StudyRun

SHARED = "shared.json"
"""In the directory of a teacher's run: what it has put down for whom. It is there once that is done."""


def outputs(directory: Path, teacher: str) -> Path:
    """Where a study keeps what the teacher of one of its runs says, until those that it teaches have ended."""
    return directory / FOLDER / teacher


def groups(study: Study, teacher: str) -> list[list[StudyRun]]:
    """Runs that can learn from the same kept outputs of a run's teacher, two at least in each group."""
    found: dict[str, list[StudyRun]] = {}
    for run in study.runs:
        config = run.config
        if run.teacher == teacher and config.generations and needs_teacher(config.objective.name):
            found.setdefault(json.dumps(asdict(config.teacher), sort_keys=True), []).append(run)
    return [runs for runs in found.values() if len(runs) > 1 and runs[0].config.teacher.mode != "live"]


def shared(directory: Path, teacher: str) -> list[Mapping[str, Any]] | None:
    """What a run has put down, a record a group; None before it has, or where that can't be read."""
    try:
        records = json.loads((directory / teacher / SHARED).read_text(encoding="utf-8"))["shared"]
        return [{**record, "students": list(record["students"])} for record in records]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def is_due(directory: Path, study: Study, teacher: str) -> bool:
    """Whether a run has still to put down what its teacher says."""
    return bool(groups(study, teacher)) and shared(directory, teacher) is None


def place_for(directory: Path, run: StudyRun) -> Path | None:
    """Where a run finds what its teacher says; None where it has to ask for it."""
    if run.teacher is None:
        return None
    for record in shared(directory, run.teacher) or ():
        if run.name in record["students"] and record.get("mode") == "cache":
            place = outputs(directory, run.teacher)
            return place if place.is_dir() else None
    return None


def share(directory: Path, study: Study, teacher: str, observer: Observer, should_stop: Callable[[], bool]) -> None:
    """Put down what a run's teacher says to each group of runs, if that has not been done.

    Where it can't be, each is left to itself. InUse where another process fills a place that was asked for by name.
    """
    if not is_due(directory, study, teacher):
        return
    records: list[dict[str, Any]] = []
    for runs in groups(study, teacher):
        try:
            configs = [run.config for run in runs]
            record = share_outputs(directory / teacher, configs, outputs(directory, teacher), should_stop)
        except UserError as error:
            if isinstance(error, InUse) and runs[0].config.teacher.mode == "cache":
                raise
            record = {"mode": "live", "said": f"live: {error}"}
            if not any(before["mode"] == "cache" for before in records):
                clear(directory, teacher)  # what is half there takes the room that each needs now
        observer.teacher_chosen(1, f"of {len(runs)} runs, {record['said']}")
        records.append({"students": [run.name for run in runs], **record})
    write_json(directory / teacher / SHARED, {"shared": records})


def note(directory: Path, study: Study) -> str | None:
    """What the students' own records don't have, in a line: how often the teachers were asked that they share."""
    records = [record for run in study.runs for record in shared(directory, run.name) or ()]
    kept = [record for record in records if record.get("mode") == "cache"]
    if not kept:
        return None
    shown = {unit: sum(record.get(f"forward_{unit}", 0) for record in kept) for unit in ("images", "tokens")}
    what = " and ".join(f"{count:,} {unit}" for unit, count in shown.items() if count) or "no images"
    count = sum(len(record["students"]) for record in kept)
    return f"teachers that several runs share were shown {what}, once for {count} run{'s' * (count > 1)}"


def clear(directory: Path, teacher: str) -> None:
    """Remove what was kept: those that it was for have ended."""
    shutil.rmtree(outputs(directory, teacher), ignore_errors=True)
    with contextlib.suppress(OSError):
        (directory / FOLDER).rmdir()
