"""Learning curves of generations in panels side by side: what figures of images and of texts have in common."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from . import describe, style

Record = Mapping[str, Any]
Points = Sequence[tuple[float, float]]
_SPARSE = 25  # epochs below which each is a dot of its own


def draw(
    drawn: Figure,
    names: Sequence[str],
    curves: Mapping[int, Sequence[Record]],
    points: Callable[[Sequence[Record]], Sequence[Points]],
) -> list[Axes]:
    """A panel for each of `names`, by epoch, with a line for every generation: its `points` of that panel."""
    panels: list[Axes] = list(drawn.subplots(1, len(names)))
    for axes, name in zip(panels, names, strict=True):
        style.quiet(axes)
        axes.set_xlabel("epoch")
        axes.set_ylabel(name)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6, min_n_ticks=1))
    colors = style.generation_colors(max(curves) + 1)
    for number, records in curves.items():
        look: dict[str, Any] = {"color": colors[number], "linewidth": 1.4, "label": describe.generation(number)}
        if longest(curves) < _SPARSE:
            look |= {"marker": "o", "markersize": 3.5}
        for axes, line in zip(panels, points(records), strict=True):
            axes.plot([x for x, _ in line], [y for _, y in line], **look)
    style.legend(drawn, panels[:1], min(len(curves), 10))
    return panels


def longest(curves: Mapping[int, Sequence[Record]]) -> int:
    """Epochs of the generation that has most."""
    return max(len(records) for records in curves.values())
