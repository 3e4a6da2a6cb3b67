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
from torch.nn.functional import pad

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


def search(
    score: Score, left: Tensor, stage: int, ends: tuple[int, int], sizes: Sequence[int], kept: Sequence[int]
) -> list[Tensor]:
    """The chunks that each stage from `stage` on is given, and those that the last one leaves: int64 [B, H, C] each.

    Args:
        score: of single keys.
        left: int64 [B, H, C], where the chunks begin that `stage` is given.
        stage: the first one to search.
        ends: the candidates are [first, last).
        sizes: of chunks, stage by stage; each divides the one before.
        kept: how many slots are left after each stage, in whole chunks.
    """
    first, last = ends
    found = [left]
    for place in range(stage, len(sizes)):
        left, size = found[-1], sizes[place]
        worth = descend(
            lambda slots: score(slots.clamp(first, max(last - 1, first))), left, (left + size).clamp_max(last)
        )
        left = left.gather(2, top(worth, min(max(kept[place] // size, 1), left.shape[2])))
        if place + 1 < len(sizes):
            left = (left.unsqueeze(3) + torch.arange(0, size, sizes[place + 1])).flatten(2)
        found.append(left)
    return found


def all_chunks(shape: tuple[int, int], ends: tuple[int, int], size: int) -> Tensor:
    """What the first stage is given: chunks of `size` from first to last, int64 [B, H, C]."""
    return torch.arange(ends[0], max(ends[1], ends[0] + 1), size).expand(*shape, -1)


def slots_of(left: Tensor, size: int, ends: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The slots int64 [B, H, K] of chunks, and which of them are real: none behind the last candidate."""
    slots = (left.unsqueeze(3) + torch.arange(size)).flatten(2)
    real = slots < ends[1]
    return slots.where(real, ends[0]), real


def hierarchical_top(
    score: Score, shape: tuple[int, int], first: int, last: int, sizes: Sequence[int], kept: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Slots int64 [B, H, K] of the best small chunks of those from `first` to `last`, and which are real.

    Args:
        score, sizes, kept: as for `search`; K in the end.
        shape: B and H.
        first, last: the candidates are [first, last).
    """
    ends = first, last
    found = search(score, all_chunks(shape, ends, sizes[0]), 0, ends, sizes, kept)
    return slots_of(found[-1], sizes[-1], ends)


@dataclass(frozen=True, eq=False)
class Found:
    """What queries have chosen, until they search again.

    Attributes:
        age: how many tokens asked before the latest one.
        last: the entries from here on came after the last search through all.
        chunks: what each stage was given, and what the last one left.
        key, value: [B, H, K, d], the first entries and the chosen ones, on the queries' device.
        real: bool [B, H, K], False for fillers; None where there are none.
    """

    age: int
    last: int
    chunks: tuple[Tensor, ...]
    key: Tensor
    value: Tensor
    real: Tensor | None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All of them."""
        return (*self.chunks, self.key, self.value, *(() if self.real is None else (self.real,)))

    def each_row(self, change: Callable[[Tensor], Tensor]) -> Found:
        """Of all tensors."""
        real = None if self.real is None else change(self.real)
        chunks = tuple(map(change, self.chunks))
        return replace(self, chunks=chunks, key=change(self.key), value=change(self.value), real=real)


@dataclass(frozen=True, eq=False)
class Hosted(Part):
    """Entries in the host's memory, of which a query reads the first and the best of the others, found in stages.

    Attributes:
        pieces: keys and values [B, G, T_i, d] of one or two stretches, the older and longer one first.
        first: how many of the first entries every query reads.
        sizes, kept: as for `search`.
        every: after how many tokens each stage searches again, and those behind it; the stages before it have then
            left what they left when they last searched.
        found: what the latest queries chose; None before any.
    """

    pieces: tuple[tuple[Tensor, Tensor], ...]
    first: int
    sizes: tuple[int, ...]
    kept: tuple[int, ...]
    every: tuple[int, ...]
    found: Found | None = None
    grows: ClassVar[bool] = True
    splits: ClassVar[bool] = False
    asks: ClassVar[bool] = True

    @classmethod
    def of(
        cls,
        key: Tensor,
        value: Tensor,
        first: int,
        sizes: Sequence[int],
        kept: Sequence[int],
        every: Sequence[int] | None = None,
    ) -> Hosted:
        """A copy of `key` and `value` [B, G, T, d] on the host; without `every` each token searches in all stages."""
        piece = tuple(x.to("cpu", copy=True) for x in (key, value))
        return cls((piece,), first, tuple(sizes), tuple(kept), tuple(every or [1] * len(sizes)))

    @property
    def length(self) -> int:
        """How many entries a head holds."""
        return sum(key.shape[2] for key, _ in self.pieces)

    @property
    def nbytes(self) -> int:
        """All entries, in the host's memory, and what is read of them."""
        found = () if self.found is None else self.found.tensors
        return self._hosted + sum(x.nbytes for x in found)

    @property
    def _hosted(self) -> int:
        return sum(x.nbytes for piece in self.pieces for x in piece)

    @property
    def nbytes_read(self) -> int:
        """The first entries and the chosen ones, by which a token attends."""
        chosen = min(self.kept[-1], self.length - self.first)
        return self._hosted // self.length * (self.first + chosen)

    def tiles(self) -> Iterator[Tile]:
        """All entries."""
        for key, value in self.pieces:
            yield from map(Tile, key.split(TILE, 2), value.split(TILE, 2))

    def seen_by(self, query: Tensor) -> Iterator[Tile]:
        """The first entries and for every query head the chosen ones, then what came since all were searched."""
        found = self.found or self.asked(query).found
        yield Tile(found.key, found.value, None if found.real is None else found.real.unsqueeze(2))
        begin = 0
        for piece in self.pieces:
            end = begin + piece[0].shape[2]
            if end > found.last:
                yield Tile(*(x[:, :, max(found.last - begin, 0) :].to(query.device) for x in piece))
            begin = end

    def asked(self, query: Tensor) -> Hosted:
        """Once single queries [B, H, 1, d] of a later token have searched where it is time to."""
        old = self.found
        age = 0 if old is None else old.age + 1
        due = [stage for stage, every in enumerate(self.every) if age % every == 0]
        if old is not None and not due:
            return replace(self, found=replace(old, age=age))
        stage = 0 if old is None else due[0]
        last = self.length if stage == 0 else old.last
        ends = self.first, last
        chunks = [all_chunks(query.shape[:2], ends, self.sizes[0])] if stage == 0 else old.chunks[: stage + 1]
        score = self._score(query.detach().to("cpu", torch.float32), chunks[-1].shape[2], stage)
        chunks = (*chunks[:-1], *search(score, chunks[-1], stage, ends, self.sizes, self.kept))
        slots, real = slots_of(chunks[-1], self.sizes[-1], ends)
        slots = torch.cat([torch.arange(self.first).expand(*slots.shape[:2], -1), slots], dim=2)
        real = None if bool(real.all()) else pad(real, (self.first, 0), value=True).to(query.device)
        groups = self.pieces[0][0].shape[1]
        key, value = (
            self._at(part, slots.reshape(len(slots), groups, -1)).view(*slots.shape, -1).to(query.device)
            for part in (0, 1)
        )
        return replace(self, found=Found(age, last, chunks, key, value, real))

    def _score(self, asked: Tensor, chunks: int, stage: int) -> Score:
        """What float32 queries [B, H, 1, d] think of keys: of all at once, where a search would look at as many."""
        batch, heads = asked.shape[:2]
        groups, looks = self.pieces[0][0].shape[1], 0
        for size, smaller, count in zip(
            self.sizes[stage:], (*self.sizes[stage + 1 :], 1), self.kept[stage:], strict=True
        ):
            looks += 2 * chunks * size.bit_length()
            chunks = min(chunks, count // size) * size // smaller
        if looks * heads // groups >= self.length:
            grouped = asked.view(batch, groups, heads // groups, -1)
            parts = [grouped @ key.float().mT for key, _ in self.pieces]
            worth = torch.cat(parts, dim=3).view(batch, heads, -1)
            return lambda slots: worth.gather(2, slots)

        def score(slots: Tensor) -> Tensor:
            keys = self._at(0, slots.reshape(batch, groups, -1))  # [B, G, r·C, d]
            return (keys.float().view(*slots.shape, -1) * asked).sum(3)

        return score

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
        found = None if self.found is None else self.found.each_row(change)
        return replace(self, pieces=tuple(tuple(map(change, piece)) for piece in self.pieces), found=found)

    def like(self, key: Tensor, value: Tensor) -> Hosted:
        """Later entries, on the host too."""
        return Hosted.of(key, value, self.first, self.sizes, self.kept, self.every)

    def join(self, later: Hosted) -> Hosted:
        """Later entries gather in a short stretch, which joins the long one when it is full."""
        pieces = [*self.pieces, *later.pieces]
        while len(pieces) > 2 or (len(pieces) == 2 and pieces[-1][0].shape[2] >= TILE):
            older, newer = pieces[-2:]
            pieces[-2:] = [tuple(torch.cat(pair, dim=2) for pair in zip(older, newer, strict=True))]
        return replace(self, pieces=tuple(pieces))
