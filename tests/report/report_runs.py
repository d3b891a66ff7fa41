"""Run directories as training leaves them, without training."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from ban_fast.config import Config
from ban_fast.evaluation import RunDirectory

MakeRun = Callable[..., RunDirectory]


def record(error: float, images: int, rng: np.random.Generator) -> dict[str, Any]:
    """Figures of one network whose confidences lie mostly near 1, as trained networks' do."""
    confidence = 1 - (1 - 1 / 10) * rng.beta(0.6, 3.5, images)
    right = rng.random(images) < confidence * (1 - error / 100) / confidence.mean()
    bins = np.minimum((confidence * 15).astype(int), 14)
    count = np.bincount(bins, minlength=15)
    filled = np.maximum(count, 1)
    mean = np.bincount(bins, weights=confidence, minlength=15) / filled
    accuracy = np.bincount(bins, weights=right, minlength=15) / filled
    return {
        "test": {
            "error": error,
            "nll": 0.04 * error,
            "ece": float((count / images * abs(mean - accuracy)).sum()),
        },
        "reliability": {"count": count.tolist(), "confidence": mean.tolist(), "accuracy": accuracy.tolist()},
    }


def curve(error: float, epochs: int, every: int, split: str, rng: np.random.Generator) -> list[dict[str, Any]]:
    """Records of metrics.jsonl that fall to about `error`."""
    records: list[dict[str, Any]] = []
    for epoch in range(1, epochs + 1):
        share = np.exp(-4 * epoch / epochs)
        noise = rng.normal(0, 0.8) * (1 - epoch / epochs)
        made: dict[str, Any] = {
            "epoch": epoch,
            "step": 11 * epoch,
            "lr": 0.1,
            "train": {"loss": 0.02 + share, "kd": share, "label": 0.0, "error": max(0.0, 60 * share + noise)},
            "seconds": 0.2,
        }
        if epoch % every == 0 or epoch == epochs:
            made["evaluation"] = {
                "split": split,
                "error": max(0.1, error + 55 * share + noise),
                "nll": 0.1,
                "ece": 0.02,
            }
        records.append(made)
    return records


def write_run(
    path: Path,
    config: Config,
    errors: list[float],
    *,
    votes: dict[tuple[int, ...], float] | None = None,
    images: int = 360,
    begun: int | None = None,
    validation: bool = False,
) -> RunDirectory:
    """A run whose first generations have finished with `errors`; `begun` counts those with learning curves."""
    rng = np.random.default_rng(0)
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config.to_dict()))
    generations = []
    for number, error in enumerate(errors):
        made = {
            "generation": number,
            "objective": config.objective.name if number else "label",
            **record(error, images, rng),
        }
        made |= {"seed": number, "epochs": config.epochs, "steps": 440, "parameters": 1000}
        made |= {"train_seconds": 9.5 + number, "images_per_second": 5000.0}
        if validation:
            made["validation"] = {"error": error + 0.5, "nll": 0.1, "ece": 0.02}
        generations.append(made)
    ensembles = [
        {"members": list(members), "average": average, **record(error, images, rng)}
        for members, error in (votes or {}).items()
        for average in ("probabilities", "logits")
    ]
    if generations:
        results = {"format": 1, "generations": generations, "ensembles": ensembles}
        (path / "results.json").write_text(json.dumps(results))
    split = "validation" if validation else "test"
    for number in range(len(errors) if begun is None else begun):
        final = errors[number] if number < len(errors) else 50.0
        lines = curve(final, config.epochs, config.evaluate_every, split, rng)
        if number >= len(errors):
            lines = lines[: len(lines) // 2]
        (path / f"generation-{number}").mkdir()
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (path / f"generation-{number}" / "metrics.jsonl").write_text(text)
    return RunDirectory(path)


def series(axes: Axes) -> dict[str, list[tuple[float, float]]]:
    """Points of each labelled line."""
    return {
        str(line.get_label()): list(zip(map(float, line.get_xdata()), map(float, line.get_ydata()), strict=True))  # type: ignore[arg-type]
        for line in axes.lines
        if not str(line.get_label()).startswith("_")
    }
