"""What a study came to: mean and standard deviation over seeds, for each generation and ensemble of each group."""

import os
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from ..evaluation import AVERAGES, RunDirectory
from ..report import describe, paper
from . import sharing
from .grammar import written
from .schedule import finished
from .study import Study, StudyRun

_HEADINGS = {"error": "error %", "nll": "NLL", "ece": "ECE"}
_SPLITS = ("test", "validation", "valid")
"""The first that a record has is the one that counts; texts call theirs "valid"."""


@dataclass(frozen=True)
class Spread:
    """Values of some seeds in short."""

    mean: float
    deviation: float | None
    """Sample standard deviation (n - 1); None for a single seed."""
    n: int

    @classmethod
    def of(cls, values: list[float]) -> "Spread":
        """Of at least one value."""
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


@dataclass(frozen=True, kw_only=True)
class Row:
    """One generation or ensemble of one group of runs, which differ in their seeds alone."""

    group: Mapping[str, Any]
    """What was varied but for the seed: {"objective": "ban"}."""
    name: str
    """ "teacher", "BAN-1", "BAN-1+2 (logits)"."""
    figures: Mapping[str, Spread]
    """By metric, over the seeds that have it: error in percent, NLL in nats, ECE; or what the runs' task has."""
    change: Spread | None
    """The first metric less the same seed's teacher's; None for the teacher."""
    published: float | None
    """The test error or perplexity that the paper printed, for what has one in its tables."""


def summary(path: str | os.PathLike[str]) -> list[Row]:
    """The figures of a study's finished runs on the test split (without one, on the validation split), group by group.

    UserError where the directory holds no study, or a run's files can't be read.
    """
    directory = Path(path)
    return [row for _, rows in _grouped(directory, Study.load(directory)) for row in rows]


def table(path: str | os.PathLike[str]) -> Group:
    """The summary for a rich console, with what is missing or scaled down said above it."""
    directory = Path(path)
    study = Study.load(directory)
    groups = _grouped(directory, study)
    parts: list[Any] = [Text(f"{_title(study)}: {directory}", style="bold", no_wrap=True, overflow="ignore")]
    for note in [*_missing(directory, study), *_scaled_down(study)]:
        parts.append(Text(note, style="yellow"))
    if any(rows for _, rows in groups):
        parts.append(_rows(groups))
        parts.append(Text("mean \N{PLUS-MINUS SIGN} standard deviation over n seeds", style="dim"))
    if (said := sharing.note(directory, study)) is not None:
        parts.append(Text(said, style="dim"))
    return Group(*parts)


def _grouped(directory: Path, study: Study) -> list[tuple[str, list[Row]]]:
    """Title and rows of each group that has a finished run."""
    groups: dict[str, list[StudyRun]] = {}
    for run in study.runs:
        if not run.is_helper and finished(directory, run):
            groups.setdefault(_group_title(run), []).append(run)
    return [(title, _group_rows(directory, runs)) for title, runs in groups.items()]


def _group_title(run: StudyRun) -> str:
    return ", ".join(f"{key} {written(value)}" for key, value in run.varied.items() if key != "seed")


def _group_rows(directory: Path, runs: list[StudyRun]) -> list[Row]:
    group = {key: value for key, value in runs[0].varied.items() if key != "seed"}
    each = [_figures(RunDirectory(directory / run.name).results()) for run in runs]
    published = _published(runs[0])
    names = list(dict.fromkeys(name for figures in each for name in figures))
    rows = []
    for name in names:
        found = [(figures[name], figures[describe.generation(0)]) for figures in each if name in figures]
        metrics = list(dict.fromkeys(metric for record, _ in found for metric in record))
        if not metrics:
            continue
        spreads = {metric: Spread.of([record[metric] for record, _ in found if metric in record]) for metric in metrics}
        first = metrics[0]
        changes = [record[first] - teacher[first] for record, teacher in found if first in record and first in teacher]
        change = Spread.of(changes) if changes and name != describe.generation(0) else None
        rows.append(Row(group=group, name=name, figures=spreads, change=change, published=published.get(name)))
    return rows


