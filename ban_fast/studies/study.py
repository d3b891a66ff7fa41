"""A study: many runs as one list, and which of them wait for another's teacher.

study.json holds the list and nothing else. How far a run has come is what its own directory says.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from ..config import Config
from ..errors import UserError
from ..recipes.changes import check_read
from ..training.adoption import teacher_settings
from ..training.checkpoint import write_json
from ..training.run_store import config_differences, settings
from .grammar import combinations, configured, label, written

STUDY = "study.json"
_LONGEST_NAME = 120
"""Letters of a run's name, of the 255 bytes that file systems allow."""


@dataclass(frozen=True, kw_only=True)
class StudyRun:
    """One run of a study."""

    name: str
    """Its directory below the study's."""
    config: Config
    """The whole of it: `training.run(config, ...)` by itself gives the same bits."""
    varied: Mapping[str, Any]
    """What tells it from the others, "seed" among it; runs that differ in it alone are one row of the table."""
    teacher: str | None = None
    """The run whose teacher it takes over, and so waits for."""
    is_helper: bool = False
    """Whether it trains a teacher for others and is no row of its own."""


@dataclass(frozen=True)
class Study:
    """Runs in the order in which they are begun; a teacher's comes before those that take it over."""

    FORMAT: ClassVar[int] = 1

    runs: tuple[StudyRun, ...]

    @classmethod
    def vary(
        cls,
        base: Config | Callable[[Mapping[str, Any]], Config],
        axes: Mapping[str, Sequence[Any]],
        seeds: Iterable[int] = (0,),
    ) -> "Study":
        """Every combination of the values that `axes` gives to configuration keys ("optimizer.lr"), for every seed.

        `base` is the configuration that they are set in, or makes it from a combination (key: value). A setting that
        an objective of several has not (BAN has no label weight) is left out of its runs, as `run_together` does.
        UserError for an unknown key or a value that no run could use, for a key that none of the runs reads, and where
        two runs would be the same.
        """
        listed: list[tuple[Mapping[str, Any], Config]] = []
        for seed in seeds:
            for chosen in combinations({**axes, "seed": [seed]}):
                config = configured(base(chosen) if callable(base) else base, chosen, axes.get("objective.name", ()))
                labels = [label(path) for path in chosen]
                short = {
                    path: label(path) if path == "seed" or labels.count(label(path)) == 1 else path for path in chosen
                }
                listed.append(({short[path]: value for path, value in chosen.items()}, config))
        check_read(axes, [config for _, config in listed])
        return cls.of(listed)

    @classmethod
    def of(cls, listed: Iterable[tuple[Mapping[str, Any], Config]]) -> "Study":
        """A study of these runs, each with what tells it from the others ({"objective": "ban", "seed": 0}).

        Runs that would train the same teacher share one: it is trained once, as a run of no students where none is
        listed. UserError where one could never be run, or two are the same.
        """
        listed = list(listed)
        names = _names([varied for varied, _ in listed])
        known: dict[str, str] = {}
        for name, (_, config) in zip(names, listed, strict=True):
            config.validate()
            if config.students:
                raise UserError("a study's runs have one objective each: vary it (objective=ban,ban+l), not students")
            key = _key(config)
            if key in known:
                raise UserError(f"{known[key]} and {name} are the same run: leave one of them out")
            known[key] = name
        runs = [
            StudyRun(name=name, config=config, varied=dict(varied))
            for name, (varied, config) in zip(names, listed, strict=True)
        ]
        return cls(tuple(_with_shared_teachers(runs)))

    def __getitem__(self, name: str) -> StudyRun:
        return next(run for run in self.runs if run.name == name)

    def with_configs(self, configs: Sequence[Config]) -> "Study":
        """The same runs with other configurations, one for each in order."""
        return Study(tuple(replace(run, config=config) for run, config in zip(self.runs, configs, strict=True)))

    def to_dict(self) -> dict[str, Any]:
        """What study.json holds; `from_dict` takes it back."""
        runs = [
            {
                "name": run.name,
                "varied": dict(run.varied),
                "teacher": run.teacher,
                "helper": run.is_helper,
                "config": run.config.to_dict(),
            }
            for run in self.runs
        ]
        return {"format": self.FORMAT, "runs": runs}

    @classmethod
    def from_dict(cls, values: Any) -> "Study":
        """UserError for what `to_dict` can't have written."""
        if not isinstance(values, dict) or not isinstance(values.get("runs"), list):
            raise UserError("a study is a JSON object with a list of runs")
        if values.get("format") != cls.FORMAT:
            raise UserError(f"study format {values.get('format')!r} is not known; this version reads {cls.FORMAT}")
        runs: list[StudyRun] = []
        for record in values["runs"]:
            runs.append(_run(record, [run.name for run in runs]))
        return cls(tuple(runs))

    def save(self, directory: Path) -> None:
        """Write study.json, at once or not at all."""
        write_json(directory / STUDY, self.to_dict())

    @classmethod
    def load(cls, directory: Path) -> "Study":
        """The study in a directory. UserError where there is none, or it can't be read."""
        path = directory / STUDY
        try:
            return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise UserError(f"there is no study in {directory} (no {STUDY}); start one without --resume") from None
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from error
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        except (ValueError, RecursionError) as error:  # not JSON, or not text
            raise UserError(f"{path} is cut short or corrupted: not JSON; put it back, or use another --out") from error

    def refuse_other(self, other: "Study", place: Path) -> None:
        """UserError, which names the first difference, unless `other`, just asked for, is the study in `place`."""
        here, asked = {run.name: run for run in self.runs}, {run.name: run for run in other.runs}
        remedy = "leave those flags out, or start another study in another --out"
        for name in asked:
            if name not in here:
                raise UserError(f"{name} is not among the runs of the study in {place}: {remedy}")
        for name, run in here.items():
            if name not in asked:
                raise UserError(f"the study in {place} also has {name}: {remedy}")
            for field, old, new in config_differences(run.config, asked[name].config):
                raise UserError(f"{field} is {new!r} here, but {old!r} in {name} of the study in {place}: {remedy}")


