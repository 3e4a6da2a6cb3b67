"""Scenes made of real handwritten digits: the images and questions of the two built-in models.

The digits are scikit-learn's 1,797 scans of 8x8 pixels, cut once into disjoint training and test sets. A scene is a
96x96 RGB image on a shaded, noisy ground. A *classification* scene holds one large digit among stroke fragments of
other digits; a *question* scene holds two to six digits in the cells of a 3x3 grid, with fragments between them, and
is asked which digit is at a place (`what`), where a digit is (`where`) and how many digits there are (`count`).

Scene `i` of a split is a pure function of (seed, split, i): nothing reads or moves a global random state.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image

SIZE = 96
GRID = 3
CELL = SIZE // GRID
PLACES = tuple(f"{row}-{col}" for row in ("top", "middle", "bottom") for col in ("left", "center", "right"))
DIGITS = tuple(str(digit) for digit in range(10))
NOTHING = "nothing"
COUNTS = range(2, 7)
KINDS = ("what", "where", "count")
SPLITS = ("train", "test")
EVALUATION_SEED = 20_000

_FINE = 32  # side of the smoothed digits that scenes sample from
_HALF = 13  # half a box around a digit, in pixels: digits are 22 to 27 high
_INK = (0.72, 1.0)
_GROUND = (0.08, 0.32)


Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Scene:
    """One image of a classification set: `label` is the class of the large digit, 0 to 9."""

    image: Image.Image
    label: int


@dataclass(frozen=True)
class Question:
    """One question about one image.

    Attributes:
        answer: a single word.
        kind: one of `KINDS`.
        boxes, digits: where the answer is read and where any digit stands, (left, top, right, bottom) each, as
            fractions of the image.
    """

    image: Image.Image
    prompt: str
    answer: str
    kind: str
    boxes: tuple[Box, ...] = ()
    digits: tuple[Box, ...] = ()


@dataclass(frozen=True)
class Layout:
    """What a question scene holds: the digit in each cell, -1 where there is none, and where its centre lies."""

    pixels: np.ndarray  # [96, 96, 3] uint8
    cells: np.ndarray  # [9] int, row-major
    centres: np.ndarray  # [9, 2] float, (row, column) in pixels; NaN where the cell is empty


@cache
def digit_images(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Digits of one split, smoothed from 8x8 to 32x32: ([n, 32, 32] float32 in 0..1, [n] labels).

    The last quarter of a fixed shuffle is the test set, so the two splits share no scan.
    """
    from sklearn.datasets import load_digits

    scans, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    cut = len(order) * 3 // 4
    chosen = order[:cut] if _checked(split) == "train" else order[cut:]
    rows = _cubic_rows(8, _FINE)  # [32, 8]
    fine = np.einsum("ai,nij,bj->nab", rows, scans[chosen].reshape(-1, 8, 8) / 16.0, rows)
    return np.clip(fine, 0, 1).astype(np.float32), labels[chosen]


def classification_scene(split: str, index: int, seed: int = 0) -> tuple[np.ndarray, int, tuple]:
    """One large digit among fragments: ([96, 96, 3] uint8, its class, its box (top, left, height, width) in pixels)."""
    rng = np.random.default_rng((seed, SPLITS.index(_checked(split)), 0, index))
    images, labels = digit_images(split)
    canvas = np.zeros((SIZE, SIZE), np.float32)
    side = rng.uniform(38, 50)
    centre = rng.uniform(side * 0.42, SIZE - side * 0.42, 2)
    for _ in range(rng.integers(8, 15)):
        _draw_fragment(canvas, images, rng)
    chosen = rng.integers(len(labels))
    _erase(canvas, centre, side)
    _draw(canvas, images[chosen], centre, side, rng)
    box = (centre[0] - side / 2, centre[1] - side / 2, side, side)
    return _develop(canvas, rng), int(labels[chosen]), box


