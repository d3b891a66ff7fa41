"""Runs that are compared with those of a study's processes have one thread, as those are asked to have."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where RAY_ADDRESS names one, studies would be executed there."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
