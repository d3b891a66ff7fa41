"""Which streams wait for the counters' zeroing, with streams and events that only take notes: no GPU is needed."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ban_fast.backends.triton import launch

CUDA = torch.device("cuda", 0)


class Stream:
    def __init__(self, number: int) -> None:
        self.cuda_stream = number
        self.waited: list[object] = []

    def wait_event(self, event: object) -> None:
        self.waited.append(event)


class Device:
    """What `launch` asks torch.cuda for. Memory is on the CPU, and 0 after an event that is named by its number."""

    def __init__(self) -> None:
        self.stream = Stream(0)
        self.capturing = False
        self.events = 0

    def made_apart(self, make: Callable[[], Tensor], device: torch.device) -> tuple[Tensor, str]:
        assert not self.capturing
        self.events += 1
        return make(), f"zeroed {self.events}"

    def lasting(self, make: Callable[[], Tensor], device: torch.device) -> Tensor:
        made, event = self.made_apart(make, device)
        self.stream.wait_event(event)
        return made


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    found = Device()
    monkeypatch.setattr(launch, "_CAPTURED_CALLS", 4)
    monkeypatch.setattr(launch, "_spare_counters", {})
    monkeypatch.setattr(launch, "_stream_counters", {})
    monkeypatch.setattr(launch, "made_apart", found.made_apart)
    monkeypatch.setattr(launch, "lasting", found.lasting)
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda shape, dtype, device: zeros(shape, dtype=dtype))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: found.stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: found.capturing)
    return found


def test_every_stream_waits_once_before_it_counts(device: Device) -> None:
    streams = [Stream(number) for number in range(3)]
    counters = []
    for _ in range(2):
        for device.stream in streams:
            counters.append(launch.counter(CUDA))
    assert [stream.waited for stream in streams] == [["zeroed 1"]] * 3
    assert len({counter.data_ptr() for counter in counters}) == 3
    assert [a.data_ptr() for a in counters[:3]] == [b.data_ptr() for b in counters[3:]]
    assert all(counter.data_ptr() % 16 == 0 for counter in counters)


def test_a_stream_that_finds_no_spare_counter_waits_for_its_own(device: Device) -> None:
    streams = [Stream(number) for number in range(6)]
    for device.stream in streams:
        launch.counter(CUDA)
    waited = [stream.waited for stream in streams]
    assert waited == [["zeroed 1"]] * 4 + [["zeroed 2"], ["zeroed 3"]]


def test_a_capture_waits_for_nothing(device: Device) -> None:
    """It could not: an event from outside it is an error there. Each call has a counter to itself."""
    warm = launch.counter(CUDA)
    device.stream, device.capturing = Stream(1), True
    captured = [launch.counter(CUDA) for _ in range(3)]
    assert not device.stream.waited
    assert len({counter.data_ptr() for counter in (warm, *captured)}) == 4
    device.capturing = False
    launch.counter(CUDA)  # the same stream, now in earnest, for which no spare one is left
    assert device.stream.waited == ["zeroed 2"]
