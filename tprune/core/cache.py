"""What a cache method does to one layer's keys and values, as a value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Evict:
    """Keep these entries per key-value head and forget the rest.

    Attributes:
        index: int64 [B, G, K], ascending slots of the cache.
    """

    index: Tensor

    @classmethod
    def nothing(cls, batch: int, groups: int, length: int, device: torch.device | str = "cpu") -> Evict:
        """Keep all `length` entries in their places."""
        return cls(torch.arange(length, device=device).expand(batch, groups, length))

    def apply(self, entries: Tensor) -> Tensor:
        """The surviving rows of keys, values [B, G, T, d] or of one number per entry [B, G, T].

        Of vectors that all heads share, [B, 1, T, d], those that survive in the first.
        """
        batch, groups, length = entries.shape[:3]
        if groups < self.index.shape[1]:
            return Evict(self.index[:, :groups]).apply(entries)
        rows = entries.reshape(batch * groups * length, *entries.shape[3:])
        return rows.index_select(0, self._rows(length)).view(*self.index.shape, *entries.shape[3:])

    def carry(self, entries: Tensor) -> Tensor:
        """What the survivors hold afterwards, of keys or values [B, G, T, d]: here, what they held."""
        return self.apply(entries)

    def _rows(self, length: int) -> Tensor:
        """`flat_rows` of the index, known from the first of several calls."""
        known = self.__dict__.get("_known")
        if known is None or known[0] != length:
            known = length, flat_rows(self.index, length)
            object.__setattr__(self, "_known", known)
        return known[1]


@dataclass(frozen=True, eq=False)
class Merge(Evict):
    """Some of those that leave flow into survivors, whose keys and values become the mean of all they stand for.

    Attributes:
        into: int64 [B, G, T], the place in `index` of the survivor that each entry flows into, its own for a
            survivor; K for those that are forgotten.
    """

    into: Tensor

    @classmethod
    def of(cls, index: Tensor, leaving: Tensor, leader: Tensor, length: int) -> Merge:
        """Of `length` entries those at `index` [B, G, K] stay; each of `leaving` [B, G, M] joins its `leader`."""
        kept = index.shape[-1]
        into = index.new_full((*index.shape[:2], length), kept)
        into.scatter_(2, index, torch.arange(kept, device=index.device).expand_as(index))
        return cls(index, into.scatter(2, leaving, into.gather(2, leader)))

    def carry(self, entries: Tensor) -> Tensor:
        """The means, in float32 and back."""
        kept = self.index.shape[-1]
        shape = (*self.index.shape[:2], kept + 1, entries.shape[3])
        into = self.into.unsqueeze(3).expand_as(entries)
        sums = entries.new_zeros(shape, dtype=torch.float32).scatter_add_(2, into, entries.float())
        return (sums[:, :, :kept] / self.members().unsqueeze(3)).to(entries.dtype)

    def members(self) -> Tensor:
        """How many entries each survivor stands for, itself too: float32 [B, G, K]."""
        kept = self.index.shape[-1]
        counts = torch.zeros(*self.index.shape[:2], kept + 1, device=self.index.device)
        return counts.scatter_add_(2, self.into, torch.ones_like(self.into, dtype=counts.dtype))[..., :kept]


@dataclass(frozen=True, eq=False)
class Replace:
    """One entry per key-value head is forgotten, and the latest takes its slot: nothing else moves.

    A copy of the cache at every generated token is what this spares. Entries are then no longer in temporal order.

    Attributes:
        slot: int64 [B, G], which entry leaves; the last slot where it is the latest itself. Never a filler.
    """

    slot: Tensor

    def apply(self, entries: Tensor) -> Tensor:
        """The surviving ones of a number per entry, [B, G, T] -> [B, G, T - 1], or of shared vectors [B, 1, T, d]."""
        latest = entries[:, :, -1:]
        slot = self.slot[:, : entries.shape[1]].view(*latest.shape[:3], *[1] * (entries.dim() - 3))
        return entries.scatter(2, slot.expand_as(latest), latest)[:, :, :-1]

    def absorb(self, entries: Tensor) -> None:
        """What becomes of the entry that leaves, of keys or values [B, G, T, d], in place: nothing."""

    def write(self, entries: Tensor) -> None:
        """Let the latest of keys or values [B, G, T, d], which are contiguous, take the slot, in place."""
        self.absorb(entries)
        rows = flat_rows(self.slot.unsqueeze(2), entries.shape[2])
        entries.view(-1, entries.shape[3]).index_copy_(
            0, rows, entries[:, :, -1].reshape(-1, entries.shape[3])
        )

    def only(self, real: Tensor, latest: int) -> Replace:
        """The edit where `real` [B, 1]; elsewhere the entry in slot `latest` leaves, and nothing else changes."""
        return Replace(torch.where(real, self.slot, latest))


@dataclass(frozen=True, eq=False)
class Fold(Replace):
    """As `Replace`, but the entry that leaves is not forgotten: another takes it in.

    Attributes:
        into: int64 [B, G], which entry.
        share: float [B, G], what the leaving one weighs in their weighted mean.
    """

    into: Tensor
    share: Tensor

    def absorb(self, entries: Tensor) -> None:
        """The mean takes the place of the entry that takes in, of keys or values [B, G, T, d], in place."""
        length, width = entries.shape[2:]
        flat = entries.view(-1, width)
        into = flat_rows(self.into.unsqueeze(2), length)
        leaving, share = flat[flat_rows(self.slot.unsqueeze(2), length)], self.share.reshape(-1, 1)
        mean = torch.lerp(flat[into].float(), leaving.float(), share)
        flat.index_copy_(0, into, mean.to(entries.dtype))

    def only(self, real: Tensor, latest: int) -> Fold:
        """The edit where `real` [B, 1]; elsewhere the entry in slot `latest` leaves, and nothing else changes."""
        return Fold(torch.where(real, self.slot, latest), self.into, self.share * real)


def flat_rows(index: Tensor, length: int) -> Tensor:
    """Slots [B, G, K] of heads with `length` entries as an index into all heads' entries at once: int64 [B·G·K].

    Whole rows are copied by it faster than gathered head by head.
    """
    batch, groups, kept = index.shape
    first = torch.arange(0, batch * groups * length, length, device=index.device)
    return (index.reshape(-1, kept) + first.unsqueeze(1)).flatten()


def fill_left(x: Tensor, width: int, dim: int = -1) -> Tensor:
    """`x` with zeros before it along `dim`, up to `width`."""
    missing = width - x.shape[dim]
    if missing == 0:
        return x
    shape = list(x.shape)
    shape[dim] = missing
    return torch.cat([x.new_zeros(shape), x], dim=dim)


def stack_rows(parts: Sequence[Tensor], dim: int = -1) -> Tensor:
    """Rows [1, ...] of different lengths along `dim` as one batch, the shorter ones filled on the left."""
    widest = max(part.shape[dim] for part in parts)
    return torch.cat([fill_left(part, widest, dim) for part in parts])


def follows_entries(value: int | Tensor) -> bool:
    """Whether a state leaves with the entries: a number for each, [B, G, T], or vectors of all heads, [B, 1, T, d]."""
    return isinstance(value, Tensor) and value.dim() >= 3


def with_latest(value: int | Tensor, count: int = 1) -> int | Tensor:
    """A state with zeros for `count` entries that came, where it follows entries."""
    if not follows_entries(value):
        return value
    return torch.nn.functional.pad(value, (0, 0) * (value.dim() - 3) + (0, count))


def merge_rows(values: list[int | Tensor]) -> int | Tensor:
    """State of single rows as one: [1, G, K_b, ...] filled on the left and stacked; an int where all rows agree."""
    if follows_entries(values[0]):
        return stack_rows(values, dim=2)
    return values[0] if len(set(values)) == 1 else torch.tensor(values)
