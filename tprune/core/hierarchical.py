"""The keys a query would look at most, found without looking at all of them (InfiniteHiP), wherever they lie.

Keys that stand together are alike. A chunk of them is searched like a sorted list: of its halves the one whose middle
suits the query better is halved again; the best key met on the way speaks for the chunk. The best chunks are cut into
smaller ones, and so on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from tprune.core.cache import flat_rows
from tprune.core.select import top
from tprune.core.stored import TILE, Part
from tprune.core.tiles import Tile

Score = Callable[[Tensor], Tensor]
"""From slots int64 [B, H, C] to what the query thinks of the keys there, [B, H, C]."""


def descend(score: Score, left: Tensor, right: Tensor) -> Tensor:
    """What each chunk [left, right) is worth, float [B, H, C]: the best score met on the way down; -inf of empty ones.

    Of two halves with equal middles the later one is taken (the authors' kernel).
    """
    most = torch.full(left.shape, -torch.inf, device=left.device)
    for _ in range(int((right - left).max()).bit_length()):
        there, centre = left < right, (left + right) // 2
        first, second = score((left + centre) // 2), score((centre + right) // 2)
        former = first > second
        most = torch.where(there, torch.maximum(most, torch.where(former, first, second)), most)
        left, right = torch.where(there & ~former, centre, left), torch.where(there & former, centre, right)
    return most


def hierarchical_top(
    score: Score, shape: tuple[int, int], first: int, last: int, sizes: Sequence[int], kept: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Slots int64 [B, H, K] of the best small chunks of those from `first` to `last`, and which are real.

    Args:
        score: of single keys.
        shape: B and H.
        first, last: the candidates are [first, last).
        sizes: of chunks, stage by stage; each divides the one before.
        kept: how many slots are left after each stage, in whole chunks; K in the end.
    """
    left = torch.arange(first, max(last, first + 1), sizes[0]).expand(*shape, -1)

    def inside(slots: Tensor) -> Tensor:
        return score(slots.clamp(first, max(last - 1, first)))

    for stage, (size, count) in enumerate(zip(sizes, kept, strict=True)):
        worth = descend(inside, left, (left + size).clamp_max(last))
        best = top(worth, min(max(count // size, 1), left.shape[2]))
        left = left.gather(2, best)
        if stage + 1 < len(sizes):
            left = (left.unsqueeze(3) + torch.arange(0, size, sizes[stage + 1])).flatten(2)
    slots = (left.unsqueeze(3) + torch.arange(sizes[-1])).flatten(2)
    real = slots < last
    return slots.where(real, first), real


@dataclass(frozen=True, eq=False)
class Hosted(Part):
    """Entries in the host's memory, of which a query reads the first and the best of the others, found in stages.

    Attributes:
        pieces: keys and values [B, G, T_i, d] of one or two stretches, the older and longer one first.
        first: how many of the first entries every query reads.
        sizes, kept: as for `hierarchical_top`.
    """

    pieces: tuple[tuple[Tensor, Tensor], ...]
    first: int
    sizes: tuple[int, ...]
    kept: tuple[int, ...]
    grows: ClassVar[bool] = True
    splits: ClassVar[bool] = False

    @classmethod
    def of(cls, key: Tensor, value: Tensor, first: int, sizes: Sequence[int], kept: Sequence[int]) -> Hosted:
        """A copy of `key` and `value` [B, G, T, d] on the host."""
        piece = tuple(x.to("cpu", copy=True) for x in (key, value))
        return cls((piece,), first, tuple(sizes), tuple(kept))

    @property
    def length(self) -> int:
        """How many entries a head holds."""
        return sum(key.shape[2] for key, _ in self.pieces)

    @property
    def nbytes(self) -> int:
        """All entries, in the host's memory."""
        return sum(x.nbytes for piece in self.pieces for x in piece)

    @property
    def nbytes_read(self) -> int:
        """The first entries and the chosen ones, by which a token attends."""
        chosen = min(self.kept[-1], self.length - self.first)
        return self.nbytes // self.length * (self.first + chosen)

    def tiles(self) -> Iterator[Tile]:
        """All entries."""
        for key, value in self.pieces:
            yield from map(Tile, key.split(TILE, 2), value.split(TILE, 2))

    def seen_by(self, query: Tensor) -> Iterator[Tile]:
        """The first entries, then for every query head the best of the others; of single queries [B, H, 1, d]."""
        asked = query.detach().to("cpu", torch.float32)
        groups = self.pieces[0][0].shape[1]

        def score(slots: Tensor) -> Tensor:
            keys = self._at(0, slots.reshape(len(slots), groups, -1))  # [B, G, r·C, d]
            return (keys.float().view(*slots.shape, -1) * asked).sum(3)

        slots, real = hierarchical_top(score, query.shape[:2], self.first, self.length, self.sizes, self.kept)
        yield Tile(*(x[:, :, : self.first].to(query.device) for x in self.pieces[0]))
        index = slots.reshape(len(slots), groups, -1)
        chosen = (self._at(part, index).view(*slots.shape, -1).to(query.device) for part in (0, 1))
        yield Tile(*chosen, real.unsqueeze(2).to(query.device))

    def _at(self, part: int, slots: Tensor) -> Tensor:
        """Keys (0) or values (1) at `slots` [B, G, C]: [B, G, C, d]."""
        older = self.pieces[0][part]
        length, width = older.shape[2:]
        rows = older.view(-1, width)[flat_rows(slots.clamp_max(length - 1), length)].view(*slots.shape, width)
        if len(self.pieces) == 1:
            return rows
        later = self.pieces[1][part]
        place = (slots - length).clamp_min(0).unsqueeze(3).expand_as(rows)
        return torch.where((slots < length).unsqueeze(3), rows, later.gather(2, place))

    def each_row(self, change: Callable[[Tensor], Tensor]) -> Hosted:
        """The rows of all pieces."""
        return replace(self, pieces=tuple(tuple(map(change, piece)) for piece in self.pieces))

    def like(self, key: Tensor, value: Tensor) -> Hosted:
        """Later entries, on the host too."""
        return Hosted.of(key, value, self.first, self.sizes, self.kept)

    def join(self, later: Hosted) -> Hosted:
        """Later entries gather in a short stretch, which joins the long one when it is full."""
        pieces = [*self.pieces, *later.pieces]
        while len(pieces) > 2 or (len(pieces) == 2 and pieces[-1][0].shape[2] >= TILE):
            older, newer = pieces[-2:]
            pieces[-2:] = [tuple(torch.cat(pair, dim=2) for pair in zip(older, newer, strict=True))]
        return replace(self, pieces=tuple(pieces))