def _published(run: StudyRun) -> dict[str, float]:
    """The paper's figures for a run's generations and ensembles, as the table calls them."""
    values, count, objective = run.config.to_dict(), run.config.generations + 1, run.config.objective.name
    text = paper.text_row(values)
    if text is not None:
        printed = {describe.generation(number): text.generation(number, objective) for number in range(count)}
        return {name: perplexity.test for name, perplexity in printed.items() if perplexity is not None}
    found = paper.row(values)
    if found is None:
        return {}
    errors = {describe.generation(number): found.generation(number, objective) for number in range(count)}
    for last in range(2, count):
        members = tuple(range(1, last + 1))
        errors[describe.members(members)] = found.ensemble(members, "probabilities", objective)
    return {name: error for name, error in errors.items() if error is not None}


def _figures(results: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """A run's metrics by generation and ensemble, as the table calls them."""
    found = {describe.generation(record["generation"]): _metrics(record) for record in results["generations"]}
    for average in AVERAGES:
        for record in results["ensembles"]:
            if record["average"] == average:
                note = "" if average == AVERAGES[0] else f" ({average})"
                found[describe.members(record["members"]) + note] = _metrics(record)
    return found


def _metrics(record: Mapping[str, Any]) -> dict[str, float]:
    figures: Mapping[str, Any] = next((record[split] for split in _SPLITS if split in record), {})
    return {
        name: float(value)
        for name, value in figures.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }


def _rows(groups: list[tuple[str, list[Row]]]) -> Table:
    metrics = list(dict.fromkeys(metric for _, rows in groups for row in rows for metric in row.figures))
    made = Table(box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    made.add_column("", no_wrap=True)
    for heading in ["n", *(_HEADINGS.get(metric, metric) for metric in metrics[:1]), "vs teacher"]:
        made.add_column(heading, justify="right", no_wrap=True)
    for metric in metrics[1:]:
        made.add_column(_HEADINGS.get(metric, metric), justify="right", no_wrap=True)
    has_published = any(row.published is not None for _, rows in groups for row in rows)
    if has_published:
        made.add_column(f"paper\n{_HEADINGS.get(metrics[0], metrics[0])}", justify="right", no_wrap=True)
    for title, rows in groups:
        if title:
            made.add_section()
            made.add_row(Text(title, style="italic"))
        for row in rows:
            figures = {metric: _cell(metric, row.figures.get(metric)) for metric in metrics}
            count = max(spread.n for spread in row.figures.values())
            change = _cell(metrics[0], row.change, sign="+")
            cells = ["  " * bool(title) + row.name, str(count), figures.pop(metrics[0]), change, *figures.values()]
            if has_published:
                cells.append("" if row.published is None else f"{row.published:.2f}")
            made.add_row(*cells)
    return made


def _cell(metric: str, spread: Spread | None, sign: str = "") -> str:
    """ "5.06 ± 0.12"; figures of some size with two decimals, small ones, as NLL and ECE are, with four."""
    if spread is None:
        return ""
    decimals = 4 if metric in ("nll", "ece") else 2
    mean = f"{spread.mean:{sign}.{decimals}f}"
    return mean if spread.deviation is None else f"{mean} \N{PLUS-MINUS SIGN} {spread.deviation:.{decimals}f}"


def _title(study: Study) -> str:
    runs = [run for run in study.runs if not run.is_helper]
    titles = {describe.title({**run.config.to_dict(), "generations": 0}) for run in runs}  # without the objective
    seeds = len({run.config.seed for run in runs})
    about = titles.pop() if len(titles) == 1 else "study"
    return f"{about}, {len(runs)} run{'s' * (len(runs) > 1)}, {seeds} seed{'s' * (seeds > 1)}"


def _missing(directory: Path, study: Study) -> list[str]:
    """How far the study has come, by its directories."""
    runs = [run for run in study.runs if not run.is_helper]
    left = [run.name for run in runs if not finished(directory, run)]
    return [f"unfinished: {len(runs) - len(left)} of {len(runs)} runs"] if left else []


def _scaled_down(study: Study) -> list[str]:
    notes = [describe.scaled_down(run.config.to_dict()) for run in study.runs if not run.is_helper]
    return list(dict.fromkeys(note for note in notes if note is not None))
