"""What a run's progress says of the loss: what has arrived, of the generation that is trained, and of nobody else."""

import dataclasses

from ban_fast.cli.progress import Silent
from ban_fast.cli.signals import Signals
from ban_fast.config import Config, DataConfig, ModelConfig, ObjectiveConfig
from ban_fast.training import Observer, Plan, run

PLAN = Plan(
    generations=2,
    finished=0,
    steps=20,
    steps_per_epoch=10,
    epochs=2,
    parameters=1,
    device="cpu",
    rows_per_step=16,
)


def narrator(plan: Plan = PLAN) -> Silent:
    told = Silent(Signals(), "go on")
    told.run_started(Config(), plan)
    told.generation_started(0, "label", 20, 0)
    return told


def test_the_loss_is_shown_once_it_is_there() -> None:
    told = narrator()
    told.step(0, 12)
    before = told.epoch()
    assert before.endswith("epoch 2 of 2")
    told.loss_arrived(0, "label", 1.23456)
    assert told.epoch() == f"{before}, loss 1.23"
    told.generation_started(1, "ban", 20, 0)
    assert "loss" not in told.epoch()


def test_of_students_side_by_side_none_is() -> None:
    told = narrator(dataclasses.replace(PLAN, students=("ban", "cwtm")))
    told.loss_arrived(0, "ban", 1.0)
    assert "loss" not in told.epoch()


class Listener(Observer):
    def __init__(self) -> None:
        self.heard: list[tuple[int, str, float]] = []
        self.epochs: list[float] = []

    def loss_arrived(self, generation: int, objective: str, loss: float) -> None:
        self.heard.append((generation, objective, loss))

    def epoch_finished(self, generation: int, record: dict[str, dict[str, float]]) -> None:  # type: ignore[override]
        self.epochs.append(record["train"]["loss"])


def test_it_is_the_mean_of_the_epoch_so_far() -> None:
    """On a CPU, where nothing has to arrive, after every step: the last of an epoch is its line in metrics.jsonl."""
    listener = Listener()
    run(
        Config(
            data=DataConfig(name="digits", limit_train=48, limit_test=16),
            model=ModelConfig(name="mlp-8"),
            objective=ObjectiveConfig(name="ban"),
            generations=1,
            epochs=2,
            batch_size=16,
            device="cpu",
        ),
        observer=listener,
    )
    assert [(generation, name) for generation, name, _ in listener.heard] == [(0, "label")] * 6 + [(1, "ban")] * 6
    assert [loss for _, _, loss in listener.heard[2::3]] == listener.epochs
