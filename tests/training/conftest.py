"""Small runs gain nothing from threads, and bits are compared at one number of them."""

from collections.abc import Callable, Iterator

import pytest
import torch
from emulated_graphs import Emulated

from ban_fast.training import learner, recorded, whole_step
from ban_fast.training.step_choice import StepChoice


@pytest.fixture(autouse=True, scope="module")
def _one_thread_in_fixtures() -> Iterator[None]:
    """Runs that the tests of a module share are made before `_one_thread`."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    yield
    torch.set_num_threads(1)


@pytest.fixture
def deterministic_kernels() -> Iterator[None]:
    """On a GPU two runs can only be compared where each would meet its own bits again."""
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    yield
    torch.backends.cudnn.deterministic = before


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Emulated]:
    """Every generation is trained by replays, of 1, 2 or 4 steps of the epochs' 4; the one named is the quickest."""
    # Tables that move while a run goes on, and a teacher that sees two batches at a time: of batches served too.
    monkeypatch.setattr("ban_fast.training.cache_store._FIRST_CAPACITY", 16)
    monkeypatch.setattr("ban_fast.training.cache_worth.Fill.most", 0)
    monkeypatch.setattr("ban_fast.training.teacher_cache._MOST_AHEAD", 2)

    def install(best: int) -> Emulated:
        device = Emulated({best: 0.5})
        device.install(monkeypatch)
        real = whole_step.WholeStep.__call__
        monkeypatch.setattr(whole_step.WholeStep, "__call__", lambda step: device.make(lambda: real(step)))
        monkeypatch.setattr(learner, "choose_step", lambda *_: StepChoice("graph", "for this test"))
        for name, value in {"WARM_UPS": 2, "SIZES": (1, 2, 4), "WINDOW": 4, "TRIES": 1}.items():
            monkeypatch.setattr(recorded, name, value)
        return device

    return install
