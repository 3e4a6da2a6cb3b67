"""Pictures of what pruning did: drawn from plain values, without a display, as bytes to be written or embedded."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from textwrap import wrap
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure

DIMMED, GRAY = 0.75, 128
"""How far a dropped patch is blended, and towards which brightness: dark and light images both show it."""
TINTED = 0.2
"""How far a merged patch is blended towards its group's colour."""
PANEL_PIXELS = 360
GOLDEN = 0.618033988749895


@dataclass(frozen=True)
class Picture:
    """Something drawn.

    Attributes:
        name: of its file; the ending says what `content` is: .png, .svg or .html.
        title: what it shows, in one line.
        content: the file's bytes.
        numbers: what was drawn, as JSON.
        terminal: the same for rich to print, or None.
    """

    name: str
    title: str
    content: bytes
    numbers: dict[str, Any] = field(default_factory=dict)
    terminal: Any = None


@dataclass(frozen=True)
class Panel:
    """One moment of an image's tokens.

    Attributes:
        title: where this is.
        stands: int64 [N], per patch the token that stands for it; -1 where it was dropped, -2 where there never was
            one (padding). A value of N or more is a token outside the grid.
    """

    title: str
    stands: np.ndarray

    @property
    def left(self) -> int:
        """How many tokens of the grid are left."""
        kept = self.stands[(self.stands >= 0) & (self.stands < len(self.stands))]
        return len(np.unique(kept))

    def numbers(self) -> dict[str, Any]:
        """What the panel shows."""
        dropped = int((self.stands == -1).sum())
        return {"site": self.title, "left": self.left, "dropped": dropped, "stands": self.stands.tolist()}


def enlarge(image: np.ndarray, side: int = PANEL_PIXELS) -> np.ndarray:
    """`image` uint8 [H, W, 3], every pixel repeated until the shorter side has at least `side` of them."""
    times = max(1, -(-side // min(image.shape[:2])))
    return image.repeat(times, axis=0).repeat(times, axis=1)


def fit(image: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """`image` [H, W, 3] without the pixels at its lower and right edge that fill no patch of `grid`."""
    high, wide = (size // count for size, count in zip(image.shape, grid, strict=False))
    return image[: high * grid[0], : wide * grid[1]]


def draw_patches(image: np.ndarray, stands: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """`image` with dropped patches dimmed, and merged ones outlined and tinted in their group's colour.

    Args:
        image: uint8 [H, W, 3], whole patches (`fit`).
        stands: int64 [N], as in `Panel`, row by row.
        grid: rows and columns, N of them.
    """
    high, wide = (size // count for size, count in zip(image.shape, grid, strict=False))
    groups = stands.reshape(grid).repeat(high, axis=0).repeat(wide, axis=1)  # [H, W]
    drawn = image.astype(np.float32)
    pale = DIMMED * GRAY + (1 - DIMMED) * drawn.mean(axis=2, keepdims=True)
    drawn = np.where((groups < 0)[..., None], pale, drawn)
    names, members = np.unique(stands[stands >= 0], return_counts=True)
    merged = np.isin(groups, names[(members > 1) | (names >= len(stands))])
    drawn[merged] += TINTED * (colours(groups[merged]) - drawn[merged])
    edge = merged & border(groups, max(1, min(high, wide) // 10))
    drawn[edge] = colours(groups[edge])
    return drawn.round().clip(0, 255).astype(np.uint8)


def border(groups: np.ndarray, width: int) -> np.ndarray:
    """Which pixels of `groups` [H, W] are within `width` pixels of another group, or of the edge: bool [H, W]."""
    around = np.pad(groups, width, constant_values=-3)
    high, wide = groups.shape
    steps = (0, width, 2 * width)
    shifted = (around[down : down + high, right : right + wide] for down in steps for right in steps)
    return np.any([groups != other for other in shifted], axis=0)


def colours(groups: np.ndarray) -> np.ndarray:
    """A strong colour per group [n] -> float [n, 3], 0 to 255; the same group has the same in every panel."""
    hue = groups * GOLDEN % 1
    shade = np.stack([hue, np.full_like(hue, 0.85), np.full_like(hue, 1.0)], axis=-1)
    return 255 * hsv_to_rgb(shade)


def patches(
    name: str,
    title: str,
    image: np.ndarray,
    grid: tuple[int, int],
    panels: Sequence[Panel],
    answers: dict[str, Any] | None = None,
) -> Picture:
    """The image, and one panel per site beside it.

    Args:
        name: of the picture, without ending.
        title: over all panels.
        image: uint8 [H, W, 3], as the model saw it.
        grid: rows and columns of its patches.
        panels: in the order in which tokens left.
        answers: what else belongs to the numbers.
    """
    image = enlarge(fit(image, grid))
    shown = [("input", image)]
    for panel in panels:
        label = f"{panel.title}: {panel.left} of {(panel.stands >= -1).sum()}"
        shown.append((label, draw_patches(image, panel.stands, grid)))
    rows = 1 if len(shown) < 6 else round((len(shown) / 1.7) ** 0.5)
    columns = -(-len(shown) // rows)
    figure = Figure(figsize=(2.3 * columns, 2.3 * rows * image.shape[0] / image.shape[1] + 0.7))
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis in axes:
        axis.axis("off")
    for axis, (label, pixels) in zip(axes, shown, strict=False):
        axis.imshow(pixels, interpolation="antialiased")
        axis.set_title(label, fontsize=9)
    lines = [wrapped for line in title.splitlines() for wrapped in wrap(line, max(40, 32 * columns))]
    figure.suptitle("\n".join(lines), fontsize=11, parse_math=False)
    figure.tight_layout()
    numbers = {**(answers or {}), "grid": list(grid), "sites": [panel.numbers() for panel in panels]}
    return Picture(f"{name}.png", " ".join(title.split()), rendered(figure, "png"), numbers)


def rendered(figure: Figure, kind: str) -> bytes:
    """A figure as the bytes of a "png" or "svg" file; equal figures give equal bytes."""
    buffer = io.BytesIO()
    stamp = {"Date": None} if kind == "svg" else {}
    with rc_context({"svg.hashsalt": "tprune"}):
        figure.savefig(buffer, format=kind, dpi=150, metadata=stamp, bbox_inches="tight", pad_inches=0.1)
    return buffer.getvalue()
