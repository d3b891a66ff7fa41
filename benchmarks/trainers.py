"""Who trains in the whole-step benchmark: the way of public implementations, the best composed of torch's parts, ours.

A trainer owns a network, an optimizer and a loader of the same images. All networks start from the same weights, all
teachers have the same. `epoch` is its training loop as it is; `parts` are the calls that the loop is made of.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ban_fast import models
from ban_fast.config import Config, ObjectiveConfig, OptimizerConfig
from ban_fast.data import Augmentation, Batch, Split, open_loader
from ban_fast.data.cifar import MEAN, STD
from ban_fast.training.cache_store import MemoryRows
from ban_fast.training.evaluator import Evaluator, ImageEvaluator
from ban_fast.training.generations import never
from ban_fast.training.learner import Learner, autocast
from ban_fast.training.loop import Loop
from ban_fast.training.observer import Observer
from ban_fast.training.reader import Forward
from ban_fast.training.task import Task
from ban_fast.training.teacher import LiveTeacher, Teacher
from ban_fast.training.teacher_cache import CachedTeacher
from ban_fast.training.teacher_folding import answering
from benchmarks.loaders import PADDING, torchvision_loader
from benchmarks.step_figures import CACHED, COMPILED, COMPOSED, EAGER, LIVE, NAIVE, SUPERVISED, Case

CLASSES = 100
# A rate that hardly moves the weights: random labels must not lead anyone to numbers that are slow to compute with.
OPTIMIZER: dict[str, Any] = {"lr": 1e-3, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}


class Trainer:
    """Born-again training steps of one student: naive, unless a subclass knows better.

    fp32, eager; images by torchvision's transforms in a DataLoader; the loss of a textbook; the loss read every step.
    """

    device: torch.device

    def __init__(self, case: Case, split: Split, device: torch.device) -> None:
        self.case, self.device = case, device
        self.network, self.teacher_network = networks(case, device, **self._options(case))
        self._open(split)

    def _options(self, case: Case) -> dict[str, Any]:
        """Of the networks."""
        return {}

    def _open(self, split: Split) -> None:
        self._loader = torchvision_loader(split.images, split.labels, self.case.batch)
        self._optimizer = torch.optim.SGD(self.network.parameters(), **OPTIMIZER)
        self._running = 0.0

    def batches(self) -> Iterator[Batch]:
        """An epoch's, on the device."""
        for images, labels in self._loader:
            labels = labels.to(self.device)
            yield Batch(images.to(self.device), labels, labels, labels)  # nobody here asks for ids and views

    def teach(self, batch: Batch) -> Any:
        """What the teacher says of a batch."""
        with torch.no_grad():
            return self.teacher_network(batch.images)

    def forward(self, images: Tensor) -> Tensor:  # [B, 3, 32, 32] -> [B, C]
        logits: Tensor = self.network(images)
        return logits

    def loss(self, logits: Tensor, taught: Any, batch: Batch) -> Tensor:
        return textbook_loss(logits, taught)

    def update(self) -> None:
        self._optimizer.step()
        self._optimizer.zero_grad()

    def epoch(self) -> None:
        """The training loop over all batches."""
        for batch in self.batches():
            loss = self.loss(self.forward(batch.images), self.teach(batch), batch)
            loss.backward()
            self.update()
            self._running += loss.item()


class Composed(Trainer):
    """The best of what torch offers, put together by hand: see `_open`."""

    def _open(self, split: Split) -> None:
        on_gpu = self.device.type == "cuda"
        self._precision = torch.autocast(self.device.type, torch.bfloat16, enabled=on_gpu)
        for network in (self.network, self.teacher_network):
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        # On a GPU this tries kernels and records CUDA graphs; on a CPU it would only take longer to compile.
        mode = "max-autotune" if on_gpu else None
        self._forward = torch.compile(self.network, mode=mode, dynamic=False)
        self._teach = torch.compile(self.teacher_network, mode=mode, dynamic=False)
        self._loss = torch.compile(textbook_loss, mode=mode, dynamic=False)
        self._optimizer = torch.optim.SGD(self.network.parameters(), fused=True, **OPTIMIZER)
        self._images = DeviceImages(split, self.case.batch, self.device)
        self._sum = torch.zeros((), device=self.device)

    def batches(self) -> Iterator[Batch]:
        for batch in self._images.epoch():
            if self.device.type == "cuda":
                torch.compiler.cudagraph_mark_step_begin()
            yield batch

    def teach(self, batch: Batch) -> Tensor:
        with torch.no_grad(), self._precision:
            logits: Tensor = self._teach(batch.images)
            return logits

    def forward(self, images: Tensor) -> Tensor:
        with self._precision:
            return self._forward(images)

    def loss(self, logits: Tensor, taught: Tensor, batch: Batch) -> Tensor:
        return self._loss(logits, taught)

    def epoch(self) -> None:
        for batch in self.batches():
            loss = self.loss(self.forward(batch.images), self.teach(batch), batch)
            loss.backward()
            self.update()
            self._sum += loss.detach()


