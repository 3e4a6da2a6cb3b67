"""Quality against cost: one line per method, the random floor and the dense model always in sight."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, PercentFormatter

from tprune.evaluate.points import FLOOR, STORAGE, Group
from tprune.evaluate.table import engineering

COLOURS = (
    ("#3b7dd8", "#e0662b", "#2f9e5f", "#c94fa0", "#8a63d2")
    + ("#b8860b", "#17a2b8", "#d1495b", "#6b8e23", "#a0694b")
)  # fmt: skip
MARKERS = {"o": "●", "s": "■", "^": "▲", "D": "◆", "v": "▼", "P": "✚", "X": "✖"}
"""Marker of matplotlib -> the sign that stands for it in text."""
LINES = {"-": "solid", "--": "dashed", ":": "dotted"}
GRAY = "#8c8c8c"
INK = "#010203"
"""Stands for the colour of the text around an embedded plot, light or dark."""
AXES = {"flops": "FLOPs", "latency": "latency", "storage": "bytes"}
"""Cost -> its name in file names and headings."""
STYLE = {
    "font.size": 9,
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "svg.fonttype": "none",
    "svg.hashsalt": "tprune",
}


@dataclass(frozen=True)
class Look:
    """How a method is drawn: ten colours by seven markers by three lines tell 210 methods apart."""

    colour: str
    marker: str
    line: str

    @property
    def sign(self) -> str:
        """The marker as a character."""
        return MARKERS[self.marker]


def looks(names: list[str]) -> dict[str, Look]:
    """A look for each name; the floor is gray."""
    others = [name for name in names if name != FLOOR]
    made = {
        name: Look(
            COLOURS[place % len(COLOURS)],
            list(MARKERS)[place % len(MARKERS)],
            list(LINES)[place // len(COLOURS) % len(LINES)],
        )
        for place, name in enumerate(others)
    }
    return made | {name: Look(GRAY, "o", "-") for name in names if name == FLOOR}


def label(group: Group, axis: str) -> str:
    """What a cost is, and what the dense model's is."""
    dense = group.dense
    if axis == "flops":
        return f"FLOPs, of the dense model's {engineering(dense['flops'])} per timed call"
    if axis == "latency":
        return f"latency, of the dense model's {dense['latency_ms']:,.1f} ms (timed in turn)"
    storage = STORAGE[group.protocol["family"]]
    return f"{storage.name}, of the dense model's {dense['storage']:,.4g}\n({storage.note})"


def pareto(group: Group, axis: str, *, embedded: bool = False) -> Figure:
    """Quality against one cost.

    Args:
        group: points of one protocol.
        axis: "flops", "latency" or "storage", which `group.cost` must not refuse.
        embedded: without legend and in the page's own ink, as the page draws both; else to stand alone.
    """
    ink = INK if embedded else "black"
    inks = dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), ink
    )
    with rc_context(STYLE | inks):
        figure = Figure(figsize=(5.2, 3.8) if embedded else (8.6, 4.8), layout="constrained")
        axes = figure.add_subplot()
        draw(axes, group, axis, ink)
        if not embedded:
            figure.suptitle(group.title, fontsize=10, x=0.01, ha="left")
            figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    return figure


def draw(axes: Axes, group: Group, axis: str, ink: str) -> None:
    """Lines, error bars, the floor's band, the dense model."""
    best = group.dense[group.metric]
    axes.axhline(best, color=ink, linewidth=0.8, linestyle=(0, (1, 2)), zorder=1)
    axes.plot([1], [best], marker="*", markersize=11, color=ink, linestyle="none", label="dense", zorder=5)
    for name, look in looks(group.lines).items():
        rows = sorted(
            (row for row in group.measured if row.name == name and getattr(row, axis) is not None),
            key=lambda row: getattr(row, axis),
        )
        if rows:
            line(axes, rows, axis, name, look)
    axes.set_xlabel(label(group, axis))
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    if group.lower:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.4g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_ylabel(f"{group.metric} (log, lower is better)")
    else:
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
        axes.set_ylabel({"agreement": "agreement with dense"}.get(group.metric, group.metric))


def line(axes: Axes, rows: list[Any], axis: str, name: str, look: Look) -> None:
    """One method: its points through their budgets, with the deviation over seeds and the quartiles of latency."""
    x, y = [getattr(row, axis) for row in rows], [row.quality for row in rows]
    floor = name == FLOOR
    spread = [row.spread or 0.0 for row in rows]
    if floor and any(spread):
        low, high = ([a + s * b for a, b in zip(y, spread, strict=True)] for s in (-1, 1))
        axes.fill_between(x, low, high, color=look.colour, alpha=0.25, linewidth=0, zorder=1)
    bars: dict[str, Any] = {}
    if any(spread):
        bars["yerr"] = spread
    if axis == "latency":
        bars["xerr"] = [
            [max(0.0, row.latency - row.latency_low) for row in rows],
            [max(0.0, row.latency_high - row.latency) for row in rows],
        ]
    style = {"color": look.colour, "zorder": 2 if floor else 3}
    artists = axes.plot(
        x,
        y,
        marker=look.marker,
        linestyle=look.line,
        linewidth=2.2 if floor else 1.1,
        markersize=4 if floor else 5,
        label=f"{name} (floor)" if floor else name,
        **style,
    )
    if bars:
        artists += axes.errorbar(x, y, **bars, fmt="none", elinewidth=0.8, capsize=2, **style).get_children()
    for place, artist in enumerate(artists):
        artist.set_gid(f"{place}-of-{name.replace(' ', '_')}")


def png(figure: Figure) -> bytes:
    """At 160 dots per inch, on white."""
    return _saved(figure, "png", dpi=160, facecolor="white")


def svg(figure: Figure) -> bytes:
    """As a file of its own, on white."""
    return _saved(figure, "svg", facecolor="white", metadata={"Date": None})


def inline(figure: Figure, prefix: str) -> str:
    """As an element for a page: its ink is the page's, its ids start with `prefix`, its width is its parent's."""
    text = _saved(figure, "svg", transparent=True, metadata={"Date": None}).decode()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", text)
    # The first element's own size goes; its viewBox keeps the proportions.
    return re.sub(r' (width|height)="[^"]*pt"', "", text, count=2)


def _saved(figure: Figure, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    with rc_context(STYLE):
        figure.savefig(file, format=kind, **options)
    return file.getvalue()
