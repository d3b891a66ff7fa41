"""A whole optimizer step on tensors that stay where they are, and its recording as a CUDA graph.

`WholeStep` does what the loop and its learners do, from the gather of a batch's images to the update of the weights,
and what changes from step to step it reads on the device: its place in the epoch, learning rates, the step's number.
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
from .teacher import Taught, Teacher


class WholeStep:
    """The steps of learners who draw the same batches, of a loader that keeps its samples on the training device."""

    def __init__(self, learners: Sequence[Learner]) -> None:
        first = learners[0]
        assert isinstance(first.loader, (MemoryLoader, TensorLoader))
        self._learners, self._loader = learners, first.loader
        self._config, self._device = first.config, first.device
        taught_by = [learner.teacher for learner in learners if learner.teacher is not None]
        self._teachers: list[Teacher] = list({id(teacher): teacher for teacher in taught_by}.values())
        self.size = first.loader.whole_batch
        self._steps = first.steps_per_epoch
        # order, labels, ids and views of the epoch's batches
        self._epoch = torch.zeros(4, self._steps, self.size, dtype=torch.int64, device=self._device)
        self._rates = torch.zeros(len(learners), self._steps, dtype=first.rate.dtype, device=self._device)
        self._place = torch.zeros(1, dtype=torch.int64, device=self._device)
        self._ahead: int | None = None
        self._unknown: list[bool] = []
        self._draw_alone = False

    def begin(self, epoch: int, first: int) -> None:
        """Go on with batch `first` of an epoch. On a GPU this waits for it, where a teacher keeps what it said."""
        for kept, planned in zip(self._epoch, self._loader.plan(epoch), strict=True):
            kept.copy_(planned[: kept.numel()].view_as(kept))
        numbers = range(epoch * self._steps, (epoch + 1) * self._steps)
        rates = [[learner.learning_rate(number) for number in numbers] for learner in self._learners]
        self._rates.copy_(torch.tensor(rates, dtype=self._rates.dtype))
        self._place.fill_(first)
        for learner in self._learners:
            for group in learner.optimizer.param_groups:
                group["lr"] = learner.rate
        # A teacher that keeps nothing has nothing to prepare.
        keeping = [teacher for teacher in self._teachers if teacher.addresses()]
        self._ahead = max((teacher.ahead(self._batch(first)) for teacher in keeping), default=None)
        # An epoch shows each sample once: none of its batches makes what another asks for known.
        _, _, ids, views = self._epoch
        unknown = torch.zeros_like(ids, dtype=torch.bool)
        for teacher in keeping:
            unknown |= teacher.lacks(ids.flatten(), views.flatten()).view(ids.shape)
        self._unknown = unknown.any(1).tolist() if keeping else []

    def prepare(self, number: int, last: int) -> int:
        """Let teachers see batches from `number` on that they don't know yet; for how many that was seen to.

        On a GPU this waits for it where there is something to be seen, once in as many batches as are seen at a time.
        """
        if self._ahead is None:
            return last - number
        end = min(number - number % self._ahead + self._ahead, last)
        if any(self._unknown[number:end]):
            batches = [self._batch(each) for each in range(number, end)]
            with autocast(self._config, self._device):
                for teacher in self._teachers:
                    teacher.prepare(batches)
        while end < last and not self._unknown[end]:
            end += 1
        return end - number

    def __call__(self) -> None:
        """The next step. On the device alone: no number of it is known to the host before or after."""
        for learner in self._learners:
            learner.abandon()  # where recording failed midway
        batch = self._gathered(self._epoch.index_select(1, self._place)[:, 0])
        with autocast(self._config, self._device):
            taught = {id(teacher): teacher(batch) for teacher in self._teachers}
        for learner, rates in zip(self._learners, self._rates, strict=True):
            torch.index_select(rates, 0, self._place, out=learner.rate.view(1))
            with learner.turn():
                learner.update(batch, self._said(learner, taught))
            self._draw_alone |= learner.drew_alone
        self._place += 1

    def addresses(self) -> Sequence[int]:
        """Where the teachers' kept rows lie now: they move as they become more."""
        return [address for teacher in self._teachers for address in teacher.addresses()]

    def obstacle(self) -> str | None:
        """Why steps like those that were made can't be recorded, if so."""
        if self._draw_alone:
            return "students side by side draw from generators of their own, and a CUDA graph has one"
        return None

    @staticmethod
    def _said(learner: Learner, taught: dict[int, Taught]) -> Taught | None:
        return None if learner.teacher is None else taught[id(learner.teacher)]

    def _batch(self, number: int) -> Batch:
        return self._gathered(self._epoch[:, number])

    def _gathered(self, planned: Tensor) -> Batch:  # [4, B]
        order, labels, ids, views = planned
        return Batch(self._loader.gather(order, views), labels, ids, views)


class WholeSteps:
    """The steps of learners' epochs, recorded where that can be, else made as they are: the same bits."""

    def __init__(self, learners: Sequence[Learner], observer: Observer) -> None:
        self._learners, self._observer = learners, observer
        self._whole = whole = WholeStep(learners)
        self._recorded: Recorded | None = Recorded(whole, whole.addresses, learners[0].device, whole.obstacle)

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
            for learner in self._learners:
                learner.advance(self._whole.size * len(made), len(made))
            number = made.stop
            yield made

    def _make(self, most: int) -> int:
        """The next step, or the next ones, `most` of them at most; how many."""
        if self._recorded is not None:
            try:
                made = self._recorded(most)
            except NotRecorded as error:
                if self._learners[0].config.steps == GRAPH:
                    raise OptionError(
                        "step", f"a step can't be recorded as a CUDA graph ({error}); use eager"
                    ) from error
                self._recorded = None
                choice = StepChoice(EAGER, f"a step can't be recorded as a CUDA graph: {error}")
                self._choose(choice)
                self._observer.message(f"steps are made one operation at a time: {choice.reason}")
            else:
                choice = self._learners[0].steps
                if choice.a_replay is None and (seconds := self._recorded.seconds):
                    self._choose(choice._replace(a_replay=next(iter(seconds))))
                    self._observer.message(replays_sentence(seconds))
                return made
        self._whole()
        return 1

    def _choose(self, choice: StepChoice) -> None:
        for learner in self._learners:
            learner.steps = choice
