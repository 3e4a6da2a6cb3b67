"""Tokens of little worth, folded into one for each cell that they lie in."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from tprune.core.ranks import rank
from tprune.core.reduction import Reduction
from tprune.core.select import best_of, keep_where


def enough(worth: Tensor, cell: Tensor, count: Tensor) -> Tensor:
    """The lowest tokens, as few as leave `count` once they are folded; all of them where that does not suffice.

    Args:
        worth: [B, N].
        cell: int64 [B, N], of every token, 0 to N - 1.
        count: int64 [B], how many shall be left.

    Returns:
        bool [B, N].
    """
    length = worth.shape[1]
    place = rank(-worth)
    first = torch.full_like(cell, length).scatter_reduce(1, cell, place, "amin")
    # Each token but the first of its cell makes one less.
    joins = torch.zeros_like(cell).scatter(1, place, (place > first.gather(1, cell)).long())
    gone = torch.cat([torch.zeros_like(cell[:, :1]), joins.cumsum(1)], dim=1)
    return place < (gone < (length - count).unsqueeze(1)).sum(1, keepdim=True)


def fold(worth: Tensor, cell: Tensor, low: Tensor, count: Tensor) -> Reduction:
    """Of each cell the tokens that are `low` become one, their mean weighted by worth, in the place of the best.

    Args:
        worth: [B, N], positive.
        cell: int64 [B, N], of every token, 0 to N - 1.
        low: bool [B, N].
        count: int64 [B], how many are left at most; what is too much of the folded ones leaves, the worst first.
    """
    length = worth.shape[1]
    best = rank(worth)
    leader = torch.full_like(cell, length).scatter_reduce(1, cell, torch.where(low, best, length), "amin")
    leads = low & (best == leader.gather(1, cell))
    kept = ~low | best_of(worth, leads, count - (~low).sum(1))
    index, valid = keep_where(kept)
    total = torch.zeros_like(worth).scatter_add(1, cell, worth * low).gather(1, cell)
    share = torch.where(low, worth / total.clamp_min(torch.finfo(worth.dtype).tiny), 1.0)
    place = torch.arange(length, device=cell.device).expand_as(cell)
    home = (
        torch.zeros_like(cell).scatter_reduce(1, cell, torch.where(leads, place, 0), "amax").gather(1, cell)
    )
    joins = low & ~leads & kept.gather(1, home)
    into = torch.where(joins, (kept.cumsum(1) - 1).gather(1, home), -1)
    folded = Reduction.merge(index, length, place, into, weight=share * joins, own=share.gather(1, index))
    return replace(folded, valid=valid)
