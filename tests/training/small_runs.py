"""Runs small enough for tests, and what two of them must have in common."""

import copy
import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ban_fast.config import Config, DataConfig, ModelConfig, ObjectiveConfig, OptimizerConfig
from ban_fast.training import Observer

CLASSES, IMAGES, TEST_IMAGES, BATCH, EPOCHS = 4, 72, 40, 16, 3
STEPS_PER_EPOCH = IMAGES // BATCH  # the last, short batch is dropped
STEPS = EPOCHS * STEPS_PER_EPOCH


def network() -> nn.Module:
    """A convolution, batch norm and dropout: buffers that move, and draws from the global generator."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, CLASSES),
    )


def samples(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noise with one of four corners lit: a class that can be learned."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 1, 6, 6, generator=generator)
    y = torch.randint(CLASSES, (count,), generator=generator)
    for i, label in enumerate(y.tolist()):
        row, column = 3 * (label // 2), 3 * (label % 2)
        x[i, 0, row : row + 3, column : column + 3] += 1.5
    return x, y


def config(objective: str = "ban", **changes: Any) -> Config:
    """Three epochs of four steps for a teacher and two students."""
    values: dict[str, Any] = {
        "objective": ObjectiveConfig(name=objective),
        "optimizer": OptimizerConfig(lr=0.05, schedule="cosine"),
        "generations": 2,
        "epochs": EPOCHS,
        "batch_size": BATCH,
        "device": "cpu",
    }
    return Config(**{**values, **changes})


def digits(objective: str = "ban", limit: int = 72, **changes: Any) -> Config:
    """Real images in 9 views each, whose single channel leaves its layout open; a convolution and batch norm."""
    values: dict[str, Any] = {
        "data": DataConfig(name="digits", limit_train=limit, limit_test=40),
        "model": ModelConfig(name="convnet-8"),
        "objective": ObjectiveConfig(name=objective),
        "optimizer": OptimizerConfig(lr=0.05),
        "generations": 1,
        "epochs": 24,
        "batch_size": 16,
        "device": "cpu",
    }
    return Config(**{**values, **changes})


def own(**changes: Any) -> dict[str, Any]:
    """The arguments of `run` that bring network and data along."""
    return {"model": network, "train": samples(IMAGES, 0), "test": samples(TEST_IMAGES, 1), **changes}


def without_times(value: Any) -> Any:
    """A copy of results or metrics less what a clock measured."""
    value = copy.deepcopy(value)
    for record in value["generations"] if isinstance(value, dict) else value:
        for key in ("train_seconds", "images_per_second", "tokens_per_second", "seconds"):
            record.pop(key, None)
    return value


def footprint(path: Path) -> dict[str, Any]:
    """Everything in a run directory that an interruption must not change."""
    found: dict[str, Any] = {"results": without_times(json.loads((path / "results.json").read_text()))}
    for file in sorted(path.glob("generation-*/*")):
        name = str(file.relative_to(path))
        if file.name == "metrics.jsonl":
            found[name] = without_times([json.loads(line) for line in file.read_text().splitlines()])
        elif file.name == "model.safetensors":
            found[name] = file.read_bytes()
        else:
            found[name] = "there"
    return found


def but_for_teachers(found: dict[str, Any]) -> dict[str, Any]:
    """A footprint less what it says of who taught, and how often they were asked."""
    found = copy.deepcopy(found)
    for record in found["results"]["generations"]:
        record.pop("teacher", None)
    return found


def but_for_steps(path: Path) -> dict[str, Any]:
    """A footprint less what it says of how steps were made."""
    found = footprint(path)
    for record in found["results"]["generations"]:
        del record["step"]
    return found


class Recorder(Observer):
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.plan: Any = None
        self.steps: Counter[int] = Counter()
        self.started: list[tuple[int, str, int, int]] = []
        self.epochs: list[tuple[int, dict[str, Any]]] = []
        self.finished: list[tuple[int, dict[str, Any]]] = []
        self.messages: list[str] = []

    def run_started(self, config: Any, plan: Any) -> None:
        self.plan = plan

    def generation_started(self, generation: int, objective: str, total_steps: int, done_steps: int) -> None:
        self.started.append((generation, objective, total_steps, done_steps))

    def step(self, generation: int, done_steps: int) -> None:
        self.steps[generation] += 1

    def epoch_finished(self, generation: int, record: dict[str, Any]) -> None:
        self.epochs.append((generation, record))

    def generation_finished(self, generation: int, record: dict[str, Any]) -> None:
        self.finished.append((generation, record))

    def message(self, text: str) -> None:
        self.messages.append(text)


class Heard(Recorder):
    """Also what was said of teachers."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[tuple[int, str]] = []

    def teacher_chosen(self, generation: int, text: str) -> None:
        self.said.append((generation, text))


class StopAt:
    """`should_stop` that is true from its nth question on."""

    def __init__(self, question: int) -> None:
        self.left = question

    def __call__(self) -> bool:
        self.left -= 1
        return self.left <= 0


def deterministic() -> nn.Module:
    """Without dropout, so that a loop written by hand can draw the same weights."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, CLASSES),
    )


def check_figures(figures: dict[str, float]) -> None:
    """That these can be a split's figures."""
    assert set(figures) == {"error", "nll", "ece"}
    assert 0 <= figures["error"] <= 100
    assert figures["nll"] >= 0
    assert 0 <= figures["ece"] <= 1
