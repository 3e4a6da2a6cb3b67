"""Attention over entries that come a tile at a time, each in a form of its own, and are never there all at once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from tprune.core.attending import capped


class Seen(Protocol):
    """Some entries as queries see them."""

    @property
    def entries(self) -> int:
        """t, how many of a head."""

    def logits(self, asked: Tensor, softcap: float | None) -> Tensor:
        """`asked` [B, H, q, d] times each key, within `softcap`, -inf where one is hidden: float32 [B, H, q, t]."""

    def read(self, weight: Tensor) -> Tensor:
        """Values, summed by `weight` [B, H, q, t]: float32 [B, H, q, e]."""


class Tile(NamedTuple):
    """Entries that are dense.

    Attributes:
        key: [B, G, t, d].
        value: [B, G, t, e].
        visible: bool, broadcastable to [B, G, q, t]; None for all.
    """

    key: Tensor
    value: Tensor
    visible: Tensor | None = None

    @property
    def entries(self) -> int:
        """t."""
        return self.key.shape[2]

    def logits(self, asked: Tensor, softcap: float | None) -> Tensor:
        """As `Seen`."""
        batch, heads, rows, width = asked.shape
        groups = self.key.shape[1]
        # The heads of a group, one below the other.
        logits = asked.reshape(batch, groups, -1, width) @ self.key.float().transpose(2, 3)  # [B, G, r·q, t]
        logits = capped(logits, softcap)
        if self.visible is not None:
            hidden = ~self.visible.expand(batch, groups, rows, -1).repeat(1, 1, heads // groups, 1)
            logits = logits.masked_fill_(hidden, -torch.inf)
        return logits.view(batch, heads, rows, -1)

    def read(self, weight: Tensor) -> Tensor:
        """As `Seen`."""
        batch, groups, length, _ = self.value.shape
        return (weight.reshape(batch, groups, -1, length) @ self.value.float()).view(*weight.shape[:3], -1)


def own_heads(x: Tensor, heads: int) -> Tensor:
    """Of what was made of all groups' channels for every query, [B, G, H·q, e], its own group's: [B, H, q, e]."""
    batch, groups, rows, width = x.shape
    own = x.view(batch, groups, groups, rows // groups, width).diagonal(dim1=1, dim2=2)  # [B, r·q, e, G]
    return own.permute(0, 3, 1, 2).reshape(batch, heads, -1, width)


@dataclass(frozen=True, eq=False)
class Beside:
    """What every row sees, as one; shorter rows see nothing at their end.

    Attributes:
        rows: of one row each; None where there is nothing.
    """

    rows: Sequence[Seen | None]

    @property
    def entries(self) -> int:
        """That of the row with the most."""
        return max(row.entries for row in self.rows if row is not None)

    def logits(self, asked: Tensor, softcap: float | None) -> Tensor:
        """As `Seen`."""
        found = asked.new_full((*asked.shape[:3], self.entries), -torch.inf)
        for place, row in enumerate(self.rows):
            if row is not None:
                found[place, ..., : row.entries] = row.logits(asked[place : place + 1], softcap)[0]
        return found

    def read(self, weight: Tensor) -> Tensor:
        """As `Seen`."""
        made = [
            None if row is None else row.read(weight[place : place + 1, ..., : row.entries])
            for place, row in enumerate(self.rows)
        ]
        nothing = torch.zeros_like(next(one for one in made if one is not None))
        return torch.cat([nothing if one is None else one for one in made])


def attend_tiles(query: Tensor, tiles: Iterable[Seen], scale: float, softcap: float | None = None) -> Tensor:
    """softmax(scale · q kᵀ) v over all tiles together, exactly, one after the other: [B, H, q, e] like `query`.

    A running maximum and sum (online softmax) stand for the rows that are not there at once.

    Args:
        query: [B, H, q, d].
        tiles: at least one.
        scale: what the logits are multiplied with.
        softcap: bounds the logits (Gemma 2).
    """
    asked = query.float() * scale
    most = total = output = None
    for tile in tiles:
        logits = tile.logits(asked, softcap)
        top = logits.amax(3, keepdim=True)
        # A query that sees nothing yet has no -inf as its largest: the difference would be NaN.
        top = top.clamp_min(torch.finfo(torch.float32).min) if most is None else torch.maximum(most, top)
        weight = (logits - top).exp_()
        sums, read = weight.sum(3, keepdim=True), tile.read(weight)
        if most is None:
            total, output = sums, read
        else:
            shrunk = (most - top).exp()
            total, output = torch.addcmul(sums, total, shrunk), torch.addcmul(read, output, shrunk)
        most = top
    return (output / total.clamp_min(torch.finfo(torch.float32).tiny)).to(query.dtype)
