"""One run's selves: what is known of those that are finished, and how the next one begins and ends."""

import copy
from typing import Any

from torch import Tensor, nn

from ..config import Config
from ..data import Loader
from ..errors import UserError
from .evaluator import TEST, Evaluator
from .learner import Learner
from .observer import Observer
from .results import Results
from .run_store import RunStore, empty_results
from .seeds import generation_seed, isolated
from .task import Task
from .teacher import Teacher


class Lineage:
    """The generations of one run, in the making."""

    def __init__(
        self,
        config: Config,
        task: Task,
        store: RunStore | None,
        evaluator: Evaluator,
        observer: Observer,
        trained: set[int] | None = None,
    ) -> None:
        """`trained`: ids of parameters that were trained; runs in one process that share a teacher share it too."""
        self.config, self.task, self.store = config, task, store
        self.evaluator, self.observer = evaluator, observer
        self.results: dict[str, Any] = empty_results() if store is None else store.results
        self._networks: dict[int, nn.Module] = {}
        self._trained: set[int] = set() if trained is None else trained
        self._test_outputs: dict[int, Tensor] = {}

    @property
    def finished(self) -> int:
        """Generations that are in results.json: they are never trained again."""
        return len(self.results["generations"])

    def has_begun(self, number: int) -> bool:
        """Whether a generation has a checkpoint; without results.json, later ones than are finished may."""
        return self.store is not None and self.store.has_checkpoint(number)

    def teacher_before(self, number: int) -> str | None:
        """The mode that "auto" chose for a generation's teacher, if the generation has a checkpoint."""
        if self.store is None or self.config.teacher.mode != "auto":
            return None
        state = self.store.generation(number).load_state()
        return None if state is None or state["teacher"] is None else state["teacher"].get("mode")

    def learner(self, number: int, loader: Loader, teacher: Teacher | None, together: bool) -> Learner:
        """Generation `number`, from fresh weights or where its checkpoint left it."""
        seed = generation_seed(self.config.seed, number)
        files = None if self.store is None else self.store.generation(number)
        learner = Learner(
            self.config,
            self.task,
            loader,
            number=number,
            seed=seed,
            network=self._fresh_network(seed),
            teacher=teacher,
            evaluator=self.evaluator,
            files=files,
            observer=self.observer,
            together=together,
        )
        if files is not None and (state := files.load_state()) is not None:
            learner.restore(state)
        return learner

    def conclude(self, learner: Learner) -> None:
        """Evaluate a generation that was trained, and put it down."""
        number, network = learner.number, learner.network.eval().requires_grad_(False)
        self._networks[number] = network
        record = learner.record()
        last = learner.last_outputs
        outputs = {
            split: last[split] if split in last else self.evaluator.outputs(network, split)
            for split in self.evaluator.splits
        }
        record |= self.evaluator.record(outputs)
        if TEST in outputs:
            self._test_outputs[number] = outputs[TEST]
        if learner.files is not None:
            record["model_sha256"] = learner.files.save_model(network)
        self._put_down(record)
        self.observer.generation_finished(number, record)

    def adopt_teacher(self, other: "Lineage") -> None:
        """Take over generation 0 of a run that differs from this one in what its students learn from alone."""
        network = other.network(0)
        if self.store is not None:
            assert other.store is not None
            files = self.store.generation(0)
            files.copy_from(other.store.generation(0))
            files.save_model(network)
        self._networks[0] = network
        self._test_outputs |= {number: z for number, z in other._test_outputs.items() if number == 0}
        self._put_down(copy.deepcopy(other.results["generations"][0]))

    def _put_down(self, record: dict[str, Any]) -> None:
        number = record["generation"]
        ensembles = self._ensembles(number)
        self.results["generations"].append(record)
        self.results["ensembles"].extend(ensembles)
        if self.store is not None:
            self.store.save_results()

    def _ensembles(self, newest: int) -> list[dict[str, Any]]:
        """The prefix of students that ends with the newest (eq. 4; the teacher, generation 0, is not among them)."""
        if newest < 2 or TEST not in self.evaluator.splits:
            return []
        members = list(range(1, newest + 1))
        for member in members:
            if member not in self._test_outputs:
                self._test_outputs[member] = self.evaluator.outputs(self.network(member), TEST)
        return self.evaluator.ensembles(members, [self._test_outputs[member] for member in members])

    def network(self, number: int) -> nn.Module:
        """A finished generation's network, in hand or read from its file."""
        if number not in self._networks:
            assert self.store is not None
            network = self._fresh_network(generation_seed(self.config.seed, number))
            self.store.load_network(number, network)
            self._networks[number] = network.eval().requires_grad_(False)
        return self._networks[number]

    def _fresh_network(self, seed: int) -> nn.Module:
        network = self.task.network(seed)
        if any(id(parameter) in self._trained for parameter in network.parameters()):
            raise UserError(
                "model= returned parameters that it returned before: it must build a new network each time, or the "
                "student would overwrite its teacher"
            )
        self._trained |= {id(parameter) for parameter in network.parameters() if parameter.requires_grad}
        return network

    def as_results(self) -> Results:
        """What `run` returns."""
        return Results(self.results, self._all_networks)

    def _all_networks(self) -> list[nn.Module]:
        with isolated(self.task.device):
            return [self.network(number) for number in range(self.config.generations + 1)]
