"""The training loop: the batches of one generation, drawn once for all who learn from them."""

import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice

from ..data import Batch
from ..errors import UserError
from .learner import Learner, autocast
from .observer import Interrupted, Observer
from .step_choice import GRAPH
from .teacher import Teacher
from .whole_step import WholeSteps

# On a GPU one asks whether the loss is finite once in so many steps, and reads the answer when asking again; on the CPU
# after every step.
_STEPS_BETWEEN_CHECKS = 50


class Loop:
    """Learners of one generation of one run, or of several that draw the same batches, on to their last step.

    Whoever was saved later than the others waits for them: a kill between two checkpoints leaves them apart.
    """

    def __init__(self, learners: Sequence[Learner], observer: Observer, should_stop: Callable[[], bool]) -> None:
        self._learners = learners
        self._observer, self._should_stop = observer, should_stop
        first = learners[0]
        self._ranks = first.ranks
        self._config, self._loader, self._device, self._number = first.config, first.loader, first.device, first.number
        self._whole = WholeSteps(learners, observer) if first.steps.mode == GRAPH else None
        self._saved_at = time.perf_counter()
        self._clock = self._saved_at

    def run(self) -> None:
        """Go on to the last step. Interrupted if `should_stop` says so, with everything saved."""
        while pending := [learner for learner in self._learners if not learner.is_done]:
            epoch = min(learner.epoch for learner in pending)
            active = [learner for learner in pending if learner.epoch == epoch]
            self.run_epoch(epoch, active)
            self._close_epoch(active)
        for learner in self._learners:
            learner.finish()

    def run_epoch(self, epoch: int, learners: list[Learner]) -> None:
        """What is left of the epoch's batches, learned by each of `learners`."""
        for learner in learners:
            learner.begin_epoch()
        taught_by = [learner.teacher for learner in learners if learner.teacher is not None]
        teachers = list({id(teacher): teacher for teacher in taught_by}.values())
        first, last = min(learner.batch for learner in learners), learners[0].batches(epoch)
        self._clock = time.perf_counter()
        for made in self._steps(epoch, first, last, learners, teachers):
            for number in made:
                self._observer.step(self._number, epoch * learners[0].steps_per_epoch + number + 1)
            stop, is_due = self._ranks.any(self._should_stop(), self._is_due())
            if stop or is_due:
                self._tally(learners)
                self._save()
                if stop:
                    raise Interrupted
                self._clock = time.perf_counter()
        done = min(learner.batch for learner in learners)
        if done < last:
            raise UserError(f"the DataLoader ended after {done} batches; its length says {learners[0].steps_per_epoch}")
        self._tally(learners)

    def _steps(
        self, epoch: int, first: int, last: int, learners: list[Learner], teachers: list[Teacher]
    ) -> Iterator[range]:
        """Make the steps of an epoch's batches; the numbers of those made at once, as they are made."""
        served = last
        if self._whole is not None and len(learners) == len(self._learners):
            served = max(learner.batch for learner in learners)  # until all are where the first of them is
        batches = islice(self._loader.epoch(epoch, first), served - first)
        for number, batch in enumerate(self._prepared(batches, first, teachers), start=first):
            self._step(batch, [learner for learner in learners if learner.batch == number])
            yield range(number, number + 1)
        if self._whole is not None and served < last:
            for made in self._whole.epoch(epoch, served, last):
                for learner in learners:
                    self._check(learner, len(made))
                yield made

    def _prepared(self, batches: Iterator[Batch], first: int, teachers: list[Teacher]) -> Iterator[Batch]:
        """The same batches, each group of them shown to the teachers before.

        A group ends where it would end in an epoch from its beginning: a resumed run asks the same of a teacher.
        """
        for batch in batches:
            size = max((teacher.ahead(batch) for teacher in teachers), default=1)
            group = [batch, *islice(batches, size - first % size - 1)]
            with autocast(self._config, self._device):
                for teacher in teachers:
                    teacher.prepare(group)
            first += len(group)
            yield from group

    def _step(self, batch: Batch, learners: list[Learner]) -> None:
        teachers = {id(learner.teacher): learner.teacher for learner in learners if learner.teacher is not None}
        with autocast(self._config, self._device):
            taught = {key: teacher(batch) for key, teacher in teachers.items()}
        for learner in learners:
            with learner.turn():
                learner.learn(batch, None if learner.teacher is None else taught[id(learner.teacher)])
            self._check(learner)

    def _check(self, learner: Learner, made: int = 1) -> None:
        """Look at the loss, after so many steps more."""
        if self._device.type == "cpu" or learner.step % _STEPS_BETWEEN_CHECKS < made:
            learner.check_loss(late=True)
            if learner.meter.arrived is not None:
                self._observer.loss_arrived(learner.number, learner.objective_name, learner.meter.arrived)

    def _close_epoch(self, learners: list[Learner]) -> None:
        try:
            for learner in learners:
                learner.close_epoch()
        except Interrupted:
            self._save()
            raise
        (is_due,) = self._ranks.any(self._is_due())
        if is_due:
            self._save()

    def _tally(self, learners: list[Learner]) -> None:
        """Each gets its share of the time since the clock was last read."""
        for learner in learners:
            learner.check_loss()  # waits for the device, so that the clock is right
        seconds = (time.perf_counter() - self._clock) / len(learners)
        for learner in learners:
            learner.seconds += seconds

    def _is_due(self) -> bool:
        late = time.perf_counter() - self._saved_at >= self._config.checkpoint_seconds
        return late and any(learner.can_save for learner in self._learners)

    def _save(self) -> None:
        for learner in self._learners:
            learner.save()
        self._saved_at = time.perf_counter()