class Ours(Trainer):
    """ban_fast's own loop and learner, as `ban-fast train` runs them."""

    def __init__(
        self,
        case: Case,
        split: Split,
        device: torch.device,
        *,
        objective: str = "ban",
        cached: bool = False,
        step: str = "auto",
    ) -> None:
        self._objective, self._cached, self._step = objective, cached, step
        super().__init__(case, split, device)

    def _options(self, case: Case) -> dict[str, Any]:
        return {"memory": "shared"} if case.network.startswith("densenet") else {}

    def _open(self, split: Split) -> None:
        on_gpu = self.device.type == "cuda"
        self._config = Config(
            objective=ObjectiveConfig(name=self._objective),
            optimizer=OptimizerConfig(schedule="constant", **OPTIMIZER),
            epochs=10**6,
            batch_size=self.case.batch,
            amp="bf16" if on_gpu else "off",
            channels_last=True,
            step=self._step,
        )
        for network in (self.network, self.teacher_network):
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        augmentation = Augmentation(padding=PADDING, fill="zero")
        self._loader = open_loader(
            split,
            batch_size=self.case.batch,
            mean=MEAN,
            std=STD,
            device=self.device,
            augmentation=augmentation,
            channels_last=self._config.channels_last,
        )
        self._teacher = self._make_teacher(len(split), augmentation.views)
        task = self._task()
        self._learner = Learner(
            self._config,
            task,
            self._loader,
            number=1,
            seed=0,
            network=self.network,
            teacher=self._teacher,
            evaluator=task.evaluator(0, never),
            files=None,
            observer=Observer(),
        )
        self._loop = Loop([self._learner], Observer(), never)

    def _task(self) -> Task:
        """What a learner is told of its data and network: nothing is evaluated, and no other network is built."""

        def evaluator(seed: int, should_stop: Callable[[], bool]) -> Evaluator:
            return ImageEvaluator({}, self.device, seed, should_stop)

        return Task(
            device=self.device,
            train=lambda seed: self._loader,
            evaluator=evaluator,
            reader=Forward,
            factory=lambda: self.network,
            channels_last=self._config.channels_last,
            shape={"classes": CLASSES},
            structure="",
            has_batch_norm=True,
            views=None,
            rows_per_step=self.case.batch,
        )

    def _make_teacher(self, samples: int, views: int) -> Teacher | None:
        if self._objective == "label":
            return None
        images = lambda: next(iter(self._loader.epoch(0))).images  # noqa: E731
        network, is_folded, _ = answering(self.teacher_network, self._config, self.device, images)
        if not self._cached:
            return LiveTeacher(self.teacher_network, Forward(network), is_folded=is_folded)
        return CachedTeacher(
            self.teacher_network,
            Forward(network),
            is_folded=is_folded,
            rows=MemoryRows(CLASSES, torch.float32, self.device),
            samples=samples,
            views=views,
            batch_size=self.case.batch,
            device=self.device,
        )

    def batches(self) -> Iterator[Batch]:
        return self._loader.epoch(0)

    def teach(self, batch: Batch) -> Any:
        if self._teacher is None:
            return None
        with autocast(self._config, self.device):
            self._teacher.prepare([batch])
            return self._teacher(batch)

    def forward(self, images: Tensor) -> Tensor:
        with autocast(self._config, self.device):
            return self._learner.reader(images)

    def loss(self, logits: Tensor, taught: Any, batch: Batch) -> Tensor:
        return self._learner.objective(logits, taught, batch, self._learner.step_on_device).loss

    def update(self) -> None:
        self._learner.optimizer.step()
        self._learner.optimizer.zero_grad()

    def epoch(self) -> None:
        """Epoch 0 ever again: the views that it shows are in the cache after the first time."""
        self._loop.run_epoch(0, [self._learner])
        self._learner.batch = 0


class DeviceImages:
    """The composed baseline's loader: normalised images on the device, random crops and flips by one gather a batch."""

    def __init__(self, split: Split, batch: int, device: torch.device) -> None:
        mean, std = (torch.tensor(values, device=device) for values in (MEAN, STD))
        images = (split.images.to(device).float() - mean) / std
        self._padded = F.pad(images, (0, 0, PADDING, PADDING, PADDING, PADDING))  # [N, 40, 40, 3]
        self._labels = split.labels.to(device)
        self._batch, self._device = batch, device
        self._place = torch.arange(32, device=device)

    def epoch(self) -> Iterator[Batch]:
        order = torch.randperm(len(self._labels), device=self._device)
        for rows in order.split(self._batch):
            y, x = torch.randint(0, 2 * PADDING + 1, (2, len(rows), 1), device=self._device)
            mirrored = torch.rand(len(rows), 1, device=self._device) < 0.5
            columns = x + torch.where(mirrored, 31 - self._place, self._place)
            images = self._padded[rows[:, None, None], (y + self._place)[:, :, None], columns[:, None, :]]
            yield Batch(images.permute(0, 3, 1, 2), self._labels[rows], rows, rows)


def networks(case: Case, device: torch.device, **options: Any) -> tuple[nn.Module, nn.Module]:
    """Student and teacher of a case, of the same weights for every trainer; the teacher frozen."""
    torch.manual_seed(0)
    student, teacher = (models.create(case.network, CLASSES, **options).to(device) for _ in range(2))
    return student.train(), teacher.eval().requires_grad_(False)


def textbook_loss(student: Tensor, teacher: Tensor) -> Tensor:  # [B, C], [B, C] -> 0-d
    """KL divergence as it is usually written."""
    return F.kl_div(student.float().log_softmax(1), teacher.float().softmax(1), reduction="batchmean")


Maker = Callable[[Case, Split, torch.device], Trainer]


def trainers(device: torch.device) -> dict[str, Maker]:
    """All who take part, in the order of their turns."""
    return {
        NAIVE: Trainer,
        COMPOSED: Composed,
        LIVE: Ours,
        CACHED: lambda *which: Ours(*which, cached=True),
        COMPILED: lambda *which: Ours(*which, cached=True, step="compile"),
        # On a CPU it is what "auto" comes to.
        **({EAGER: lambda *which: Ours(*which, cached=True, step="eager")} if device.type == "cuda" else {}),
        SUPERVISED: lambda *which: Ours(*which, objective="label"),
    }
