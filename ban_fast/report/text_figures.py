"""The two figures of a run of language models, from its config.json, results.json and metrics.jsonl."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from . import describe, paper, style
from .curves import Points, draw

Record = Mapping[str, Any]
_CROWDED = 11  # generations whose names and values would run into each other
_LOGARITHMIC = 3


def perplexity_by_generation(config: Record, results: Record) -> Figure:
    """Test and validation perplexity of each generation, the ensembles up to it, and the paper's figures."""
    generations = results["generations"]
    singles = {r["generation"]: r["test"]["perplexity"] for r in generations}
    valid = {r["generation"]: r["valid"]["perplexity"] for r in generations if "valid" in r}
    joint = {max(r["members"]): r["test"]["perplexity"] for r in results["ensembles"] if 0 not in r["members"]}
    notes = [describe.scaled_down(config), describe.unfinished(config, results)]
    drawn = style.figure(7.2, 4.6, "Perplexity by generation", describe.title(config), notes)
    axes: Axes = drawn.subplots()
    style.quiet(axes)
    axes.axhline(singles[0], color=style.GREY, linewidth=0.8, linestyle=(0, (4, 3)))
    for points, marker, color, name in (
        (singles, "o", style.BLUE, "test, one network"),
        (joint, "s", style.VERMILION, "test, ensemble of BAN-1 up to here"),
        (valid, "D", style.SILVER, "validation, one network"),
    ):
        if points:
            look: dict[str, Any] = {"color": color, "label": name, "linewidth": 1.6, "markersize": 6}
            axes.plot(list(points), list(points.values()), f"{marker}-", **look)
    _published(axes, config, singles)
    last = config["generations"]
    axes.set_xlim(-0.4, last + 0.5)
    if last < _CROWDED:
        for points, color in ((singles, style.BLUE), (joint, style.VERMILION), (valid, style.GREY)):
            for number, perplexity in points.items():  # above, as lines go on downward, but for the lower of two
                is_lower = points is not valid and number in joint and perplexity == min(singles[number], joint[number])
                style.label(axes, number, perplexity, color, is_above=not is_lower)
        axes.set_xticks(range(last + 1), [describe.generation(n) for n in range(last + 1)])
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("generation (0: teacher)")
    axes.set_ylabel("perplexity per token")
    axes.margins(y=0.18)
    style.legend(drawn, [axes], 2)
    return drawn


def _published(axes: Axes, config: Record, numbers: Iterable[int]) -> None:
    """Table 6, a little to the left of ours; a scaled-down run can't compare with it."""
    row = paper.text_row(config)
    if row is None or describe.scaled_down(config) is not None:
        return
    known = {n: p for n in numbers if (p := row.generation(n, config["objective"]["name"])) is not None}
    aside = 0.025 * (config["generations"] + 1)
    hollow: dict[str, Any] = {"markersize": 8, "markerfacecolor": "none", "markeredgewidth": 1.1, "zorder": 5}
    for marker, color, name, values in (
        ("o", style.INK, "the paper's, test", [p.test for p in known.values()]),
        ("D", style.GREY, "the paper's, validation", [p.valid for p in known.values()]),
    ):
        if values:
            axes.plot([n - aside for n in known], values, marker, markeredgecolor=color, label=name, **hollow)


def learning_curves(config: Record, results: Record, curves: Mapping[int, Sequence[Record]]) -> Figure:
    """By epoch, for each generation: validation and training perplexity, and the learning rate."""
    notes = [describe.scaled_down(config), describe.unfinished(config, results)]
    drawn = style.figure(10.8, 4.4, "Learning curves", describe.title(config), notes)
    names = "validation perplexity", "training perplexity (dropout on)", "learning rate"
    for axes in draw(drawn, names, curves, _points):
        _scale(axes)
    return drawn


def _scale(axes: Axes) -> None:
    """Logarithmic where what is drawn spans more than a factor; less would have too few ticks."""
    drawn = np.concatenate([np.asarray(line.get_ydata(), float) for line in axes.lines] or [np.empty(0)])
    if len(drawn) and drawn.max() > _LOGARITHMIC * drawn.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.4g}"))


def _points(records: Sequence[Record]) -> list[Points]:
    """(epoch, value) of each panel; a training loss that no perplexity belongs to is left out."""
    evaluated = [(r["epoch"], r["evaluation"]["perplexity"]) for r in records if r.get("evaluation")]
    losses = [(r["epoch"], r["train"].get("label")) for r in records]
    trained = [(epoch, math.exp(loss)) for epoch, loss in losses if loss is not None and loss < 700]
    return [evaluated, trained, [(r["epoch"], r["lr"]) for r in records if r.get("lr")]]
