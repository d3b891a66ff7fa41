"""Real processes, killed with SIGKILL at random moments and at every operation on a file, resume bit for bit."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from small_runs import footprint

NURSERY = Path(__file__).with_name("nursery.py")


def nursery(mode: str, directory: Path) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, str(NURSERY), mode, str(directory)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    "mode",
    [
        pytest.param("operations", marks=pytest.mark.slow),
        pytest.param("cache-operations", marks=pytest.mark.slow),
        pytest.param("together-operations", marks=pytest.mark.slow),
    ],
)
def test_killed_before_each_operation_on_a_file(mode: str, tmp_path: Path) -> None:
    """Between any two of them: before config.json, between the files of two generations, during the ensembles.

    In the midst of writing a teacher's rows, and of the record of them; between the files of two students.
    """
    said = nursery(mode, tmp_path)
    # Two generations' checkpoints alone are 2 x (folder, journal, 2 x (open, fsync, rename, fsync) of state.pt, ...).
    assert said["operations"] > 50
    expected = footprints(tmp_path / "whole")
    for nth in range(1, said["operations"] + 1):
        assert footprints(tmp_path / str(nth)) == expected, f"killed before operation {nth}"


def footprints(path: Path) -> dict[str, Any]:
    """Of a run, or of each of those below."""
    runs = [path, *(file.parent for file in path.glob("*/config.json"))]
    assert not list(path.rglob("*.tmp"))
    assert not (path / "teacher-cache").exists()
    return {run.name if run != path else "": footprint(run) for run in runs if (run / "results.json").exists()}


@pytest.mark.parametrize(
    "mode",
    [
        "small",
        *(
            pytest.param(mode, marks=pytest.mark.slow)
            for mode in ("text", "wide-resnet", "cache", "together", "text-cache", "text-together")
        ),
    ],
)
def test_killed_at_random_moments(mode: str, tmp_path: Path) -> None:
    said = nursery(mode, tmp_path)
    assert footprints(tmp_path / "killed") == footprints(tmp_path / "whole") != {}
    # The last session took up what was done, and did the rest and nothing else.
    assert said["last"]["done"] > 0
    assert said["last"]["steps"] == said["total"] - said["last"]["done"]
