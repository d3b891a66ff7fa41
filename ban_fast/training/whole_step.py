"""A whole optimizer step on tensors that stay where they are, and its recording as a CUDA graph.

`WholeStep` does what the loop and a learner do, from the gather of a batch's images to the update of the weights, and
what changes from step to step it reads on the device: its place in the epoch, the learning rate, the step's number.
Called as it is, it gives the bits that batches served one by one give; recorded (`recorded.py`), it is one launch, or
several of it are.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..data import Batch, MemoryLoader, TensorLoader
from ..errors import OptionError
from .learner import Learner, autocast
from .observer import Observer
from .recorded import NotRecorded, Recorded
from .step_choice import EAGER, GRAPH, StepChoice, replays_sentence


class WholeStep:
    """The steps of a learner whose loader keeps its samples on the training device."""

    def __init__(self, learner: Learner) -> None:
        assert isinstance(learner.loader, (MemoryLoader, TensorLoader))
        self._learner, self._loader = learner, learner.loader
        self.size = learner.loader.whole_batch
        steps = learner.steps_per_epoch
        # order, labels, ids and views of the epoch's batches
        self._epoch = torch.zeros(4, steps, self.size, dtype=torch.int64, device=learner.device)
        self._rates = torch.zeros(steps, dtype=learner.rate.dtype, device=learner.device)
        self._place = torch.zeros(1, dtype=torch.int64, device=learner.device)
        self._ahead: int | None = None
        self._unknown: list[bool] = []

    def begin(self, epoch: int, first: int) -> None:
        """Go on with batch `first` of an epoch. On a GPU this waits for it, where a teacher keeps what it said."""
        learner, (_, steps, _) = self._learner, self._epoch.shape
        for kept, planned in zip(self._epoch, self._loader.plan(epoch), strict=True):
            kept.copy_(planned[: kept.numel()].view_as(kept))
        rates = [learner.learning_rate(epoch * steps + number) for number in range(steps)]
        self._rates.copy_(torch.tensor(rates, dtype=self._rates.dtype))
        self._place.fill_(first)
        for group in learner.optimizer.param_groups:
            group["lr"] = learner.rate
        # A teacher that keeps nothing has nothing to prepare.
        teacher = learner.teacher
        if teacher is None or not teacher.addresses():
            self._ahead = None
            return
        self._ahead = teacher.ahead(self._batch(first))
        # An epoch shows each sample once: none of its batches makes what another asks for known.
        _, _, ids, views = self._epoch
        self._unknown = teacher.lacks(ids.flatten(), views.flatten()).view(ids.shape).any(1).tolist()

    def prepare(self, number: int, last: int) -> int:
        """Let the teacher see batches from `number` on that it does not know yet; for how many that was seen to.

        On a GPU this waits for it where there is something to be seen, once in as many batches as it sees at a time.
        """
        learner, teacher = self._learner, self._learner.teacher
        if teacher is None or self._ahead is None:
            return last - number
        end = min(number - number % self._ahead + self._ahead, last)
        if any(self._unknown[number:end]):
            with autocast(learner.config, learner.device):
                teacher.prepare([self._batch(each) for each in range(number, end)])
        while end < last and not self._unknown[end]:
            end += 1
        return end - number

    def __call__(self) -> None:
        """The next step. On the device alone: no number of it is known to the host before or after."""
        learner = self._learner
        learner.abandon()  # where recording failed midway
        batch = self._gathered(self._epoch.index_select(1, self._place)[:, 0])
        torch.index_select(self._rates, 0, self._place, out=learner.rate.view(1))
        taught = None
        if learner.teacher is not None:
            with autocast(learner.config, learner.device):
                taught = learner.teacher(batch)
        learner.update(batch, taught)
        self._place += 1

    def _batch(self, number: int) -> Batch:
        return self._gathered(self._epoch[:, number])

    def _gathered(self, planned: Tensor) -> Batch:  # [4, B]
        order, labels, ids, views = planned
        return Batch(self._loader.gather(order, views), labels, ids, views)


class WholeSteps:
    """The steps of a learner's epochs, recorded where that can be, else made as they are: the same bits."""

    def __init__(self, learner: Learner, observer: Observer) -> None:
        self._learner, self._observer = learner, observer
        self._whole = WholeStep(learner)
        self._recorded: Recorded | None = Recorded(self._whole, self._addresses, learner.device)

    def epoch(self, epoch: int, first: int, last: int) -> Iterator[range]:
        """Make the steps of batches `first` to `last` - 1; the numbers of those made at once, as they are made."""
        if first == last:  # resumed where only the epoch's evaluation was left
            return
        self._whole.begin(epoch, first)
        number = ready = first
        while number < last:
            if number == ready:
                ready += self._whole.prepare(number, last)
            made = range(number, number + self._make(ready - number))
            self._learner.advance(self._whole.size * len(made), len(made))
            number = made.stop
            yield made

    def _make(self, most: int) -> int:
        """The next step, or the next ones, `most` of them at most; how many."""
        learner = self._learner
        if self._recorded is not None:
            try:
                made = self._recorded(most)
            except NotRecorded as error:
                if learner.config.steps == GRAPH:
                    raise OptionError(
                        "step", f"a step can't be recorded as a CUDA graph ({error}); use eager"
                    ) from error
                learner.steps = StepChoice(EAGER, f"a step can't be recorded as a CUDA graph: {error}")
                self._observer.message(f"steps are made one operation at a time: {learner.steps.reason}")
                self._recorded = None
            else:
                if learner.steps.a_replay is None and (seconds := self._recorded.seconds):
                    learner.steps = learner.steps._replace(a_replay=next(iter(seconds)))
                    self._observer.message(replays_sentence(seconds))
                return made
        self._whole()
        return 1

    def _addresses(self) -> Sequence[int]:
        """Where the teacher's kept rows lie now: they move as they become more."""
        teacher = self._learner.teacher
        found = () if teacher is None else teacher.addresses()
        assert found is not None, "rows that are not on the device can't be read in a recorded step"
        return found
