"""A network whose training waits where a test wants to meet it: a fast machine's runs are over before anybody looks."""

import sys
import threading
import time
from pathlib import Path

from torch import Tensor, nn

from ban_fast.studies.worker import _await_end

_LONGEST = 900.0
"""Seconds that a process waits for a test that may have been killed."""


def held(directory: Path, name: str) -> Path:
    """While this file is there, a study's run waits in its training, from its first checkpoint of generation 1 on."""
    return directory.parent / "held" / name


class Linear(nn.Module):
    """One layer for the digits. In a held run's process it waits, until that is asked to stop."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.layer = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            _wait()
        return self.layer(x.flatten(1))


def _wait() -> None:
    if len(sys.argv) < 3:
        return
    directory, name = Path(sys.argv[1]), sys.argv[2]  # as `ban_fast.studies.worker` has them
    hold, until = held(directory, name), time.monotonic() + _LONGEST
    while (
        (directory / name / "generation-1" / "state.pt").exists()
        and hold.exists()
        and any(_await_end.__name__ in thread.name for thread in threading.enumerate())  # it ends with the word to stop
    ):
        assert time.monotonic() < until
        time.sleep(0.005)
