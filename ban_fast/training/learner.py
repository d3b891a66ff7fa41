"""A self in training: its weights, its optimizer, and whatever else the rest of its training depends on."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..config import Config, ObjectiveConfig
from ..data import Batch, Loader
from ..errors import UserError, first_line
from .accumulate import added, parts, with_total
from .compiled import compiled
from .evaluator import Evaluator
from .metrics import Meter
from .objectives import Terms, make_objective
from .observer import Observer
from .optim import Plateau, clip, learning_rate, make_optimizer
from .parallel import Parallel
from .run_store import GenerationFiles
from .seeds import Turns, derived_seed, random_state, seed_everything, set_random_state
from .step_choice import COMPILE, choose_step
from .task import Task, trainable_parameters
from .teacher import Taught, Teacher

AMP_DTYPES = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Learner:
    """One self of a generation. Whatever an uninterrupted run would still have in hand is in its `state`.

    Several may learn side by side, `together`, from the same batches: then each draws from generators of its own.
    """

    def __init__(
        self,
        config: Config,
        task: Task,
        loader: Loader,
        *,
        number: int,
        seed: int,
        network: nn.Module,
        teacher: Teacher | None,
        evaluator: Evaluator,
        files: GenerationFiles | None,
        observer: Observer,
        together: bool = False,
    ) -> None:
        self.config, self.task, self.loader = config, task, loader
        device = self.device = task.device
        self.number, self.seed = number, seed
        self.network, self.teacher = network, teacher
        self.parameters = trainable_parameters(network)
        self.evaluator, self.files, self.observer = evaluator, files, observer
        self.together = together

        self.steps_per_epoch = loader.steps_per_epoch
        self.total_steps = total_steps(config, self.steps_per_epoch)
        self.objective_name = objective_name(config, number)
        objective = config.objective if number else ObjectiveConfig(name="label")
        self.objective = make_objective(objective, derived_seed(seed, "dkpp"))
        self.optimizer = make_optimizer(config.optimizer, network.parameters())
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.amp == "fp16")
        self.ranks = task.ranks
        own = task.ranks.shard.cut(slice(0, task.rows_per_step))
        share = (own.stop - own.start) / task.rows_per_step
        self.parallel = Parallel(network, task.ranks, share=share, sync_statistics=config.sync_statistics)
        self.reader = task.reader(self.parallel.module)
        self.steps = choose_step(config, device, loader)
        self._forward_and_loss = self._eager_terms if self.steps.mode != COMPILE else compiled(self._eager_terms)
        self.plateau = Plateau(config.optimizer)
        self.meter = Meter(device, task.ranks)

        self.step = 0  # optimizer steps made
        self.epoch = 0  # epochs closed
        self.batch = 0  # batches used of the epoch begun
        self.images = 0  # images or tokens trained on
        self.seconds = 0.0  # spent on that
        self.step_on_device = torch.zeros((), dtype=torch.int64, device=device)
        # What a fused kernel reads: single precision on a GPU.
        self.rate = torch.zeros((), dtype=torch.float32 if device.type == "cuda" else torch.float64, device=device)
        self.last_outputs: dict[str, Tensor] = {}  # by split, of the final weights, as far as they were asked for
        self.best: dict[str, Any] | None = None  # of the epoch with the best figure on a selection split
        self._unsaved = True
        self._is_checked = False  # whether its logits in training are known to be what they have to be
        self._turns = Turns(device) if together else None
        with self.turn():
            seed_everything(derived_seed(seed, task.ranks.own("noise")), device)  # dropout's draws

    def turn(self) -> AbstractContextManager[None]:
        """Where this one draws from its own generators."""
        return nullcontext() if self._turns is None else self._turns.turn()

    @property
    def drew_alone(self) -> bool:
        """Whether anything was drawn in its last turn, from generators of its own."""
        return self._turns is not None and self._turns.drew

    @property
    def is_done(self) -> bool:
        """Whether the last step is made and its epoch closed."""
        return self.step >= self.total_steps and not self.batch

    def batches(self, epoch: int) -> int:
        """Batches of an epoch: all, or, in the last one, what `max_steps` leaves."""
        return min(self.steps_per_epoch, self.total_steps - epoch * self.steps_per_epoch)

    def begin_epoch(self) -> None:
        """Go on with the epoch, or begin it."""
        self.network.train()
        if self.batch:
            return
        self.reader.begin()
        if self.teacher is not None:
            self.teacher.begin()

    def learn(self, batch: Batch, taught: Taught | None) -> None:
        """One optimizer step."""
        self.use_rate(self.learning_rate(self.step))
        self.update(batch, taught)
        self.advance(self._whole(batch))

    def _whole(self, batch: Batch) -> int:
        """Samples of the batch that this is a rank's part of."""
        return len(batch.labels) if self.ranks.is_alone else self.task.rows_per_step

    def learning_rate(self, step: int) -> float:
        """Of a step of this epoch."""
        return learning_rate(self.config.optimizer, step, self.total_steps) * self.plateau.factor

    def use_rate(self, rate: float) -> None:
        """Learn at this rate from now on."""
        if self.device.type == "cuda":  # where recorded steps read it too: a number is rounded otherwise there
            self.rate.fill_(rate)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate if self.device.type == "cuda" else rate

    def update(self, batch: Batch, taught: Taught | None) -> None:
        """What a step does on the device: nothing here waits for it, or is to be remembered outside of it."""
        whole = self._whole(batch)
        terms, logits = self._gradients(batch, taught, whole)
        self.parallel.finish_step()
        clip(self.config.optimizer, self.optimizer, self.scaler)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.meter.add(terms, logits, batch.labels, whole)
        self.step_on_device += 1

    def abandon(self) -> None:
        """Forget a step that was begun and not ended: its gradients, and that the scaler may have made it."""
        self.optimizer.zero_grad()
        if self.scaler.is_enabled():
            self.scaler._per_optimizer_states.clear()  # as its update does; until then it refuses another step

    def advance(self, images: int, steps: int = 1) -> None:
        """Count the step, or steps, of so many images that were made."""
        self.meter.images += images
        self.step += steps
        self.batch += steps
        self.images += images
        self._unsaved = True

    def _gradients(self, batch: Batch, taught: Taught | None, whole: int) -> tuple[Terms, Tensor]:
        """Gradients of a batch of `whole` samples, part by part; this rank's terms of its loss, and logits [B, C]."""
        size = self.config.micro_batch_size or whole
        is_weighted = self.objective_name == "cwtm" and (size < len(batch.labels) or not self.ranks.is_alone)
        if is_weighted and taught is not None:
            taught = with_total(taught, self.ranks)
        total, outputs = None, []
        pieces = parts(batch, taught, size, whole, self.ranks.size)
        for number, part in enumerate(pieces, start=1):
            with self.parallel.part(is_last=number == len(pieces)):
                terms, logits = self._terms(part.batch, part.taught)
                share = 1.0 if is_weighted else part.share  # CWTM's weights are shares themselves
                weight = share * self.task.loss_factor * self.ranks.size  # by which the ranks' gradients are divided
                torch.autograd.backward(self.scaler.scale(terms.loss if weight == 1 else terms.loss * weight))
            total = added(total, terms, share)
            outputs.append(logits.detach())
        assert total is not None
        return total, torch.cat(outputs) if len(outputs) > 1 else outputs[0]

    def _eager_terms(self, batch: Batch, taught: Taught | None) -> tuple[Terms, Tensor]:
        """Of a batch or a part of one; and its logits [B, C]."""
        with autocast(self.config, self.device):
            logits = self.reader(batch.images)
        if not self._is_checked and not torch.compiler.is_compiling():
            self._check_logits(logits, batch)
        return self.objective(logits, taught, batch, self.step_on_device), logits

    def _check_logits(self, logits: Any, batch: Batch) -> None:
        """UserError for a network that does in training what it did not when it was tried in eval mode."""
        wanted = [len(batch.labels), self.task.shape["classes"]]
        got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        if got != wanted:
            raise UserError(f"the network must return logits {wanted} in training too, got {got}")
        if not logits.requires_grad:
            raise UserError("the network's logits have no gradient in training: let it use neither no_grad nor detach")
        self._is_checked = True

    def _terms(self, batch: Batch, taught: Taught | None) -> tuple[Terms, Tensor]:
        try:
            return self._forward_and_loss(batch, taught)
        except ValueError as error:
            if len(batch.images) > 1 or isinstance(error, UserError):
                raise
            problem = first_line(error)  # batch normalisation has no variance of one value
            raise UserError(
                f"the network cannot be trained on a batch of one sample ({problem}): choose another batch size, or "
                "drop_last=True in your own DataLoader"
            ) from error

    def close_epoch(self) -> None:
        """Evaluate and record the epoch whose last batch was learned. Interrupted: nothing of it is closed yet."""
        if self.epoch == 0:
            self._check_teacher()  # at the end too; but a fault need not cost a whole generation
        is_last = self.step == self.total_steps
        record: dict[str, Any] = {
            "epoch": self.epoch + 1,
            "step": self.step,
            "lr": self.learning_rate(self.step - 1),
            "train": self.meter.means(),
        }
        split, best = self.evaluator.curve, self.best
        if split is not None and (is_last or (self.epoch + 1) % self.config.evaluate_every == 0):
            figures = self._evaluate(split, is_last)
            best = self._better(figures, is_last)
            record["evaluation"] = {"split": split, **figures}
            assert self.config.optimizer.schedule != "plateau" or split == self.evaluator.selection
            self.plateau.observe(figures[self.evaluator.figure])
        self.best = best
        record["seconds"] = self.seconds
        if self.files is not None:
            self.files.append(record)
        self.epoch, self.batch = self.epoch + 1, 0
        self.meter.reset()
        self._unsaved = True
        self.observer.epoch_finished(self.number, record)

    def _evaluate(self, split: str, is_last: bool) -> dict[str, float]:
        outputs = self.evaluator.outputs(self.network, split)
        if is_last:
            self.last_outputs[split] = outputs
        return self.evaluator.figures(outputs, split)

    def _better(self, figures: dict[str, float], is_last: bool) -> dict[str, Any] | None:
        """The best epoch's figures so far, this one's being `figures` on the split that may choose."""
        name, split = self.evaluator.figure, self.evaluator.selection
        if not self.evaluator.keeps_best or split is None:
            return None
        if self.best is not None and not figures[name] < self.best[split][name]:
            return self.best
        others = {other: self._evaluate(other, is_last) for other in self.evaluator.splits if other != split}
        return {"epoch": self.epoch + 1, split: figures, **others}

    def finish(self) -> None:
        """The last look at teacher and weights, and the last checkpoint."""
        self._check_teacher()
        self._check_weights()
        if self._unsaved:
            self.save()

    def _check_teacher(self) -> None:
        if self.teacher is not None:
            self.teacher.check()

    def check_loss(self, *, late: bool = False) -> None:
        """UserError if the loss was not finite. Waits for the device; `late`, for what was asked for the last time."""
        if not (self.meter.was_finite() if late else self.meter.is_finite()):
            raise self._diverged("the loss")

    def _check_weights(self) -> None:
        momenta = [state["momentum_buffer"] for state in self.optimizer.state.values() if state]
        finite = [tensor.isfinite().all() for tensor in [*self.network.parameters(), *momenta]]
        if not torch.stack(finite).all().item():
            raise self._diverged("a weight")

    def _diverged(self, what: str) -> UserError:
        by = "at" if self.device.type == "cpu" else "by"
        whose = f" of {self.objective_name}" if self.together else ""
        return UserError(
            f"{what} is not finite in generation {self.number}{whose}, epoch {self.epoch + (1 if self.batch else 0)}, "
            f"{by} step {self.step}: lower --lr (it is {self.config.optimizer.lr}){self._elsewhere()}"
        )

    def _elsewhere(self) -> str:
        """A run with another learning rate is another run."""
        return "" if self.files is None else ", with another --out"

    @property
    def can_save(self) -> bool:
        """Whether there is a directory, and a way to go on from here: a user's DataLoader only starts over."""
        return self.files is not None and (self.loader.exact_resume or self.batch in (0, self.batches(self.epoch)))

    def save(self) -> None:
        """Write a checkpoint of this very moment, where one can go on from it.

        UserError, with the checkpoint before untouched, if its numbers are not finite.
        """
        if self.files is None or not self.can_save:
            return
        self._check_weights()
        if self.teacher is not None:
            self.teacher.sync()
        self.files.save_state(self.state())
        self._unsaved = False

    def state(self) -> dict[str, Any]:
        """Everything that the rest of this generation depends on."""
        with self.turn():
            drawn = random_state(self.device)
        return {
            "step": self.step,
            "epoch": self.epoch,
            "batch": self.batch,
            "images": self.images,
            "seconds": self.seconds,
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "plateau": self.plateau.state(),
            "best": self.best,
            "carried": self.reader.state(),
            "sums": self.meter.sums,
            "sum_images": self.meter.images,
            "random": self.ranks.gather(drawn),
            "teacher": None if self.teacher is None else self.teacher.state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go back to the moment of a `state`."""
        self.step, self.epoch, self.batch = state["step"], state["epoch"], state["batch"]
        self.images, self.seconds = state["images"], state["seconds"]
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.plateau.restore(state["plateau"])
        self.best = state["best"]
        self.reader.restore(state["carried"])
        self.meter.restore(state["sums"], state["sum_images"])
        self.step_on_device.fill_(self.step)
        if self.teacher is not None:
            self.teacher.restore(state["teacher"])
        with self.turn():
            if self.ranks.rank < len(state["random"]):
                set_random_state(state["random"][self.ranks.rank], self.device)
            else:  # there were fewer ranks: the others draw from here on
                seed_everything(derived_seed(self.seed, self.ranks.own(f"noise from step {self.step}")), self.device)
        self._unsaved = False

    def record(self) -> dict[str, Any]:
        """What results.json says of the training itself."""
        record: dict[str, Any] = {
            "generation": self.number,
            "objective": self.objective_name,
            "seed": self.seed,
            "epochs": self.epoch,
            "steps": self.step,
            "parameters": self.parameters,
            "train_seconds": self.seconds,
            f"{self.task.unit}_per_second": self.images / self.seconds if self.seconds else 0.0,
            "step": self.steps.record(),
        }
        if self.best is not None:
            record["best"] = self.best
        if self.number:
            unit, teacher = self.task.unit, self.teacher
            no_teacher = {"mode": "none", "dtype": None, f"forward_{unit}": 0}  # labels alone
            record["teacher"] = (
                no_teacher if teacher is None else teacher.record(self.images, unit, self.objective_name)
            )
        return record


def autocast(config: Config, device: torch.device) -> torch.autocast:
    """The precision of networks in training, students' and teachers'."""
    return torch.autocast(device.type, AMP_DTYPES[config.amp], enabled=config.amp != "off")


def objective_name(config: Config, generation: int) -> str:
    """What a generation is trained on: the first one on labels."""
    return config.objective.name if generation else "label"


def total_steps(config: Config, steps_per_epoch: int) -> int:
    """Optimizer steps of a generation."""
    steps = config.epochs * steps_per_epoch
    return steps if config.max_steps is None else min(steps, config.max_steps)