def _run(record: Any, before: list[str]) -> StudyRun:
    """A record of study.json; runs `before` it may be its teacher."""
    if not isinstance(record, dict):
        raise UserError("a run is a JSON object")
    name, varied, teacher = record.get("name"), record.get("varied"), record.get("teacher")
    if not isinstance(name, str) or not name or name != Path(name).name or name in before:
        raise UserError(f"{name!r} is no name of a run: a folder's, that no other run has")
    if not isinstance(varied, dict) or (teacher is not None and teacher not in before):
        raise UserError(f"{name}: its teacher is no run before it, or what is varied is missing")
    config = Config.from_dict(record.get("config", {}))
    return StudyRun(name=name, config=config, varied=varied, teacher=teacher, is_helper=record.get("helper") is True)


def _with_shared_teachers(runs: list[StudyRun]) -> list[StudyRun]:
    """The runs, with one that trains the teacher before each group that would train the same."""
    keys = {run.name: _key(teacher_settings(run.config)) for run in runs}
    sizes = Counter(keys.values())
    alone = {keys[run.name]: run for run in reversed(runs) if run.config.generations == 0}
    teachers: dict[str, str] = {}
    ordered: list[StudyRun] = []
    taken = [run.name for run in runs]
    for run in runs:
        key = keys[run.name]
        if sizes[key] == 1:
            ordered.append(run)
            continue
        if key not in teachers:
            teacher = alone.get(key) or _helper(run, [other for other in runs if keys[other.name] == key], taken)
            teachers[key] = teacher.name
            ordered.append(teacher)
        if run.name != teachers[key]:
            ordered.append(StudyRun(name=run.name, config=run.config, varied=run.varied, teacher=teachers[key]))
    return ordered


def _helper(run: StudyRun, group: list[StudyRun], taken: list[str]) -> StudyRun:
    """A run of the teacher alone, named after what the group has in common."""
    common = {key: value for key, value in run.varied.items() if all(o.varied.get(key) == value for o in group)}
    (name,) = _names([common], "teacher", taken)
    taken.append(name)
    config = teacher_settings(run.config)
    return StudyRun(name=name, config=config, varied=common, is_helper=True)


def _key(config: Config) -> str:
    """The same text for configurations whose runs are the same; `recipe` is a word for the record."""
    return json.dumps({**settings(config), "recipe": ""}, sort_keys=True)


def _names(each: Iterable[Mapping[str, Any]], first: str = "", taken: Iterable[str] = ()) -> list[str]:
    """Names of folders, "objective=ban,lr=0.1,seed=0": readable, and no two alike in any case of letters."""
    used = {name.lower() for name in taken}
    names = []
    for varied in each:
        parts = [f"{key}={written(value)}" for key, value in varied.items()]
        plain = re.sub(r"[^\w.+=,-]", "_", ",".join([first] * bool(first) + parts), flags=re.ASCII)
        base = plain[:_LONGEST_NAME].lstrip(".-") or "run"
        name, number = base, 2
        while name.lower() in used:
            name, number = f"{base}-{number}", number + 1
        used.add(name.lower())
        names.append(name)
    return names
