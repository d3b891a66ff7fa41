"""A whole optimizer step on tensors that stay where they are, and its recording as a CUDA graph.

`WholeStep` does what the loop and a learner do, from the gather of a batch's images to the update of the weights, and
what changes from step to step it reads on the device: its place in the epoch, the learning rate, the step's number.
Called as it is, it gives the bits that batches served one by one give; recorded, it is one launch.
"""

import random
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from ..data import Batch, MemoryLoader, TensorLoader
from ..errors import OptionError
from .learner import Learner, autocast
from .observer import Observer
from .step_choice import EAGER, GRAPH, StepChoice

WARM_UPS = 3
"""Steps made as they are before one is recorded: libraries choose their kernels, and allocate, when first called."""


class NotRecorded(RuntimeError):
    """A step could not be recorded as a CUDA graph; nothing was changed by the attempt."""


class WholeStep:
    """The steps of a learner whose loader keeps its samples on the training device."""

    def __init__(self, learner: Learner) -> None:
        assert isinstance(learner.loader, (MemoryLoader, TensorLoader))
        self._learner, self._loader = learner, learner.loader
        self.size = learner.loader.whole_batch
        shape = (learner.steps_per_epoch, self.size)
        # order, labels, ids and views of the epoch's batches
        self._epoch = [torch.zeros(shape, dtype=torch.int64, device=learner.device) for _ in range(4)]
        self._rates = torch.zeros(shape[0], dtype=learner.rate.dtype, device=learner.device)
        self._place = torch.zeros(1, dtype=torch.int64, device=learner.device)
        self._ahead: int | None = None

    def begin(self, epoch: int, first: int) -> None:
        """Go on with batch `first` of an epoch."""
        learner = self._learner
        for kept, planned in zip(self._epoch, self._loader.plan(epoch), strict=True):
            kept.copy_(planned[: kept.numel()].view_as(kept))
        start = epoch * learner.steps_per_epoch
        rates = [learner.learning_rate(start + number) for number in range(learner.steps_per_epoch)]
        self._rates.copy_(torch.tensor(rates, dtype=self._rates.dtype))
        self._place.fill_(first)
        for group in learner.optimizer.param_groups:
            group["lr"] = learner.rate
        # A teacher that keeps nothing has nothing to prepare.
        teacher = learner.teacher
        self._ahead = teacher.ahead(self._batch(first)) if teacher is not None and teacher.addresses() else None

    def prepare(self, number: int, last: int) -> int:
        """Let the teacher see batches from `number` on that it does not know yet; for how many that was seen to.

        On a GPU this waits for it, once in all these batches, where a teacher keeps what it said.
        """
        learner, teacher = self._learner, self._learner.teacher
        if teacher is None or self._ahead is None:
            return last - number
        count = min(self._ahead - number % self._ahead, last - number)
        _, _, ids, views = (kept[number : number + count].flatten() for kept in self._epoch)
        if teacher.lacks(ids, views):
            with autocast(learner.config, learner.device):
                teacher.prepare([self._batch(each) for each in range(number, number + count)])
        return count

    def __call__(self) -> None:
        """The next step. On the device alone: no number of it is known to the host before or after."""
        learner = self._learner
        batch = self._gathered([kept.index_select(0, self._place)[0] for kept in self._epoch])
        learner.rate.copy_(self._rates.index_select(0, self._place)[0])
        taught = None
        if learner.teacher is not None:
            with autocast(learner.config, learner.device):
                taught = learner.teacher(batch)
        learner.update(batch, taught)
        self._place += 1

    def _batch(self, number: int) -> Batch:
        return self._gathered([kept[number] for kept in self._epoch])

    def _gathered(self, planned: Sequence[Tensor]) -> Batch:  # 4 times [B]
        order, labels, ids, views = planned
        return Batch(self._loader.gather(order, views), labels, ids, views)


class Recorded:
    """A step that a GPU repeats by itself: made as it is at first, then recorded, then replayed.

    `addresses` says where it reads what may move: a step that would read elsewhere is recorded anew.
    """

    def __init__(self, step: Callable[[], None], addresses: Callable[[], Sequence[int]], device: torch.device) -> None:
        self._step, self._addresses, self._device = step, addresses, device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._warm_ups = WARM_UPS
        self._draws_on_host = False
        self._graph: torch.cuda.CUDAGraph | None = None
        self._recorded_at: Sequence[int] = ()

    def __call__(self) -> None:
        """The next step. NotRecorded where this is the first replay, and no replay can be."""
        addresses = self._addresses()
        if addresses != self._recorded_at:
            # A graph's memory goes before another's is taken; kernels may be made anew for a table of another size.
            self._graph, self._recorded_at, self._warm_ups = None, addresses, max(self._warm_ups, 1)
        if self._warm_ups:
            self._warm_ups -= 1
            drawn = _host_generators(self._device)
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(self._stream):
                self._step()
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
            self._draws_on_host |= _host_generators(self._device) != drawn
            return
        if self._graph is None:
            self._graph = self._record()
        self._graph.replay()

    def _record(self) -> torch.cuda.CUDAGraph:
        if self._draws_on_host:
            raise NotRecorded("the network draws random numbers on the host, and a replay would repeat them")
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self._stream):
                self._step()
        except RuntimeError as error:  # a wait for the device, an allocation, a library's call that can't be recorded
            raise NotRecorded(str(error).strip().split("\n")[0]) from error
        return graph


def _host_generators(device: torch.device) -> tuple[object, ...]:
    """Where the generators stand that a network could draw from without the device knowing."""
    _, words, position, *_ = np.random.get_state()
    on_host = b"" if device.type == "cpu" else torch.get_rng_state().numpy().tobytes()
    return random.getstate(), np.asarray(words).tobytes(), position, on_host


class WholeSteps:
    """The steps of a learner's epochs, each recorded where that can be, else made as it is: the same bits."""

    def __init__(self, learner: Learner, observer: Observer) -> None:
        self._learner, self._observer = learner, observer
        self._whole = WholeStep(learner)
        self._step: Callable[[], None] = Recorded(self._whole, self._addresses, learner.device)

    def epoch(self, epoch: int, first: int, last: int) -> Iterator[int]:
        """Make the steps of batches `first` to `last` - 1; their numbers, as they are made."""
        if first == last:  # resumed where only the epoch's evaluation was left
            return
        self._whole.begin(epoch, first)
        ready = first
        for number in range(first, last):
            if number == ready:
                ready += self._whole.prepare(number, last)
            self._make()
            self._learner.advance(self._whole.size)
            yield number

    def _make(self) -> None:
        try:
            self._step()
        except NotRecorded as error:
            learner = self._learner
            if learner.config.steps == GRAPH:
                raise OptionError("step", f"a step can't be recorded as a CUDA graph ({error}); use eager") from error
            learner.optimizer.zero_grad()
            learner.steps = StepChoice(EAGER, f"a step can't be recorded as a CUDA graph: {error}")
            self._observer.message(f"steps are made one operation at a time: {learner.steps.reason}")
            self._step = self._whole
            self._step()

    def _addresses(self) -> Sequence[int]:
        """Where the teacher's kept rows lie now: they move as they become more."""
        teacher = self._learner.teacher
        found = () if teacher is None else teacher.addresses()
        assert found is not None, "rows that are not on the device can't be read in a recorded step"
        return found
