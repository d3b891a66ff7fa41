"""How a run tells others what happens in it, and how they stop it."""

from dataclasses import dataclass
from typing import Any

from ..config import Config


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run is about to do."""

    generations: int
    """Networks to train: the teacher and its students."""
    finished: int
    """How many of them were trained before (a resumed run)."""
    steps: int
    """Optimizer steps of each generation."""
    steps_per_epoch: int
    """Batches in a whole epoch; with `max_steps` the last epoch may end sooner."""
    epochs: int
    """Epochs of each generation, begun or whole."""
    parameters: int
    """Trainable parameters of the network."""
    device: str
    """Where it runs: the GPU's name or the processor's, and on how many of them if on several."""
    unit: str = "images"
    """What is trained on: "images" or "tokens"."""
    rows_per_step: int
    """How many of them a step takes."""
    students: tuple[str, ...] = ()
    """Objectives of students trained side by side, who make each step together; empty for one."""


class Observer:
    """Told of everything in a run as it happens. Each method does nothing: override those you want."""

    def run_started(self, config: Config, plan: Plan) -> None:
        """Data and network are there; training is about to begin."""

    def generation_started(self, generation: int, objective: str, total_steps: int, done_steps: int) -> None:
        """A generation begins, or goes on after `done_steps` steps of an earlier session."""

    def teacher_chosen(self, generation: int, text: str) -> None:
        """Whether the generation's teacher is live or its outputs are kept, and why, in one line."""

    def step(self, generation: int, done_steps: int) -> None:
        """One more optimizer step was made. Called in the training loop: keep it short."""

    def loss_arrived(self, generation: int, objective: str, loss: float) -> None:
        """The mean training loss of the epoch so far, of whoever learns by this objective: on a GPU as it was some
        steps ago, since nobody waits for it. Not told by several processes, none of which knows it alone."""

    def epoch_finished(self, generation: int, record: dict[str, Any]) -> None:
        """`record` is the epoch's line of metrics.jsonl."""

    def generation_finished(self, generation: int, record: dict[str, Any]) -> None:
        """`record` is the generation's entry in results.json."""

    def message(self, text: str) -> None:
        """Something that a person should read, in one line."""


class Interrupted(Exception):
    """`should_stop` was true. What was done is in the run directory, if there is one: resume it to go on."""
