"""The three figures of a run, from its config.json, results.json and metrics.jsonl."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from . import describe, paper, style
from .curves import Points, draw, longest

Record = Mapping[str, Any]
_CROWDED = 11  # generations whose names and values would run into each other
_FEW = 10  # images in a bin below which its accuracy is mostly chance


def error_by_generation(config: Record, results: Record) -> Figure:
    """Test error of each generation with its standard error, the ensembles up to it, and the paper's figures."""
    generations = results["generations"]
    votes = [r for r in results["ensembles"] if r["average"] == "probabilities" and 0 not in r["members"]]
    singles = {r["generation"]: r["test"]["error"] for r in generations}
    joint = {max(r["members"]): r["test"]["error"] for r in votes}
    drawn = style.figure(7.2, 4.6, "Test error by generation", describe.title(config), _notes(config, results))
    axes: Axes = drawn.subplots()
    style.quiet(axes)
    axes.axhline(singles[0], color=style.GREY, linewidth=0.8, linestyle=(0, (4, 3)))
    spread = [describe.standard_error(r) for r in generations]
    axes.errorbar(
        list(singles), list(singles.values()), spread, fmt="none", ecolor=style.SILVER, elinewidth=1.2, capsize=3
    )
    line: dict[str, Any] = {"linewidth": 1.6, "markersize": 6.5}
    names = "one network (grey: ±1 standard error)", "ensemble of BAN-1 up to here"
    axes.plot(list(singles), list(singles.values()), "o-", color=style.BLUE, label=names[0], **line)
    if joint:
        axes.plot(list(joint), list(joint.values()), "s-", color=style.VERMILION, label=names[1], **line)
    beside_paper = _published(axes, config, singles, votes)
    last = config["generations"]
    axes.set_xlim(-0.4, last + 0.5)
    if last < _CROWDED:
        for points, others, color in ((singles, joint, style.BLUE), (joint, singles, style.VERMILION)):
            for number, error in points.items():
                other = others.get(number, error)
                above = error > other or (error == other and points is singles)
                left = points.get(number + 1, error) > error and not beside_paper  # the line goes on upward
                _label(axes, number, error, above, left, color)
        axes.set_xticks(range(last + 1), [describe.generation(n) for n in range(last + 1)])
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("generation (0: teacher)")
    axes.set_ylabel("test error (%)")
    axes.margins(y=0.15)
    style.legend(drawn, [axes], 2)
    return drawn


def _label(axes: Axes, x: float, y: float, above: bool, left: bool, color: str) -> None:
    """The value beside its point, away from the other series and its own line."""
    axes.annotate(
        f"{y:.2f}",
        (x, y),
        xytext=((-6 if left else 6), 5) if above else (0, -8),
        textcoords="offset points",
        ha=("right" if left else "left") if above else "center",
        va="bottom" if above else "top",
        size=9,
        color=color,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.5},
    )


def _published(axes: Axes, config: Record, numbers: Iterable[int], votes: Sequence[Record]) -> bool:
    """The paper's errors, a little to the left of ours, if there are any; a scaled-down run can't compare with them."""
    row = paper.row(config)
    if row is None or describe.scaled_down(config) is not None:
        return False
    objective = config["objective"]["name"]
    singles = {n: row.generation(n, objective) for n in numbers}
    joint = {max(r["members"]): row.ensemble(tuple(r["members"]), "probabilities", objective) for r in votes}
    aside = 0.025 * (config["generations"] + 1)
    hollow: dict[str, Any] = {
        "markersize": 8,
        "markerfacecolor": "none",
        "markeredgecolor": style.INK,
        "markeredgewidth": 1.1,
        "zorder": 5,
    }
    for marker, points, name in (("o", singles, "the paper's network"), ("s", joint, "the paper's ensemble")):
        known = {n: error for n, error in points.items() if error is not None}
        if known:
            axes.plot([n - aside for n in known], list(known.values()), marker, label=name, **hollow)
    return True


