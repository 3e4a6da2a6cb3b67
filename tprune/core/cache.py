"""What a cache method does to one layer's keys and values, as a value."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Evict:
    """Keep these entries per key-value head and forget the rest.

    Attributes:
        index: int64 [B, G, K], ascending places in the cache.
        valid: bool [B, G, K], False where a row keeps fewer than K entries (padding), or None.
    """

    index: Tensor
    valid: Tensor | None = None

    def apply(self, entries: Tensor) -> Tensor:
        """The surviving rows of keys, values [B, G, T, d] or positions [B, G, T]."""
        if entries.dim() == 3:
            return entries.gather(2, self.index)
        return entries.gather(2, self.index.unsqueeze(-1).expand(*self.index.shape, entries.shape[-1]))


CacheEdit = Evict
