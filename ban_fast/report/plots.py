"""Plots of a run as PNG files."""

import contextlib
import io
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from ..evaluation import RunDirectory

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plots(run: RunDirectory, out_dir: str | os.PathLike[str]) -> list[Path]:
    """Draw what the run has: error-by-generation.png, learning-curves.png, reliability.png in `out_dir`.

    Language models have perplexity-by-generation.png in place of the first, and no reliability.

    Returns the files written, at most three: an unfinished run may have no generation to show yet, or no epoch. The
    directory is made where it is missing. UserError where the run can't be read or a file can't be written.
    """
    from . import figures, text_figures  # matplotlib: only who draws waits for it

    config, results = run.config(), run.results()
    curves = {number: run.metrics(number) for number in run.generations()}
    for number, records in curves.items():
        if not all(map(_is_point, records)):
            raise UserError(f"generation {number} of {run.path}: metrics.jsonl is not what a run writes; put it back")
    drawn: dict[str, Figure] = {}
    tested = bool(results["generations"]) and "test" in results["generations"][0]
    if any(_is_of_text(record) for records in curves.values() for record in records):
        if tested:
            drawn["perplexity-by-generation.png"] = text_figures.perplexity_by_generation(config, results)
        drawn["learning-curves.png"] = text_figures.learning_curves(config, results, curves)
    else:
        if tested:
            drawn["error-by-generation.png"] = figures.error_by_generation(config, results)
        if any(curves.values()):
            drawn["learning-curves.png"] = figures.learning_curves(config, results, curves)
        if tested:
            drawn["reliability.png"] = figures.reliability(config, results)
    out = Path(out_dir)
    return [_write(figure, out / name) for name, figure in drawn.items()]


def _is_of_text(record: dict[str, Any]) -> bool:
    return "perplexity" in (record.get("evaluation") or {})


def _is_point(record: dict[str, Any]) -> bool:
    """Whether a record of metrics.jsonl has what is drawn; None stands for a number that was not finite."""
    train, evaluation = record.get("train"), record.get("evaluation")
    if not isinstance(record.get("epoch"), int) or not isinstance(train, dict):
        return False
    drawn = [train.get("error", ""), train.get("loss", "")]
    if evaluation is not None:
        if not isinstance(evaluation, dict) or "split" not in evaluation:
            return False
        drawn.append(evaluation.get("perplexity", evaluation.get("error", "")))
    return all(isinstance(number, int | float | None) for number in drawn)


def _write(figure: "Figure", path: Path) -> Path:
    """Whole or not at all: drawn in memory, written beside the place, renamed."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_bytes(picture.getvalue())
        beside.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose another directory with --out") from error
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
    return path
