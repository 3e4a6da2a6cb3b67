"""Pictures of pruned weights: sparsity per block and module, and the widths that are left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from tprune.evaluate.pictures import Picture, rendered

MOST_NUMBERS = 100
"""Blocks from which on the cells are too small for numbers."""
KEPT, GONE = "#2563eb", "#b8bfca"


@dataclass(frozen=True)
class Sparsity:
    """What was removed from a model's weights.

    Attributes:
        modules: names of the columns.
        cells: per block the fraction removed from each module, None where it has no such module.
        blocks: per block the fraction removed from all of it; 1 where the block is gone.
        widths: per kind of unit, per block (kept, of), or None where the block is gone.
        scores: what blocks were judged by, per name and block.
    """

    modules: Sequence[str]
    cells: Sequence[Sequence[float | None]]
    blocks: Sequence[float]
    widths: dict[str, list[tuple[int, int] | None]] = field(default_factory=dict)
    scores: dict[str, list[float]] = field(default_factory=dict)

    def numbers(self) -> dict[str, Any]:
        """As JSON, a row per block."""
        rows = []
        for block, (cells, whole) in enumerate(zip(self.cells, self.blocks, strict=True)):
            row: dict[str, Any] = {"block": block, "sparsity": whole, "removed": whole >= 1}
            row["modules"] = dict(zip(self.modules, cells, strict=True))
            row |= {kind: counts[block] for kind, counts in self.widths.items()}
            rows.append(row | {name: scores[block] for name, scores in self.scores.items()})
        return {"blocks": rows}


def weight_pictures(
    found: Sparsity, title: str, prefix: str = "", kinds: Sequence[str] = ("png",)
) -> list[Picture]:
    """The heat map, and the bars where blocks have widths or scores; each in every file format of `kinds`."""
    figures = {"sparsity": (heat_map(found, title), f"{title}: sparsity per block and module")}
    if found.widths or found.scores:
        figures["widths"] = (
            bars(found, title),
            f"{title}: {', '.join([*found.widths, *found.scores])} per block",
        )
    numbers = found.numbers()
    return [
        Picture(f"{prefix}{name}.{kind}", label, rendered(figure, kind), numbers)
        for name, (figure, label) in figures.items()
        for kind in kinds
    ]


def heat_map(found: Sparsity, title: str) -> Figure:
    """Blocks downwards, modules across; removed blocks are hatched."""
    columns = [*found.modules, "whole block"]
    depth = len(found.blocks)
    tall = 0.24 if depth <= 64 else 16 / depth
    figure = Figure(figsize=(1.6 + 0.85 * len(columns), 1.8 + tall * depth))
    axis = figure.subplots()
    values = [[*cells, whole] for cells, whole in zip(found.cells, found.blocks, strict=True)]
    shown = [[float("nan") if value is None else value for value in row] for row in values]
    image = axis.imshow(shown, cmap="Blues", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    for block, row in enumerate(values):
        if found.blocks[block] >= 1:
            _hatch(axis, -0.5, block - 0.5, len(columns), 1)
            axis.text((len(columns) - 1) / 2, block, "removed", ha="center", va="center", fontsize=7)
        elif depth <= MOST_NUMBERS:
            _numbers(axis, block, row)
    if found.modules:
        axis.axvline(len(found.modules) - 0.5, color="white", linewidth=3)
        bar = figure.colorbar(image, ax=axis, fraction=0.04, pad=0.03, format=lambda value, _: f"{value:.0%}")
        bar.set_label("removed", fontsize=8)
        bar.ax.tick_params(labelsize=8)
    axis.set_xticks(range(len(columns)), columns, rotation=35, ha="left", rotation_mode="anchor", fontsize=8)
    axis.xaxis.tick_top()
    axis.set_yticks(range(depth) if depth <= 64 else range(0, depth, 8))
    axis.tick_params(length=0, labelsize=8)
    axis.set_ylabel("block")
    figure.suptitle(title, fontsize=11, parse_math=False)
    figure.tight_layout()
    return figure


def _numbers(axis: Axes, block: int, row: Sequence[float | None]) -> None:
    """The percentages of a row in its cells."""
    for column, value in enumerate(row):
        if value is not None:
            colour = "white" if value > 0.55 else "black"
            axis.text(column, block, f"{value:.1%}", ha="center", va="center", fontsize=7, color=colour)


def _hatch(axis: Axes, left: float, bottom: float, width: float, height: float) -> None:
    """Mark as removed."""
    style = {"facecolor": "white", "edgecolor": GONE, "hatch": "////", "linewidth": 0.5}
    axis.add_patch(Rectangle((left, bottom), width, height, **style))


def bars(found: Sparsity, title: str) -> Figure:
    """Per kind of unit a bar per block: what is left before what there was. Scores are bars of their own."""
    rows = [*found.widths, *found.scores]
    depth = len(found.blocks)
    figure = Figure(figsize=(max(5.0, 1.5 + 0.24 * depth), 0.8 + 2.0 * len(rows)))
    for axis, name in zip(figure.subplots(len(rows), 1, squeeze=False).flatten(), rows, strict=True):
        if name in found.widths:
            _width_bars(axis, found.widths[name])
        else:
            gone = [
                score if whole >= 1 else 0
                for score, whole in zip(found.scores[name], found.blocks, strict=True)
            ]
            axis.bar(range(depth), found.scores[name], color=KEPT)
            axis.bar(range(depth), gone, color="white", edgecolor=GONE, hatch="////")
        axis.set_ylabel(name.replace("_", " "))
        axis.set_xlim(-0.7, depth - 0.3)
        axis.set_xticks(range(0, depth, 1 if depth <= 32 else 4))
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axis.set_xlabel("block (hatched: removed)" if any(whole >= 1 for whole in found.blocks) else "block")
    figure.suptitle(title, fontsize=11, parse_math=False)
    figure.tight_layout()
    return figure


def _width_bars(axis: Axes, counts: Sequence[tuple[int, int] | None]) -> None:
    full = max(of for _, of in filter(None, counts))
    for block, count in enumerate(counts):
        if count is None:
            _hatch(axis, block - 0.4, 0, 0.8, full)
            continue
        axis.bar(block, count[1], color=GONE, width=0.8)
        axis.bar(block, count[0], color=KEPT, width=0.8)
    axis.set_ylim(0, 1.05 * full)
    axis.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
