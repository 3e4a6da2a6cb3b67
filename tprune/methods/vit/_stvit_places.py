"""Where stvit's semantic tokens are in the image they stand for."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch.nn import functional

from tprune.core import grid as tiling
from tprune.core import select
from tprune.core.reduction import Reduction


def sizes(grid):
    """Rows and columns of ever more cells in a grid, one row or one column more each: [(1, 1), …, grid]."""
    rows, columns = grid
    found = []
    for total in range(2, rows + columns + 1):
        high = max(1, min(rows, total * rows // (rows + columns)))
        high = max(high, total - columns)
        found.append((high, total - high))
    return found


def resized(centres, grid):
    """`centres` [rows, columns, D] for a grid of another size, bilinearly: [K, D]."""
    if tuple(centres.shape[:2]) != tuple(grid):
        moved = centres.permute(2, 0, 1)[None].float()
        centres = functional.interpolate(moved, tuple(grid), mode="bilinear", align_corners=False)[0]
        centres = centres.permute(1, 2, 0)
    return centres.flatten(0, 1)


@dataclass(frozen=True)
class Places:
    """Where things are.

    Attributes:
        grid: rows and columns of cells.
        owner: int64 [N], the cell of every token.
        middle, rest: int64 [K] and [N - K], the token that stands for every cell, and the others.
        own, around: int64 [W, s · s] and [W, k · k], the cells of every window, and the tokens they see.
    """

    grid: tiling.Size
    owner: torch.Tensor
    middle: torch.Tensor
    rest: torch.Tensor
    own: torch.Tensor
    around: torch.Tensor


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def laid_out(grid, window, cells, reach, device):
    """The places of `cells` in every `window` of a `grid`, on a device."""
    map_ = tuple(side // one * cell for side, one, cell in zip(grid, window, cells, strict=True))
    owner, middle = tiling.cell_owners(grid, window, cells)
    around = tiling.overlapping(grid, window, reach)
    found = owner, middle, select.complement(middle[None], len(owner))[0], tiling.tiles(map_, cells), around
    return Places(map_, *(one.to(device) for one in found))


def unmoved(hidden, made, sight):
    """All stay; their values are `made` [B, N, D]."""
    index = torch.arange(hidden.shape[1], device=hidden.device).expand(hidden.shape[:2])
    return Reduction(index, hidden.shape[1], made=made, sight=sight)