def learning_curves(config: Record, results: Record, curves: Mapping[int, Sequence[Record]]) -> Figure:
    """By epoch, for each generation: the evaluated error, the training error and the training loss."""
    drawn = style.figure(10.8, 4.4, "Learning curves", describe.title(config), _notes(config, results))
    split = next((r["evaluation"]["split"] for c in curves.values() for r in c if r.get("evaluation")), "test")
    names = f"{split} error (%)", "training error (%)", "training loss (nats)"
    left, middle, right = draw(drawn, names, curves, _points)
    for axes in (left, middle):
        # The first tenth is steep: with it in view, what tells generations apart at the end would be a line's width.
        later = [y for line in axes.lines for x, y in np.asarray(line.get_xydata()) if x > longest(curves) // 10]
        if later:
            low, high = min(later), max(later)
            bottom = 0 if low <= high / 2 else low - (0.05 * (high - low) or 1)
            axes.set_ylim(bottom, high + (0.05 * (high - bottom) or 1))
    if any((np.asarray(line.get_ydata(), float) > 0).any() for line in right.lines):
        right.set_yscale("log")
        right.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        right.yaxis.set_major_formatter("{x:g}")
        right.yaxis.set_minor_formatter(NullFormatter())
    return drawn


def _points(records: Sequence[Record]) -> list[Points]:
    """(epoch, value) of each panel, as far as they are known."""
    panels = (
        [(r["epoch"], r["evaluation"]["error"]) for r in records if r.get("evaluation")],
        [(r["epoch"], r["train"]["error"]) for r in records],
        [(r["epoch"], r["train"]["loss"]) for r in records],
    )
    return [[(x, y) for x, y in points if y is not None] for points in panels]


def reliability(config: Record, results: Record) -> Figure:
    """Accuracy against confidence for the teacher, the last student and the largest ensemble, with the bins' sizes."""
    generations = results["generations"]
    chosen = [(describe.generation(r["generation"]), r) for r in (generations[0], *generations[1:][-1:])]
    votes = [r for r in results["ensembles"] if r["average"] == "probabilities"]
    if votes:
        largest = max(votes, key=lambda record: len(record["members"]))
        chosen.append((f"ensemble {describe.members(largest['members'])}", largest))
    drawn = style.figure(
        max(5.4, 1.0 + 3.0 * len(chosen)), 5.2, "Reliability", describe.title(config), _notes(config, results)
    )
    grid = drawn.subplots(2, len(chosen), sharex=True, sharey="row", height_ratios=[3.2, 1], squeeze=False)
    for (name, record), above, below in zip(chosen, grid[0], grid[1], strict=True):
        _accuracy(above, record)
        _sizes(below, record)
        above.set_title(f"{name}\nECE {100 * record['test']['ece']:.1f} %", size=10, color=style.INK)
    grid[0][0].set_ylabel("accuracy (%)")
    grid[1][0].set_ylabel("images (%)")
    style.legend(drawn, list(grid[0]), 4 if len(chosen) > 2 else 2)
    return drawn


def _accuracy(axes: Axes, record: Record) -> None:
    bins = list(zip(*(record["reliability"][k] for k in ("count", "confidence", "accuracy")), strict=True))
    width = 100 / len(bins)
    style.quiet(axes)
    axes.plot([0, 100], [0, 100], color=style.GREY, linewidth=0.9, linestyle=(0, (4, 3)), label="calibrated")
    for shown, alpha, name in (
        ([i for i, (count, _, _) in enumerate(bins) if count >= _FEW], 0.9, "accuracy in a bin"),
        ([i for i, (count, _, _) in enumerate(bins) if 0 < count < _FEW], 0.3, f"the same, under {_FEW} images"),
    ):
        if not shown:  # a legend's entry of no bar would have a colour of its own
            continue
        centers = [(i + 0.5) * width for i in shown]
        axes.bar(centers, [100 * bins[i][2] for i in shown], width * 0.9, color=style.BLUE, alpha=alpha, label=name)
    filled = [(100 * confidence, 100 * accuracy) for count, confidence, accuracy in bins if count]
    axes.vlines(
        [confidence for confidence, _ in filled],
        [min(pair) for pair in filled],
        [max(pair) for pair in filled],
        color=style.VERMILION,
        linewidth=1.6,
        label="gap to the mean confidence",
    )
    axes.set(xlim=(0, 100), ylim=(0, 100))


def _sizes(axes: Axes, record: Record) -> None:
    count = record["reliability"]["count"]
    width = 100 / len(count)
    style.quiet(axes)
    axes.bar(
        [(i + 0.5) * width for i in range(len(count))],
        [100 * number / sum(count) for number in count],
        width * 0.9,
        color=style.GREY,
    )
    axes.set_xlabel("confidence (%)")


def _notes(config: Record, results: Record) -> list[str | None]:
    return [describe.scaled_down(config), describe.unfinished(config, results)]
