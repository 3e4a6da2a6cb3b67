"""Vectors of which only some elements are stored: a bitmap of where they are, and the elements one after another."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from tprune.core.stored import Part
from tprune.core.tiles import Tile

AT_ONCE = 2048
"""Entries of a head that are dense together: fewer cost more in calls than in memory."""
ONES = 0x0101010101010101
"""Times this, every byte of a number becomes the sum of it and those below, as long as it has room for that."""


@cache
def _spread(device: torch.device) -> Tensor:
    """Every byte's bits as the bytes of a number, the lowest first: int64 [256]."""
    byte, place = torch.arange(256, device=device), torch.arange(8, device=device)
    return ((byte.unsqueeze(1) >> place & 1) << 8 * place).sum(1)


def bitmap_bytes(width: int) -> int:
    """Bytes of a bitmap of `width` bits."""
    return -(-width // 8)


@dataclass(frozen=True, eq=False)
class Elements:
    """The elements of largest magnitude of every vector.

    Attributes:
        bitmap: uint8 [..., ceil(d / 8)], the lowest bit first.
        values: [..., m], in the order of their places.
        width: d.
    """

    bitmap: Tensor
    values: Tensor
    width: int

    @classmethod
    def of(cls, x: Tensor, count: int) -> Elements:
        """The `count` elements of largest magnitude of `x` [..., d]; of equals the first."""
        width = x.shape[-1]
        index = x.float().abs().argsort(dim=-1, descending=True, stable=True)[..., :count].sort(dim=-1).values
        bits = torch.zeros_like(x, dtype=torch.uint8).scatter_(-1, index, 1)
        bits = pad(bits, (0, 8 * bitmap_bytes(width) - width)).unflatten(-1, (-1, 8))
        bitmap = (bits << torch.arange(8, dtype=torch.uint8, device=x.device)).sum(-1, dtype=torch.uint8)
        return cls(bitmap, x.gather(-1, index), width)

    @property
    def nbytes(self) -> int:
        """Bitmap and elements."""
        return self.bitmap.nbytes + self.values.nbytes

    def dense(self, part: slice = slice(None)) -> Tensor:
        """[..., t, d] with zeros where nothing is stored, of the vectors `part` of the last but one axis."""
        bitmap, values = self.bitmap[..., part, :], self.values[..., part, :]
        if bitmap.device.type == "cpu":
            # numpy finds set bits three times as fast as torch; a GPU would have to say how many there are.
            bits = np.unpackbits(bitmap.numpy(), axis=-1, count=self.width, bitorder="little")
            places = torch.from_numpy(np.flatnonzero(bits.view(bool)))
            return values.new_zeros(bits.size).scatter_(0, places, values.reshape(-1)).view(bits.shape)
        there = _spread(bitmap.device).take(bitmap.long())
        if values.shape[-1] > 255:
            there = there.view(torch.uint8)[..., : self.width].bool()
            return values.new_zeros(there.shape).masked_scatter_(there, values)
        # Eight bits are worked on as the bytes of one number: which of the stored elements each is, 0 for none.
        upto = there * ONES
        before = (upto >> 56).cumsum(-1) - (upto >> 56)
        which = (upto & there * 255) + there * before
        index = which.view(torch.uint8)[..., : self.width].long()
        return pad(values, (1, 0)).gather(-1, index)

    def change(self, change: Callable[[Tensor], Tensor]) -> Elements:
        """`change` applied to bitmap and elements."""
        return Elements(change(self.bitmap), change(self.values), self.width)

    def join(self, later: Elements) -> Elements:
        """These vectors and `later` ones, along the last axis but one."""
        pairs = ((self.bitmap, later.bitmap), (self.values, later.values))
        return Elements(*(torch.cat(pair, dim=-2) for pair in pairs), self.width)


@dataclass(frozen=True, eq=False)
class Sparse(Part):
    """Entries with some elements of each key and of each value.

    Attributes:
        key, value: of vectors [B, G, t, d].
    """

    key: Elements
    value: Elements
    grows = True

    @classmethod
    def of(cls, key: Tensor, value: Tensor, elements: tuple[int, int]) -> Sparse:
        """So many `elements` of each of `key` and of each of `value` [B, G, t, d]."""
        return cls(*(Elements.of(x, count) for x, count in zip((key, value), elements, strict=True)))

    @property
    def length(self) -> int:
        """t."""
        return self.key.values.shape[2]

    @property
    def nbytes(self) -> int:
        """Keys and values."""
        return self.key.nbytes + self.value.nbytes

    def tiles(self) -> Iterator[Tile]:
        """Dense, a tile at a time."""
        for first in range(0, self.length, AT_ONCE):
            part = slice(first, first + AT_ONCE)
            yield Tile(self.key.dense(part), self.value.dense(part))

    def each_row(self, change: Callable[[Tensor], Tensor]) -> Sparse:
        """Of all tensors."""
        return Sparse(self.key.change(change), self.value.change(change))

    def like(self, key: Tensor, value: Tensor) -> Sparse:
        """As many elements of each."""
        return Sparse.of(key, value, (self.key.values.shape[-1], self.value.values.shape[-1]))

    def join(self, later: Sparse) -> Sparse:
        """Along the entries."""
        return Sparse(self.key.join(later.key), self.value.join(later.value))
