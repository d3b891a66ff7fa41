"""Optimizer steps recorded as CUDA graphs, one or several in each, and which of these a GPU makes quickest."""

import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

import numpy as np
import torch

from ..errors import first_line

WARM_UPS = 3
"""Steps made as they are before one is recorded: libraries choose their kernels, and allocate, when first called."""
SIZES = (1, 4, 8)
"""Steps a replay that are tried. More would gain little, the host being free by then, and let a signal wait longer."""
WINDOW = 16
"""Steps between two readings of the device's clock; a multiple of every size."""
TRIES = 2
"""Windows of each size, in turn. The quicker counts: a graph's first replay also takes it to the device."""
WORTH = 0.99
"""Of the time of fewer steps a replay, what more of them may take at most to be preferred."""


class NotRecorded(RuntimeError):
    """A step could not be recorded as a CUDA graph; nothing was changed by the attempt."""


class Recorded:
    """Steps that a GPU repeats by itself: made as they are at first, then recorded, then replayed.

    How many make a replay is measured on steps of the training itself, so that none is made in vain; whatever it comes
    to, the steps are the same. `addresses` says where a step reads what may move: one that would read elsewhere is
    recorded anew. `obstacle`, asked when steps were made as they are, says why one can't be recorded, if so.
    """

    def __init__(
        self,
        step: Callable[[], None],
        addresses: Callable[[], Sequence[int]],
        device: torch.device,
        obstacle: Callable[[], str | None] = lambda: None,
    ) -> None:
        self._step, self._addresses, self._device, self._obstacle = step, addresses, device, obstacle
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._warm_ups = WARM_UPS
        self._draws_on_host = self._waits = False
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}  # by steps in it
        self._refused: set[int] = set()  # sizes that could not be recorded with the tables of now
        self._pool = torch.cuda.graph_pool_handle()
        self._recorded_at: Sequence[int] = ()
        self._trial = Trial(device)

    @property
    def seconds(self) -> dict[int, float]:
        """What a step took, by steps a replay: {} until all were tried. The first of them was chosen."""
        return self._trial.verdict

    def __call__(self, most: int) -> int:
        """Make the next step, or the next ones, of `most` that can be made now; how many.

        NotRecorded where this would be the first replay, and no replay can be.
        """
        addresses = self._addresses()
        if addresses != self._recorded_at:
            # A graph's memory goes before another's is taken; kernels may be made anew for a table of another size.
            self._graphs, self._recorded_at, self._warm_ups = {}, addresses, max(self._warm_ups, 1)
            self._refused.clear()
            self._pool = torch.cuda.graph_pool_handle()
        if self._warm_ups:
            self._trial.abandon()
            self._warm_up()
            return 1
        self._graph(1)  # what is left of an epoch is made one by one
        size = self._trial.size(most, self._has)
        self._graph(size).replay()
        # Those that lost the trial stay, in memory that they share with the others: where one graph is destroyed, later
        # torch versions (2.12) free what cuBLAS works with in all that were recorded on its stream.
        self._trial.made(size)
        return size

    def _warm_up(self) -> None:
        self._warm_ups -= 1
        drawn = _host_generators(self._device)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream), _waits_told() as told:
            self._step()
        self._waits = bool(told)
        torch.cuda.current_stream(self._device).wait_stream(self._stream)
        self._draws_on_host |= _host_generators(self._device) != drawn

    def _has(self, size: int) -> bool:
        """Whether there is a graph of so many steps, or can be: several may not fit where one does."""
        if size in self._refused:
            return False
        try:
            self._graph(size)
        except NotRecorded:
            self._refused.add(size)
            return False
        return True

    def _graph(self, size: int) -> torch.cuda.CUDAGraph:
        if size not in self._graphs:
            self._graphs[size] = self._record(size)
        return self._graphs[size]

    def _record(self, size: int) -> torch.cuda.CUDAGraph:
        if self._draws_on_host:
            raise NotRecorded("the network draws random numbers on the host, and a replay would repeat them")
        if self._waits:
            raise NotRecorded("an operation of it waits for the device, as one that asks for a number does")
        if (obstacle := self._obstacle()) is not None:
            raise NotRecorded(obstacle)
        graph = torch.cuda.CUDAGraph()
        try:
            # Where the end of a recording fails, torch leaves its stream the current one. Graphs of several sizes share
            # memory: one is replayed at a time, and leaves nothing there to another.
            with (
                torch.cuda.stream(torch.cuda.current_stream(self._device)),
                torch.cuda.graph(graph, pool=self._pool, stream=self._stream),
            ):
                for _ in range(size):
                    self._step()
        except RuntimeError as error:  # an allocation, a library's call that can't be recorded
            recover(self._device, self._pool, self._stream)
            cause = _first_cause(error)
            if not isinstance(cause, Exception):  # whoever interrupts is heeded
                raise cause from None
            raise NotRecorded(first_line(cause)) from error
        return graph


