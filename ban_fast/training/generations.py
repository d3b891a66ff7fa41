"""The sequence of teaching selves (Furlanello et al. 2018, eqs. 1-4): a teacher, its students, and their vote."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..config import Config
from ..errors import UserError
from .compiled import check_compiler, compiled
from .environment import device_name, differences, environment
from .evaluator import TEST, Evaluator
from .loop import Generation, objective_name, total_steps
from .objectives import needs_teacher
from .observer import Interrupted, Observer, Plan
from .results import Results
from .run_store import RunStore, empty_results
from .seeds import generation_seed, isolated
from .task import CUSTOM, ModelFactory, Samples, Task, build, make_task, network_factory, training_device, with_own
from .teacher import LiveTeacher


def run(
    config: Config,
    *,
    model: ModelFactory | None = None,
    train: Samples | None = None,
    test: Samples | None = None,
    validation: Samples | None = None,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    observer: Observer | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> Results:
    """Train a teacher and `config.generations` students, each on the outputs of the one before, and let them vote.

    `model` builds a fresh network of the caller's own; `train`, `test` and `validation` are its data, each two tensors
    (x [N, ...], y [N]) or a DataLoader of such batches. What is left out, `config` says. Without `test` there are no
    test figures. `out` is the run directory (None: no files), `resume` goes on with the run in it, or returns its
    results if it is finished. `should_stop` is asked after every step: where it is true, all is saved and Interrupted
    is raised. The caller's random generators are left as found.

    UserError: data, network or options that don't fit each other, a directory in use, a damaged or another run's
    checkpoint, a loss that is not finite, a full disk.
    """
    config = with_own(config, model, train, [test, validation])
    config.validate()
    observer = observer or Observer()
    should_stop = should_stop or _never
    with ExitStack() as stack:
        store = None if out is None else stack.enter_context(RunStore(out))
        if resume:
            if store is None:
                raise UserError("resume=True needs out=, the directory of the run to go on with")
            store.reopen(config)
            if len(store.results["generations"]) > config.generations:
                return Results(store.results, lambda: _stored_networks(config, store, model))
        elif store is not None:
            store.refuse_existing()
        device = training_device(config.device)
        stack.enter_context(isolated(device))
        stack.enter_context(_tuned_convolutions())
        task = make_task(config, device, model=model, train=train, test=test, validation=validation)
        if config.compile:
            check_compiler(device)
        if store is not None:
            _begin(store, config, task, resume, observer)
        return _Lineage(config, task, store, observer, should_stop).grow()


class _Lineage:
    """The generations of one run, in the making."""

    def __init__(
        self,
        config: Config,
        task: Task,
        store: RunStore | None,
        observer: Observer,
        should_stop: Callable[[], bool],
    ) -> None:
        self.config, self.task, self.store = config, task, store
        self.observer, self.should_stop = observer, should_stop
        self.evaluator = Evaluator(task.evaluation, task.device, config.seed, should_stop)
        self.results: dict[str, Any] = empty_results() if store is None else store.results
        self.networks: dict[int, nn.Module] = {}
        self.trained: set[int] = set()  # ids of the parameters of `networks` that were trained
        self.test_logits: dict[int, Tensor] = {}

    def grow(self) -> Results:
        finished = len(self.results["generations"])
        self.observer.run_started(self.config, self._plan(finished))
        for number in range(finished, self.config.generations + 1):
            if self.should_stop():
                raise Interrupted
            self._grow_generation(number)
        return Results(self.results, self._all_networks)

    def _grow_generation(self, number: int) -> None:
        seed = generation_seed(self.config.seed, number)
        network = self._fresh_network(seed)
        teacher = self._teacher(number)
        files = None if self.store is None else self.store.generation(number)
        generation = Generation(
            self.config,
            self.task,
            number=number,
            seed=seed,
            network=network,
            teacher=teacher,
            evaluator=self.evaluator,
            files=files,
            observer=self.observer,
            should_stop=self.should_stop,
        )
        if files is not None and (state := files.load_state()) is not None:
            generation.restore(state)
        self.observer.generation_started(number, generation.objective_name, generation.total_steps, generation.step)
        generation.train()

        network.eval().requires_grad_(False)
        self.networks[number] = network
        record = generation.record()
        logits = {
            split: generation.last_logits[split]
            if split in generation.last_logits
            else self.evaluator.logits(network, split)
            for split in self.evaluator.splits
        }
        record |= self.evaluator.record(logits)
        if TEST in logits:
            self.test_logits[number] = logits[TEST]
        if files is not None:
            record["model_sha256"] = files.save_model(network)
        self._finish(record)

    def _finish(self, record: dict[str, Any]) -> None:
        """Once results.json has its record, a generation is never trained again."""
        number = record["generation"]
        ensembles = self._ensembles(number)
        self.results["generations"].append(record)
        self.results["ensembles"].extend(ensembles)
        if self.store is not None:
            self.store.save_results()
        self.observer.generation_finished(number, record)

    def _ensembles(self, newest: int) -> list[dict[str, Any]]:
        """The prefix of students that ends with the newest (eq. 4; the teacher, generation 0, is not among them)."""
        if newest < 2 or TEST not in self.evaluator.splits:
            return []
        members = list(range(1, newest + 1))
        for member in members:
            if member not in self.test_logits:
                self.test_logits[member] = self.evaluator.logits(self._network(member), TEST)
        return self.evaluator.ensembles(members, [self.test_logits[member] for member in members])

    def _fresh_network(self, seed: int) -> nn.Module:
        network = self.task.network(seed)
        if any(id(parameter) in self.trained for parameter in network.parameters()):
            raise UserError(
                "model= returned parameters that it returned before: it must build a new network each time, or the "
                "student would overwrite its teacher"
            )
        self.trained |= {id(parameter) for parameter in network.parameters() if parameter.requires_grad}
        return network

    def _teacher(self, number: int) -> LiveTeacher | None:
        if not needs_teacher(objective_name(self.config, number)):
            return None
        network = self._network(number - 1)
        return LiveTeacher(network, compiled(network) if self.config.compile else None)

    def _network(self, number: int) -> nn.Module:
        """A finished generation's network, in hand or read from its file."""
        if number not in self.networks:
            assert self.store is not None
            network = self._fresh_network(generation_seed(self.config.seed, number))
            self.store.load_network(number, network)
            self.networks[number] = network.eval().requires_grad_(False)
        return self.networks[number]

    def _all_networks(self) -> list[nn.Module]:
        with isolated(self.task.device):
            return [self._network(number) for number in range(self.config.generations + 1)]

    def _plan(self, finished: int) -> Plan:
        steps_per_epoch = self.task.shape["steps_per_epoch"]
        steps = total_steps(self.config, steps_per_epoch)
        return Plan(
            generations=self.config.generations + 1,
            finished=finished,
            steps=steps,
            steps_per_epoch=steps_per_epoch,
            epochs=-(-steps // steps_per_epoch),
            parameters=self.task.shape["parameters"],
            device=device_name(self.task.device),
        )


def _begin(store: RunStore, config: Config, task: Task, resume: bool, observer: Observer) -> None:
    """Put the run down, or make sure that it is the one to go on with."""
    now = environment(task.device, task.shape)
    if not resume:
        store.create(config, now)
    store.identify(config, task.shape, task.structure)
    assert store.environment is not None
    if changed := differences(store.environment, now):
        observer.message(
            f"resumed on another footing ({'; '.join(changed)}): the weights will differ from an uninterrupted run's"
        )


def _stored_networks(config: Config, store: RunStore, model: ModelFactory | None) -> list[nn.Module]:
    """The networks of a finished run, on the CPU; needs none of its data."""
    if model is None and config.model.name == CUSTOM:
        raise UserError("this run's network was the caller's own: pass its factory as model=")
    assert store.environment is not None
    shape, cpu = store.environment["shape"], torch.device("cpu")
    factory = model or network_factory(config.model, shape)
    networks = []
    for number in range(len(store.results["generations"])):
        with isolated(cpu):
            network = build(factory, shape, cpu, channels_last=False)
        store.load_network(number, network)
        networks.append(network.eval().requires_grad_(False))
    return networks


@contextmanager
def _tuned_convolutions() -> Iterator[None]:
    """cuDNN tries its algorithms once for each of a run's few shapes; the caller's setting is put back."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def _never() -> bool:
    return False
