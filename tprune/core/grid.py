"""Tokens that form an image: windows and cells of their grid, and what lies in them."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

Size = tuple[int, int]
"""Rows and columns."""


def tiles(grid: Size, size: Size) -> Tensor:
    """The places of a grid in tiles of `size`, tiles and places row by row: int64 [tiles, rows · columns].

    `size` divides `grid`.
    """
    (rows, columns), (high, wide) = grid, size
    place = torch.arange(rows * columns).view(rows // high, high, columns // wide, wide)
    return place.transpose(1, 2).reshape(-1, high * wide)


def overlapping(grid: Size, window: Size, reach: int) -> Tensor:
    """Every window and what is around it: int64 [windows, (rows + reach) · (columns + reach)], at most the whole grid.

    Windows in the middle reach to both sides, those at the border to the inside alone, so that all are of one size.
    `window` divides `grid`.
    """

    def spans(side: int, inner: int) -> Tensor:
        size = min(inner + reach, side)
        first = (torch.arange(0, side, inner) - (size - inner) // 2).clamp(0, side - size)
        return first.unsqueeze(1) + torch.arange(size)

    rows, columns = (spans(*one) for one in zip(grid, window, strict=True))
    place = rows[:, None, :, None] * grid[1] + columns[None, :, None, :]
    return place.reshape(rows.shape[0] * columns.shape[0], -1)


def pool_cells(x: Tensor, grid: Size, window: Size, cells: Size, kind: str = "max") -> Tensor:
    """Every window of a grid pooled adaptively into `cells`, which form a smaller grid.

    Args:
        x: [B, rows · columns, D].
        window: divides `grid`.
        cells: rows and columns of cells in a window; they overlap where they do not divide it.
        kind: "max" or "mean".

    Returns:
        [B, K, D] with K = windows · cells, row by row over the whole grid.
    """
    batch, _, width = x.shape
    high, wide = grid[0] // window[0], grid[1] // window[1]
    parts = x.view(batch, high, window[0], wide, window[1], width).permute(0, 1, 3, 5, 2, 4)
    pool = functional.adaptive_max_pool2d if kind == "max" else functional.adaptive_avg_pool2d
    pooled = pool(parts.reshape(-1, width, *window), cells)
    pooled = pooled.view(batch, high, wide, width, *cells).permute(0, 1, 4, 2, 5, 3)
    return pooled.reshape(batch, -1, width)


def cell_owners(grid: Size, window: Size, cells: Size) -> tuple[Tensor, Tensor]:
    """To which cell every place of a grid belongs, each to one, and the place in the middle of every cell.

    Returns:
        owner int64 [rows · columns] and middle int64 [K], cells as `pool_cells` orders them.
    """

    def axis(side: int, size: int, count: int) -> tuple[Tensor, Tensor]:
        place = torch.arange(side)
        owner = place // size * count + place % size * count // size
        first = torch.searchsorted(owner, torch.arange(side // size * count + 1))
        return owner, (first[:-1] + first[1:] - 1) // 2

    (row, middle_row), (column, middle_column) = (axis(*one) for one in zip(grid, window, cells, strict=True))
    columns = grid[1] // window[1] * cells[1]
    owner = row.unsqueeze(1) * columns + column
    middle = middle_row.unsqueeze(1) * grid[1] + middle_column
    return owner.flatten(), middle.flatten()


@lru_cache(maxsize=256)
def even_cells(grid: Size, count: int) -> Tensor:
    """A grid cut into `count` cells as nearly square and equal as can be: the cell of every place, int64 [places].

    The rows fall into bands, the columns of each into its cells, row by row; where a square number of cells divides the
    grid they are its squares. 1 <= count <= places.
    """
    rows, columns = grid
    fewest = -(-count // columns)
    high = min(max(round((count * rows / columns) ** 0.5), fewest), rows, count)
    band = torch.arange(rows) * high // rows
    begins = torch.arange(high + 1) * count // high
    column = torch.arange(columns) * begins.diff().unsqueeze(1) // columns
    return (begins[:-1].unsqueeze(1) + column)[band].flatten()


@lru_cache(maxsize=64)
def far_apart(grid: Size, count: int) -> Tensor:
    """`count` places of a grid, from its first on always the one farthest by rows plus columns from all: bool [places].

    Ties go to the lower place (BTP's spatial start).
    """
    place = torch.arange(grid[0] * grid[1])
    row, column = place // grid[1], place % grid[1]
    apart = torch.full(place.shape, grid[0] + grid[1])
    chosen = torch.zeros(place.shape, dtype=torch.bool)
    for _ in range(min(count, len(place))):
        pick = int(apart.masked_fill(chosen, -1).argmax())
        chosen[pick] = True
        apart = torch.minimum(apart, (row - row[pick]).abs() + (column - column[pick]).abs())
    return chosen


def covered(cells: Tensor, size: Tensor, boxes: Tensor) -> Tensor:
    """Which cells of a grid boxes touch, as GlimpsePrune counts them: bool [B, N].

    Args:
        cells: int64 [B, N, 2], rows and columns.
        size: int64 [B, 2], how many there are.
        boxes: [B, n, 4], left, top, right and bottom as fractions of the whole; NaN where there is none.
    """
    edges = (boxes.unflatten(2, (2, 2)).flip(3) * size[:, None, None]).floor()
    first, last = edges[:, None, :, 0], torch.minimum(edges[:, None, :, 1], size[:, None, None] - 1)
    cells = cells.unsqueeze(2)
    return ((cells >= first) & (cells <= last)).all(3).any(2)


def best_near(score: Tensor, size: Size, reach: int) -> Tensor:
    """The largest score among the cells of a grid within `reach` rows and columns of each: [B, rows · columns]."""
    pooled = functional.max_pool2d(score.view(-1, 1, *size), 2 * reach + 1, stride=1, padding=reach)
    return pooled.flatten(1)


def voted_tiles(cells: Tensor, crops: Tensor, votes: Tensor) -> Tensor:
    """Which tokens lie in a tile that a token of the image as a whole votes for: bool [B, N].

    An image is there twice: as a whole, in a coarse grid, and cut into tiles of one size, whose outer borders may lack
    cells (padding). A token of the whole at row r of h votes for the tile of row floor(r · H / h) of the H that there
    are; for columns likewise (LRS-VQA, `get_next_level_fea`, which has no padding in front).

    Args:
        cells: int64 [B, N, 3], every token's crop, and its row and column there; -1 for none.
        crops: int64 [C, 3] on the CPU, every crop's image, and the row and column of the tile it is; -1 for a whole.
        votes: bool [B, N], tokens of wholes whose images have tiles.
    """
    images, rows, columns = (crops.amax(0) + 1).tolist()
    crop, cell = cells[..., 0], cells[..., 1:]
    image, tile = crops.to(cells.device)[crop.clamp_min(0)].split([1, 2], dim=2)
    image, tiled = image[..., 0], (crop >= 0) & (tile[..., 0] >= 0)
    side = cell.flatten(0, 1).amax(0) + 1
    # Rows and columns of all tiles together, from the first to the last that has tokens.
    place, bound = tile * side + cell, 1 << 30
    index = image.where(tiled, images).flatten().unsqueeze(1).expand(-1, 2)
    first, last = (
        place.new_full((images + 1, 2), start).scatter_reduce(0, index, place.flatten(0, 1), kind)[image]
        for start, kind in ((bound, "amin"), (-bound, "amax"))
    )
    wanted = (first + cell * (last - first + 1) // side) // side
    numbers = [(image * rows + part[..., 0]) * columns + part[..., 1] for part in (tile, wanted)]
    nobody = images * rows * columns
    own, wish = (number.where(there, nobody) for number, there in zip(numbers, (tiled, votes), strict=True))
    called = torch.zeros(nobody + 1, dtype=torch.bool, device=cells.device)
    return tiled & called.index_fill(0, wish.flatten(), True)[own]