class Trial:
    """Finds out by how many steps a replay a step takes least, from clocks on the device."""

    def __init__(self, device: torch.device) -> None:
        self.best = 1
        self.verdict: dict[int, float] = {}
        """Seconds a step by steps a replay, the best first; empty until it is settled."""
        self._device = device
        self._seconds: dict[int, float] = {}
        self._turns = [size for _ in range(TRIES) for size in SIZES]
        self._left = 0  # steps of the window that is open
        self._start: torch.cuda.Event | None = None

    def size(self, most: int, is_there: Callable[[int], bool]) -> int:
        """Steps of the next replay: at most `most`, and so many that a replay of them `is_there`."""
        if self._turns and not self._left and most >= WINDOW:
            self._turns = [size for size in self._turns if is_there(size)]
            torch.cuda.synchronize(self._device)  # what waits in the queue would hide what launches cost
            self._left, self._start = WINDOW, self._now()
        size = self._turns[0] if self._left else self.best
        if size > most:  # less is left of an epoch, or of what the teacher has seen, than was to come
            self.abandon()
            return 1
        if not is_there(size):
            self.best = size = 1
        return size

    def made(self, steps: int) -> bool:
        """So many were replayed; whether that settled it."""
        if not self._left:
            return False
        self._left -= steps
        if self._left:
            return False
        assert self._start is not None
        end = self._now()
        end.synchronize()  # a handful of times in a generation
        size, seconds = self._turns.pop(0), self._start.elapsed_time(end) / 1000 / WINDOW
        self._seconds[size] = min(seconds, self._seconds.get(size, seconds))
        if self._turns:
            return False
        for size in sorted(self._seconds):
            if self._seconds[size] <= WORTH * self._seconds[self.best]:
                self.best = size
        self.verdict = {size: self._seconds[size] for size in sorted(self._seconds, key=lambda each: each != self.best)}
        return True

    def abandon(self) -> None:
        """Forget the window that is open, if one is: something came between its steps."""
        self._left = 0

    def _now(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event


def recover(device: torch.device, pool: tuple[int, int], stream: torch.cuda.Stream) -> None:
    """Leave behind a recording on `stream`, with memory of `pool`, that failed.

    torch raises at its end before it has told the allocator, which would go on as if one were under way, and, up to
    2.11, the generator, which would refuse to draw. The first can be told; the second is by a recording that ends well.
    """
    with suppress(RuntimeError):  # it was told
        torch._C._cuda_endAllocateToPool(torch.cuda.current_device() if device.index is None else device.index, pool)
    with suppress(RuntimeError), warnings.catch_warnings():  # a device that is lost says so at the next step
        warnings.simplefilter("ignore")  # that nothing was recorded
        with (
            torch.cuda.stream(torch.cuda.current_stream(device)),
            torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream),
        ):
            pass


@contextmanager
def _waits_told() -> Iterator[list[str]]:
    """Collects what torch says of operations inside that wait for the device; other warnings go on as they would."""
    told: list[str] = []
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield told
        finally:
            torch.cuda.set_sync_debug_mode(before)
    for warning in caught:
        if "synchronizing CUDA operation" in str(warning.message):
            told.append(str(warning.message))
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def _first_cause(error: BaseException) -> BaseException:
    """What was raised first: the end of a recording that was broken raises once more, and says that alone."""
    seen = {id(error)}
    while (before := error.__cause__ or error.__context__) is not None and id(before) not in seen:
        seen.add(id(before))
        error = before
    return error


def _host_generators(device: torch.device) -> tuple[object, ...]:
    """Where the generators stand that a network could draw from without the device knowing."""
    _, words, position, *_ = np.random.get_state()
    on_host = b"" if device.type == "cpu" else torch.get_rng_state().numpy().tobytes()
    return random.getstate(), np.asarray(words).tobytes(), position, on_host
