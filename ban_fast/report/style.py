"""The look of every plot: titled with what was run, quiet axes, colours that every eye tells apart."""

import textwrap
from collections.abc import Sequence

from matplotlib import colormaps
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

# Okabe and Ito's colours (2008), told apart with any kind of colour vision.
BLUE, VERMILION = "#0072B2", "#D55E00"
INK, GREY, SILVER, PALE = "#222222", "#6E6E6E", "#B4B4B4", "#DDDDDD"
DPI = 160
_LINE = 0.19  # inches from one line of the title to the next
_LETTERS = 15  # of the title's size in an inch of line


def figure(width: float, height: float, heading: str, title: str, notes: Sequence[str | None]) -> Figure:
    """A white figure of `width` x `height` inches: what it shows, of which run, and what one must know of that run."""
    made = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    FigureCanvasAgg(made)
    made.text(0.16 / width, 1 - 0.14 / height, heading, size=12.5, weight="bold", color=INK, va="top")
    below = 0.41
    for text, color in ((title, GREY), *((note, VERMILION) for note in notes if note is not None)):
        for line in textwrap.wrap(text, int(width * _LETTERS)):
            made.text(0.16 / width, 1 - below / height, line, size=9.5, color=color, va="top", parse_math=False)
            below += _LINE
    made.set_layout_engine("constrained", rect=(0, 0, 1, 1 - (below + 0.06) / height), w_pad=0.1, h_pad=0.1)
    return made


def quiet(axes: Axes) -> None:
    """No box, a faint grid behind, small numbers."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(GREY)
    axes.tick_params(colors=GREY, labelsize=9, labelcolor=INK)
    for axis in (axes.xaxis, axes.yaxis):
        axis.label.set(size=10, color=INK)
    axes.grid(axis="y", color=PALE, linewidth=0.6)
    axes.set_axisbelow(True)


def label(axes: Axes, x: float, y: float, color: str, *, is_above: bool) -> None:
    """A value beside its point: on its upper or lower right."""
    axes.annotate(
        f"{y:.2f}",
        (x, y),
        xytext=(6, 5 if is_above else -5),
        textcoords="offset points",
        ha="left",
        va="bottom" if is_above else "top",
        size=9,
        color=color,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.5},
    )


def legend(made: Figure, axes: Sequence[Axes], columns: int) -> None:
    """One legend of all `axes` below everything, without a box; a label that several have is there once."""
    entries: dict[str, Artist] = {}
    for each in axes:
        for handle, label in zip(*each.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    made.legend(
        entries.values(),
        entries.keys(),
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        fontsize=9,
        labelcolor=INK,
    )


def generation_colors(count: int) -> list[str]:
    """Black for the teacher; its students from dark to light along viridis, whose lightness rises evenly."""
    students = count - 1
    shades = [0.25 + 0.6 * i / max(students - 1, 1) for i in range(students)]
    return [INK, *(to_hex(colormaps["viridis"](shade)) for shade in shades)]