def mosaic_scene(split: str, index: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Four large digits, one a quadrant, for training: ([96, 96, 3] uint8, [4] classes, [4, 2] centres in pixels)."""
    rng = np.random.default_rng((seed, SPLITS.index(_checked(split)), 3, index))
    images, labels = digit_images(split)
    canvas = np.zeros((SIZE, SIZE), np.float32)
    chosen = rng.integers(len(labels), size=4)
    centres = np.array([(24, 24), (24, 72), (72, 24), (72, 72)]) + rng.uniform(-4, 4, (4, 2))
    for _ in range(rng.integers(3, 7)):
        _draw_fragment(canvas, images, rng)
    for glyph, centre in zip(images[chosen], centres, strict=True):
        side = rng.uniform(32, 48)
        _erase(canvas, centre, side)
        _draw(canvas, glyph, centre, side, rng)
    return _develop(canvas, rng), labels[chosen], centres


def question_layout(split: str, index: int, seed: int = 0, counts: range = COUNTS) -> Layout:
    """Several digits in the cells of a 3x3 grid, with stroke fragments and noise."""
    rng = np.random.default_rng((seed, SPLITS.index(_checked(split)), 1, index))
    images, labels = digit_images(split)
    canvas = np.zeros((SIZE, SIZE), np.float32)
    cells = np.full(GRID * GRID, -1)
    centres = np.full((GRID * GRID, 2), np.nan)
    occupied = rng.permutation(GRID * GRID)[: rng.integers(counts.start, counts.stop)]
    for _ in range(rng.integers(6, 11)):
        _draw_fragment(canvas, images, rng)
    for cell in occupied:
        chosen = rng.integers(len(labels))
        side = rng.uniform(22, 27)
        centre = (np.array(divmod(int(cell), GRID)) + 0.5) * CELL + rng.uniform(-3, 3, 2)
        _erase(canvas, centre, side)
        _draw(canvas, images[chosen], centre, side, rng)
        cells[cell], centres[cell] = labels[chosen], centre
    return Layout(_develop(canvas, rng), cells, centres)


def questions_about(layout: Layout, rng: np.random.Generator) -> dict[str, list[tuple[str, str]]]:
    """Every kind's (prompt, answer) pairs about one scene, shuffled; the `where` list may be empty.

    `what` names each occupied cell and a third as many empty ones; `where` asks only for digits that appear once.
    """
    occupied = np.flatnonzero(layout.cells >= 0)
    empty = rng.permutation(np.flatnonzero(layout.cells < 0))[: max(1, round(len(occupied) / 3))]
    what = [(f"what is at {PLACES[c]} ?", DIGITS[layout.cells[c]]) for c in occupied]
    what += [(f"what is at {PLACES[c]} ?", NOTHING) for c in empty]
    present = layout.cells[occupied]
    where = [
        (f"where is {DIGITS[layout.cells[c]]} ?", PLACES[c])
        for c in occupied
        if np.count_nonzero(present == layout.cells[c]) == 1
    ]
    count = [("how many digits are there ?", DIGITS[len(occupied)])]
    return {"what": _shuffled(what, rng), "where": _shuffled(where, rng), "count": count}


def classification_scenes(split: str, n: int, seed: int = 0) -> Iterator[Scene]:
    """The first `n` classification scenes of a split, as images and labels."""
    for index in range(n):
        pixels, label, _ = classification_scene(split, index, seed)
        yield Scene(Image.fromarray(pixels), label)


def question_scenes(split: str, n: int, seed: int = 0) -> Iterator[Question]:
    """The first `n` question scenes of a split with one question each (`question_scene`)."""
    for index in range(n):
        yield question_scene(split, index, seed)


def question_scene(split: str, index: int, seed: int = 0) -> Question:
    """One question scene of a split; the kinds take turns.

    A scene in which no digit appears exactly once is asked `what` instead of `where`.
    """
    layout = question_layout(split, index, seed)
    rng = np.random.default_rng((seed, SPLITS.index(split), 2, index))
    asked = questions_about(layout, rng)
    kind = KINDS[index % len(KINDS)]
    kind = kind if asked[kind] else "what"
    prompt, answer = asked[kind][0]
    occupied = np.flatnonzero(layout.cells >= 0)
    if kind == "count":
        read = occupied
    else:
        read = [cell for cell, place in enumerate(PLACES) if place in (answer, *prompt.split())]
    boxes, digits = _boxes(layout, read), _boxes(layout, occupied)
    return Question(Image.fromarray(layout.pixels), prompt, answer, kind, boxes, digits)


def _boxes(layout: Layout, cells: Iterable[int]) -> tuple[Box, ...]:
    """Of the digits in some cells; in the middle of those that are empty."""
    found = []
    for cell in cells:
        middle = (np.array(divmod(int(cell), GRID)) + 0.5) * CELL
        y, x = np.where(np.isnan(layout.centres[cell]), middle, layout.centres[cell])
        box = np.clip([x - _HALF, y - _HALF, x + _HALF, y + _HALF], 0, SIZE) / SIZE
        found.append(tuple(box.tolist()))
    return tuple(found)


def evaluation_scenes(name: str, n: int = 2000) -> list[Scene] | list[Question]:
    """The fixed evaluation set of `digits-vit` or `digits-llava`: its first `n` scenes, drawn from test digits."""
    makers = {"digits-vit": classification_scenes, "digits-llava": question_scenes}
    if name not in makers:
        raise ValueError(f"no evaluation scenes for {name!r}; there are some for {', '.join(makers)}")
    return list(makers[name]("test", n, EVALUATION_SEED))


def _checked(split: str) -> str:
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; expected one of {', '.join(SPLITS)}")
    return split


def _shuffled(items: list, rng: np.random.Generator) -> list:
    return [items[i] for i in rng.permutation(len(items))]


def _cubic_rows(n_in: int, n_out: int) -> np.ndarray:
    """Catmull-Rom interpolation from `n_in` samples to `n_out`, as a matrix [n_out, n_in]; rows sum to one inside."""
    centre = (np.arange(n_out) + 0.5) * n_in / n_out - 0.5
    x = np.abs(centre[:, None] - np.arange(n_in))
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def _draw(
    canvas: np.ndarray, glyph: np.ndarray, centre: np.ndarray, side: float, rng: np.random.Generator
) -> None:
    """Draw a glyph [h, w] into the canvas by maximum, `side` pixels high, turned and slanted a little."""
    angle, slant = rng.uniform(-0.2, 0.2), rng.uniform(-0.2, 0.2)
    stretch = np.exp(rng.uniform(-0.1, 0.1))
    reach = int(side * 0.75) + 1
    low = np.maximum(np.floor(centre).astype(int) - reach, 0)
    high = np.minimum(np.floor(centre).astype(int) + reach + 1, SIZE)
    y = (np.arange(low[0], high[0]) - centre[0])[:, None]
    x = (np.arange(low[1], high[1]) - centre[1])[None, :]
    per_pixel = glyph.shape[0] / side
    u = (np.cos(angle) * y - np.sin(angle) * x) * per_pixel + (glyph.shape[0] - 1) / 2
    v = (np.sin(angle) * y + np.cos(angle) * x + slant * y) * per_pixel * stretch + (glyph.shape[1] - 1) / 2
    ink = _bilinear(glyph, u, v) * rng.uniform(*_INK)
    window = canvas[low[0] : high[0], low[1] : high[1]]
    np.maximum(window, ink, out=window)


def _bilinear(glyph: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Values of a glyph at fractional (row u, column v), zero outside it."""
    padded = np.pad(glyph, 1)
    u = np.clip(u + 1, 0, padded.shape[0] - 1.001)
    v = np.clip(v + 1, 0, padded.shape[1] - 1.001)
    i, j = u.astype(int), v.astype(int)
    du, dv = u - i, v - j
    above = padded[i, j] * (1 - dv) + padded[i, j + 1] * dv
    below = padded[i + 1, j] * (1 - dv) + padded[i + 1, j + 1] * dv
    return above * (1 - du) + below * du


def _draw_fragment(canvas: np.ndarray, images: np.ndarray, rng: np.random.Generator) -> None:
    """Draw a square window of some digit, 9 to 14 pixels wide, anywhere: a stroke that means nothing."""
    glyph = images[rng.integers(len(images))]
    side = int(rng.integers(12, 17))
    top, left = rng.integers(4, _FINE - side - 4, 2)
    _draw(
        canvas,
        glyph[top : top + side, left : left + side],
        rng.uniform(4, SIZE - 4, 2),
        rng.uniform(9, 14),
        rng,
    )


def _erase(canvas: np.ndarray, centre: np.ndarray, side: float) -> None:
    """Clear the disc a digit will stand in, so that fragments surround digits but do not cross them."""
    y, x = np.ogrid[:SIZE, :SIZE]
    canvas[(y - centre[0]) ** 2 + (x - centre[1]) ** 2 < (0.55 * side) ** 2] = 0


def _develop(ink: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Ink coverage [96, 96] to a tinted image [96, 96, 3] uint8 with an uneven ground and grain."""
    ramp = np.linspace(-0.5, 0.5, SIZE, dtype=np.float32)
    slope = rng.uniform(-0.15, 0.15, 2)
    ground = rng.uniform(*_GROUND) + slope[0] * ramp[:, None] + slope[1] * ramp
    grey = ground + (1 - ground) * ink + rng.normal(0, 0.07, ink.shape)
    tint = rng.uniform(0.8, 1.0, 3)
    return (np.clip(grey[..., None] * tint, 0, 1) * 255).round().astype(np.uint8)
