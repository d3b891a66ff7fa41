"""How far a run of a study has come, by the files in its directory: the same for every engine."""

import contextlib
from pathlib import Path

from ..errors import UserError
from ..evaluation.run_directory import METRICS, RunDirectory
from .study import StudyRun


def share(directory: Path, run: StudyRun) -> float:
    """What is done of a run, in [0, 1]: its generations that are finished, and epochs of the one in training."""
    try:
        found = RunDirectory(directory / run.name)
        done = float(len(found.results()["generations"]))
    except UserError:  # not begun yet; what is wrong with it, its process tells
        return 0.0
    with contextlib.suppress(OSError):
        epochs = (found.generation(int(done)) / METRICS).read_bytes().count(b"\n")
        done += min(epochs / run.config.epochs, 1.0)
    return min(done / (run.config.generations + 1), 1.0)
