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
        valid: bool [B, K], False where a row keeps fewer than K entries and the slot is a filler, or None.
    """

    index: Tensor
    valid: Tensor | None = None

    @classmethod
    def nothing(cls, batch: int, groups: int, length: int, device: torch.device | str = "cpu") -> Evict:
        """Keep all `length` entries in their places."""
        return cls(torch.arange(length, device=device).expand(batch, groups, length))

    @classmethod
    def rows(cls, parts: Sequence[Tensor]) -> Evict:
        """One edit of a batch from the indices [G, K_b] of its rows; shorter rows get fillers on the left."""
        widest = max(part.shape[-1] for part in parts)
        index = torch.stack([fill_left(part, widest) for part in parts])
        if all(part.shape[-1] == widest for part in parts):
            return cls(index)
        kept = torch.tensor([part.shape[-1] for part in parts], device=index.device)
        return cls(index, torch.arange(widest, device=index.device) >= widest - kept[:, None])

    def apply(self, entries: Tensor) -> Tensor:
        """The surviving rows of keys, values [B, G, T, d] or of one number per entry [B, G, T]."""
        batch, groups, length = entries.shape[:3]
        rows = entries.reshape(batch * groups * length, *entries.shape[3:])
        return rows.index_select(0, self._rows(length)).view(*self.index.shape, *entries.shape[3:])

    def _rows(self, length: int) -> Tensor:
        """`flat_rows` of the index, known from the first of several calls."""
        known = self.__dict__.get("_known")
        if known is None or known[0] != length:
            known = length, flat_rows(self.index, length)
            object.__setattr__(self, "_known", known)
        return known[1]


@dataclass(frozen=True, eq=False)
class Replace:
    """One entry per key-value head is forgotten, and the latest takes its slot: nothing else moves.

    A copy of the cache at every generated token is what this spares. Entries are then no longer in temporal order.

    Attributes:
        slot: int64 [B, G], which entry leaves; the last slot where it is the latest itself. Never a filler.
    """

    slot: Tensor

    def apply(self, entries: Tensor) -> Tensor:
        """The surviving ones of a number per entry: [B, G, T] -> [B, G, T - 1]."""
        return entries.scatter(2, self.slot.unsqueeze(2), entries[..., -1:])[..., :-1]

    def write(self, entries: Tensor) -> None:
        """Let the latest of keys or values [B, G, T, d], which are contiguous, take the slot, in place."""
        rows = flat_rows(self.slot.unsqueeze(2), entries.shape[2])
        entries.view(-1, entries.shape[3]).index_copy_(
            0, rows, entries[:, :, -1].reshape(-1, entries.shape[3])
        )


def flat_rows(index: Tensor, length: int) -> Tensor:
    """Slots [B, G, K] of heads with `length` entries as an index into all heads' entries at once: int64 [B·G·K].

    Whole rows are copied by it faster than gathered head by head.
    """
    batch, groups, kept = index.shape
    first = torch.arange(0, batch * groups * length, length, device=index.device)
    return (index.reshape(-1, kept) + first.unsqueeze(1)).flatten()


def fill_left(x: Tensor, width: int) -> Tensor:
    """`x` [..., K] with zeros before it: [..., width]."""
    return x if x.shape[-1] == width else torch.nn.functional.pad(x, (width - x.shape[-1], 0))


def per_entry(value: int | Tensor) -> bool:
    """Whether a state holds a number per entry, [B, G, T]."""
    return isinstance(value, Tensor) and value.dim() == 3


def merge_rows(values: list[int | Tensor]) -> int | Tensor:
    """State of single rows as one: [1, G, K_b] filled on the left and stacked; an int where all rows agree."""
    if per_entry(values[0]):
        widest = max(value.shape[-1] for value in values)
        return torch.cat([fill_left(value, widest) for value in values])
    return values[0] if len(set(values)) == 1 else torch.tensor(values)
