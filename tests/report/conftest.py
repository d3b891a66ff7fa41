"""Run directories to report on."""

from pathlib import Path
from typing import Any

import pytest
from report_runs import MakeRun, write_run

from ban_fast.config import Config
from ban_fast.evaluation import RunDirectory


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """`write_run` into a new directory of its own."""
    made: list[Path] = []

    def make(config: Config, errors: list[float], **more: Any) -> RunDirectory:
        made.append(tmp_path / f"run-{len(made)}")
        return write_run(made[-1], config, errors, **more)

    return make
