"""The reading side of a run directory. Nothing here writes, or needs more than the JSON files."""

import json
import os
from pathlib import Path
from typing import Any

from ..config import Config
from ..errors import UserError
from .ensembles import AVERAGES

CONFIG, ENVIRONMENT, RESULTS = "config.json", "environment.json", "results.json"
MODEL, METRICS, STATE = "model.safetensors", "metrics.jsonl", "state.pt"
RESULTS_FORMAT = 1
_TIMES = ("train_seconds", "images_per_second")

# What to do about a file that is not as the run left it.
_REMEDIES = {
    CONFIG: "put it back",
    ENVIRONMENT: f"put it back, or repeat the run with --config {CONFIG} and another --out",
    RESULTS: "delete it, and `ban-fast train --resume` makes it again from the checkpoints",
}


class RunDirectory:
    """What a run left: config.json, environment.json, results.json, and a folder generation-N for each generation.

    In that folder: model.safetensors, metrics.jsonl, state.pt.
    UserError where the path is not a run directory, and where a file that is asked for is missing or cut short.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            problem = "not a directory" if self.path.exists() else "no such directory"
            raise UserError(f"{self.path} is not a run directory: {problem}")
        if not (self.path / CONFIG).is_file():
            raise UserError(f"{self.path} is not a run directory: it has no {CONFIG}")

    def config(self) -> dict[str, Any]:
        """config.json, checked; fields that it lacks, as an older version's does, have their defaults."""
        values = self._object(CONFIG)
        try:
            return Config.from_dict(values).to_dict()
        except UserError as error:
            raise UserError(f"{self.path / CONFIG}: {error}") from error

    def environment(self) -> dict[str, Any]:
        """environment.json: versions, device, threads and the data's shape."""
        return self._object(ENVIRONMENT)

    def results(self) -> dict[str, Any]:
        """results.json: {"format", "generations", "ensembles"}, of the generations finished so far."""
        if not (self.path / RESULTS).exists():
            return {"format": RESULTS_FORMAT, "generations": [], "ensembles": []}
        results = self._object(RESULTS)
        if results.get("format") != RESULTS_FORMAT:
            raise UserError(
                f"{self.path / RESULTS} has format {results.get('format')!r}; this version reads {RESULTS_FORMAT}"
            )
        generations, ensembles = results.get("generations"), results.get("ensembles")
        if (
            not isinstance(generations, list)
            or not isinstance(ensembles, list)
            or not all(isinstance(record, dict) for record in generations + ensembles)
            or [record.get("generation") for record in generations] != list(range(len(generations)))
        ):
            raise self._corrupted(RESULTS, "it does not list generations 0, 1, ...")
        tested = ["test" in record for record in generations + ensembles]
        votes = all(_is_vote(record, len(generations)) for record in ensembles)
        timed = all(_is_number(record.get(name, 0)) for record in generations for name in _TIMES)
        figures = len(set(tested)) <= 1 and (not any(tested) or all(map(_has_figures, generations + ensembles)))
        if not (votes and timed and figures):
            raise self._corrupted(RESULTS, "a record in it has not the figures that a run writes")
        return results

    def generations(self) -> list[int]:
        """Generations that were begun, finished or not: those with a metrics.jsonl, in order."""
        found: list[int] = []
        while (self.generation(len(found)) / METRICS).is_file():
            found.append(len(found))
        return found

    def metrics(self, generation: int) -> list[dict[str, Any]]:
        """metrics.jsonl of one generation, a record an epoch. A last line that a killed run cut short is left out."""
        path = self.generation(generation) / METRICS
        lines = _read(path, "put it back").split("\n")
        records = []
        for number, line in enumerate(lines[:-1], start=1):
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                record = None
            if not isinstance(record, dict):
                raise UserError(f"{path} is corrupted: line {number} is not a JSON object")
            records.append(record)
        return records

    def generation(self, number: int) -> Path:
        """The folder of generation `number`, there or not."""
        return self.path / f"generation-{number}"

    def _object(self, name: str) -> dict[str, Any]:
        path = self.path / name
        try:
            value = json.loads(_read(path, _REMEDIES[name]))
        except (ValueError, RecursionError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{path} is cut short or corrupted: not JSON; {_REMEDIES[name]}") from error
        if not isinstance(value, dict):
            raise self._corrupted(name, "not a JSON object")
        return value

    def _corrupted(self, name: str, problem: str) -> UserError:
        return UserError(f"{self.path / name} is corrupted: {problem}; {_REMEDIES[name]}")


def _read(path: Path, remedy: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; {remedy}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is corrupted: not UTF-8 text; {remedy}") from error


def _is_vote(record: dict[str, Any], generations: int) -> bool:
    members = record.get("members")
    return (
        isinstance(members, list)
        and all(type(member) is int and 0 <= member < generations for member in members)
        and record.get("average") in AVERAGES
    )


def _has_figures(record: dict[str, Any]) -> bool:
    """Whether a record has its test figures as numbers; of images, its reliability as lists of as many."""
    test, bins = record.get("test"), record.get("reliability")
    if isinstance(test, dict) and "perplexity" in test:
        best = record.get("best")
        return (
            _has_perplexity(test)
            and ("members" in record or _has_perplexity(record.get("valid")))
            and (best is None or (isinstance(best, dict) and _is_number(best.get("epoch")) and _is_best(best)))
        )
    if not (isinstance(test, dict) and isinstance(bins, dict)):
        return False
    lists = [bins.get(name) for name in ("count", "confidence", "accuracy")]
    return (
        all(_is_number(test.get(name)) for name in ("error", "nll", "ece"))
        and all(isinstance(values, list) and all(map(_is_number, values)) for values in lists)
        and len({len(values) for values in lists if values}) == 1
        and sum(lists[0] or []) > 0
    )


def _is_best(best: dict[str, Any]) -> bool:
    return _has_perplexity(best.get("valid")) and _has_perplexity(best.get("test"))


def _has_perplexity(figures: Any) -> bool:
    return isinstance(figures, dict) and all(_is_number(figures.get(name)) for name in ("perplexity", "nll"))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
