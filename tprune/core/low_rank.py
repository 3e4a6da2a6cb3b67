"""Keys and values held as what low-rank maps make of a layer's inputs.

Keys are made again when they are attended to, since they are rotated; values never are: what attention weighs them by
sums their codes, and only the sum is mapped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import linear

from tprune.core.stored import Part
from tprune.core.tiles import Seen, Tile, own_heads


@dataclass(frozen=True, eq=False)
class LowRankMap:
    """x -> up · down · x in place of W · x.

    Attributes:
        down: [R, D].
        up: [C, R].
    """

    down: Tensor
    up: Tensor

    @classmethod
    def of(cls, weight: Tensor, scale: Tensor | None = None) -> LowRankMap:
        """All of `weight` [C, D], by falling singular values: its first R codes are the best of that number.

        With `scale` [D] > 0 the inputs count as if they were so large (ASVD): W diag(a) = U S Vᵀ, down =
        √S Vᵀ diag(1/a), up = U √S. Float32; min(C, D) codes.
        """
        scale = weight.new_ones(weight.shape[1]) if scale is None else scale
        left, size, right = torch.linalg.svd(weight.float() * scale.float(), full_matrices=False)
        root = size.sqrt()
        return cls(root.unsqueeze(1) * right / scale, left * root)

    @classmethod
    def best(cls, weight: Tensor, rank: int) -> LowRankMap:
        """The first `rank` codes of `weight`, which hold no others in memory."""
        found = cls.of(weight).first(rank)
        return cls(found.down.clone(), found.up.clone())

    @property
    def rank(self) -> int:
        """R."""
        return len(self.down)

    def first(self, rank: int) -> LowRankMap:
        """Only so many codes."""
        return LowRankMap(self.down[:rank], self.up[:, :rank])

    def to(self, like: Tensor) -> LowRankMap:
        """On the device and in the type of `like`."""
        return LowRankMap(self.down.to(like), self.up.to(like))

    def encode(self, inputs: Tensor) -> Tensor:
        """[..., D] -> [..., R]."""
        return linear(inputs, self.down)

    def decode(self, codes: Tensor) -> Tensor:
        """[..., R] -> [..., C]."""
        return linear(codes, self.up)


def gap(one: LowRankMap, other: LowRankMap, rank: int) -> Tensor:
    """What no difference of `rank` can bridge between two maps of low rank: the Frobenius norm of the rest."""
    up = torch.linalg.qr(torch.cat([one.up, -other.up], 1)).R
    down = torch.linalg.qr(torch.cat([one.down, other.down]).t()).R
    return torch.linalg.svdvals(up @ down.t())[rank:].norm()


AT_ONCE = 512
"""Entries whose keys are made together: so many stay in a core's cache while they are rotated."""


@dataclass(frozen=True, eq=False)
class KeyValueMaps:
    """How one layer's entries are held: a value that caches share, whatever becomes of them.

    Attributes:
        key, value: to codes and back.
        finish_keys: projected keys [B, t, C] at positions int64 [B, t] as they are attended to, [B, G, t, d].
        finish_values: projected values [B, t, E] as they are attended to, [B, G, t, e]; at most a bias is added.
    """

    key: LowRankMap
    value: LowRankMap
    finish_keys: Callable[[Tensor, Tensor], Tensor]
    finish_values: Callable[[Tensor], Tensor]

    def __deepcopy__(self, memo: dict) -> KeyValueMaps:
        return self

    def encode(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Codes of a layer's inputs [B, t, D], for keys and for values: [B, 1, t, R] each, of all heads together."""
        return self.key.encode(inputs).unsqueeze(1), self.value.encode(inputs).unsqueeze(1)


@dataclass(frozen=True, eq=False)
class LowRank(Part):
    """Entries as codes.

    Attributes:
        key, value: [B, 1, t, R] each, ranks of their own.
        maps: what makes entries of them.
        begin: int64 [B], the position of the first entry; the others follow one by one.
    """

    key: Tensor
    value: Tensor
    maps: KeyValueMaps
    begin: Tensor
    grows: ClassVar[bool] = True

    @property
    def length(self) -> int:
        """t."""
        return self.key.shape[2]

    @property
    def nbytes(self) -> int:
        """The codes."""
        return self.key.nbytes + self.value.nbytes

    def tiles(self) -> Iterator[Tile]:
        """Dense, a tile at a time."""
        for keys, values in self._split():
            yield Tile(keys, self.maps.finish_values(self.maps.value.decode(values)))

    def seen_by(self, query: Tensor) -> Iterator[Seen]:
        """The same, the values as codes."""
        for keys, values in self._split():
            yield Coded(keys, values, self.maps)

    def _split(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Keys [B, G, t, d] and values' codes [B, t, R], some at a time."""
        for first in range(0, self.length, AT_ONCE):
            key, value = (x[:, 0, first : first + AT_ONCE] for x in (self.key, self.value))
            place = torch.arange(first, first + key.shape[1], device=key.device)
            keys = self.maps.finish_keys(self.maps.key.decode(key), self.begin.unsqueeze(1) + place)
            yield keys, value

    def each_row(self, change: Callable[[Tensor], Tensor]) -> LowRank:
        """Of all tensors with a row per sample."""
        return replace(self, key=change(self.key), value=change(self.value), begin=change(self.begin))

    def codes(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Of entries to come."""
        return self.maps.encode(inputs)

    def like(self, key: Tensor, value: Tensor) -> LowRank:
        """The entries behind these, by their codes; those of a smaller rank are the first."""
        codes = {"key": key[..., : self.key.shape[-1]], "value": value[..., : self.value.shape[-1]]}
        return replace(self, begin=self.begin + self.length, **codes)

    def join(self, later: LowRank) -> LowRank:
        """Along the entries."""
        pairs = ((self.key, later.key), (self.value, later.value))
        key, value = (torch.cat(pair, dim=2) for pair in pairs)
        return replace(self, key=key, value=value)


@dataclass(frozen=True, eq=False)
class Coded:
    """Some entries whose values are read as codes.

    Attributes:
        key: [B, G, t, d].
        value: codes [B, t, R].
        maps: what makes values of these.
    """

    key: Tensor
    value: Tensor
    maps: KeyValueMaps

    @property
    def entries(self) -> int:
        """t."""
        return self.key.shape[2]

    def logits(self, asked: Tensor, softcap: float | None) -> Tensor:
        """As `Seen`."""
        return Tile(self.key, self.key).logits(asked, softcap)

    def read(self, weight: Tensor) -> Tensor:
        """As `Seen`: codes are summed, as means, so that a bias is added once; then the sum is mapped."""
        batch, heads, rows, length = weight.shape
        total = weight.sum(3, keepdim=True)
        codes = weight.view(batch, heads * rows, length) @ self.value.float()
        mean = codes / total.view(batch, -1, 1).clamp_min(torch.finfo(codes.dtype).tiny)
        made = self.maps.finish_values(linear(mean, self.maps.value.up.float()))  # [B, G, H·q, e]
        return own_heads(made, heads) * total
