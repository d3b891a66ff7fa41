"""CUDA graphs without a GPU: what is recorded is not made, what is replayed is, and a clock says what it cost."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch


class Emulated:
    """In the place of torch.cuda. Steps go through `make`."""

    def __init__(self, costs: dict[int, float] | None = None) -> None:
        """`costs`: milliseconds of a step by steps a replay; others cost 1."""
        self.lines: list[str] = []
        """What happened, in order."""
        self.replays: list[int] = []
        """Steps in each replay."""
        self.fails: Callable[[int], bool] = lambda size: False
        """Whether graphs of so many steps can't be recorded."""
        self.waits = False
        """Whether each step waits for the device."""
        self._is_broken = False  # by a recording that failed, until one ends well
        self._says_waits = 0
        self._costs, self._clock = costs or {}, 0.0
        self._recording: list[Callable[[], None]] | None = None

    def make(self, step: Callable[[], None]) -> None:
        """A step: made, or recorded."""
        if self._recording is None:
            assert not self._is_broken
            self.lines.append("step")
            if self.waits and self._says_waits:
                warnings.warn("called a synchronizing CUDA operation (Triggered internally at ...)", stacklevel=1)
            step()
            return
        self._recording.append(step)
        if self.fails(len(self._recording)):
            raise RuntimeError("operation not permitted\nand more")

    def install(self, patch: pytest.MonkeyPatch) -> None:
        device = self

        class Stream:
            def __init__(self, *_: Any) -> None: ...

            def wait_stream(self, other: Any) -> None: ...

        class Event:
            def __init__(self, enable_timing: bool = False) -> None: ...

            def record(self, stream: Any) -> None:
                self.at = device._clock

            def synchronize(self) -> None: ...

            def elapsed_time(self, end: Any) -> float:
                return float(end.at - self.at)

        class Graph:
            def __init__(self) -> None:
                self.steps: list[Callable[[], None]] = []

            def replay(self) -> None:
                size = len(self.steps)
                device.lines.append(f"replay {size}")
                device.replays.append(size)
                device._clock += size * device._costs.get(size, 1.0)
                for step in self.steps:
                    step()

        @contextmanager
        def graph(recorded: Graph, pool: Any = None, stream: Any = None) -> Iterator[None]:
            device._recording = recorded.steps
            is_whole = False
            try:
                yield
                is_whole = True
            finally:
                if recorded.steps:  # a recording of nothing puts right what a broken one left
                    device.lines.append(f"record {len(recorded.steps)}")
                device._recording = None
                device._is_broken = not is_whole
                if not is_whole:  # as capture_end does, in torch's own __exit__, before the first error goes on
                    raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

        fakes = {"Stream": Stream, "Event": Event, "CUDAGraph": Graph, "graph": graph}
        for name, fake in fakes.items():
            patch.setattr(torch.cuda, name, fake)
        patch.setattr(torch.cuda, "current_stream", lambda *_: Stream())
        patch.setattr(torch.cuda, "stream", lambda *_: nullcontext())
        patch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
        patch.setattr(torch.cuda, "synchronize", lambda *_: None)
        patch.setattr(torch.cuda, "current_device", lambda: 0)
        patch.setattr(torch.cuda, "get_sync_debug_mode", lambda: device._says_waits)
        patch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: setattr(device, "_says_waits", mode and 1))
