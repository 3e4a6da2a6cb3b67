"""Caches whose key-value heads hold numbers of entries of their own, which they share by their scores (Ada-KV)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tprune.core.stored import TILE, Encode, Part, Stored
from tprune.core.tiles import Tile


@dataclass(frozen=True, eq=False)
class Ragged(Part):
    """Every key-value head holds a number of entries of its own; nothing is stored for those it lacks.

    Attributes:
        rows: per row keys [S, d] and values [S, e], head after head.
        counts: int64 [B, G], how many each head holds.
    """

    rows: tuple[tuple[Tensor, Tensor], ...]
    counts: Tensor

    @classmethod
    def of(cls, key: Tensor, value: Tensor, index: Tensor, counts: Tensor) -> Ragged:
        """Of `key` and `value` [B, G, T, d] the first `counts` [B, G] of `index` [B, G, M] of every head."""
        taken = torch.arange(index.shape[2], device=index.device) < counts.unsqueeze(2)
        rows = []
        for row, real in enumerate(taken):
            head, place = real.nonzero(as_tuple=True)
            chosen = index[row, head, place]
            rows.append((key[row, head, chosen], value[row, head, chosen]))
        return cls(tuple(rows), counts)

    @property
    def nbytes(self) -> int:
        """Keys and values."""
        return sum(x.nbytes for row in self.rows for x in row)

    def tiles(self) -> Iterator[Tile]:
        """Shorter heads show their last entry again, hidden."""
        first = self.counts.cumsum(1) - self.counts
        place = torch.arange(int(self.counts.max()), device=self.counts.device)
        for part in place.split(TILE):
            visible = part < self.counts.unsqueeze(2)  # [B, G, t]
            index = (first.unsqueeze(2) + part).where(visible, 0)
            states = zip(self.rows, index, strict=True)
            keys, values = zip(*((key[at], value[at]) for (key, value), at in states), strict=True)
            yield Tile(torch.stack(keys), torch.stack(values), visible.unsqueeze(2))

    def each_row(self, change: Callable[[Tensor], Tensor]) -> Ragged:
        """Whole rows are exchanged."""
        order = change(torch.arange(len(self.rows), device=self.counts.device))
        return Ragged(tuple(self.rows[row] for row in order.tolist()), change(self.counts))


def keep_by_head(
    key: Tensor, value: Tensor, score: Tensor, count: int, first: int, last: int, floor: float
) -> Encode:
    """As `select.keep_ends_and_top`, but the heads share `count` entries each by their scores (`shared_counts`).

    Args:
        key, value: [B, G, T, d].
        score: [B, G, T], not negative, comparable between heads.
        count, first, last: as there.
        floor: the part of an equal share that every head has.
    """
    length = score.shape[-1]
    between = score[..., first : length - last]
    counts = shared_counts(between, count - first - last, floor)
    order = between.argsort(dim=-1, descending=True, stable=True) + first
    place = torch.arange(length, device=score.device)
    ends = torch.cat([place[:first], place[length - last :]]).expand(*score.shape[:2], -1)
    return Encode(Stored((Ragged.of(key, value, torch.cat([ends, order], dim=-1), counts + first + last),)))


def shared_counts(score: Tensor, count: int, floor: float) -> Tensor:
    """How many entries each head keeps where all heads of a layer share one budget (Ada-KV, as its code has it).

    Every head gets the part `floor` of its equal share, and of the rest as much as it has among the best entries
    of all heads together.

    Args:
        score: [B, G, N], comparable between heads; of equals the lower head's count first.
        count: the mean over heads, at most N.
        floor: 0 to 1; 1 makes all shares equal.

    Returns:
        int64 [B, G], each at most N; their sum is G · count but for rounding.
    """
    groups, length = score.shape[1:]
    ordered = score.sort(dim=-1, descending=True).values.flatten(1)
    best = ordered.argsort(dim=-1, descending=True, stable=True)[:, : groups * count] // length
    share = score.new_zeros(len(score), groups).scatter_add_(1, best, score.new_ones(best.shape))
    return (share * (1 - floor) + int(count * floor)).round().long()
