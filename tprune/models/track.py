"""Which tokens of a sequence are left, and what that means for masks, positions and rotary embeddings.

A *slot* is a token's place in the sequence as the caller counts it, padding included.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tprune.core.select import mark
from tprune.errors import UserError


@dataclass(eq=False)
class Kept:
    """The tokens that a stretch of layers sees, and has in its cache.

    Attributes:
        index: int64 [B, T], their slots, ascending unless tokens were merged and put elsewhere.
        valid: bool [B, T], False where a row keeps fewer and the place is a filler, or where a token is hidden but
            not removed; None for neither.
        gone: int64 [B], how many slots of the prompt are missing.
        closed: int64 [B, 1], how far all that follows the prompt moves to the front; None: not at all.
        order: int64 [B, T], the same slots ascending, where `index` is not: what sees what follows the sequence.
    """

    index: Tensor
    valid: Tensor | None
    gone: Tensor
    order: Tensor | None = None
    closed: Tensor | None = None

    @classmethod
    def of(cls, index: Tensor, valid: Tensor | None, length: int, ascending: bool = True) -> Kept:
        """What is left of `length` slots."""
        batch, count = index.shape
        left = index.new_full((batch,), count) if valid is None else valid.sum(1)
        return cls(index, valid, length - left, None if ascending else index.sort(dim=1).values)

    @classmethod
    def hiding(cls, slots: Tensor, index: Tensor, left: Tensor | None, length: int) -> Kept:
        """All of `slots` [B, T] in their places; what `index` [B, K] (`left` [B, K]: its real ones) lacks is hidden."""
        seen = mark(index, left, slots.shape[1])
        return cls.of(slots, None if bool(seen.all()) else seen, length)

    @property
    def columns(self) -> Tensor:
        """The slots by which masks are made, int64 [B, T], ascending."""
        return self.index if self.order is None else self.order

    def shift(self) -> Tensor:
        """How many slots are missing before each token, int64 [B, T]: what `compact` positions subtract."""
        if self.valid is None:
            return self.index - torch.arange(self.index.shape[1], device=self.index.device)
        return (self.index - (self.valid.cumsum(1) - 1)) * self.valid

    def extend(self, start: int, count: int) -> None:
        """`count` tokens arrived at the slots from `start` on; all of them are kept."""
        batch = self.index.shape[0]
        new = torch.arange(start, start + count, device=self.index.device).expand(batch, count)
        self.index = torch.cat([self.index, new], dim=1)
        if self.order is not None:
            self.order = torch.cat([self.order, new], dim=1)
        if self.valid is not None:
            self.valid = torch.cat([self.valid, self.valid.new_ones(batch, count)], dim=1)


@dataclass(eq=False)
class Track:
    """What became of the tokens of one cache.

    Attributes:
        length: how many tokens were seen, as the caller counts.
        real: int64 [B], how many of them were no padding.
        entry: the tokens that entered the decoder, as slots of the caller's sequence; None for all.
        layers: per decoder layer where tokens left, what is left from there on, as slots of the entering sequence.
        prunable: bool [B, N], which of the prompt's tokens were prunable.
        images: how many of them a row had at most.
        heads: per decoder layer, which attention heads are left, bool [B, H]; for methods by which they leave.
        passes: of layers that rows pass by, which rows, bool [B], and whether the layer does not run at all.
    """

    length: int
    real: Tensor
    entry: Kept | None = None
    prunable: Tensor | None = None
    images: int = 0
    layers: dict[int, Kept] = field(default_factory=dict)
    heads: dict[int, Tensor] = field(default_factory=dict)
    passes: dict[int, tuple[Tensor, bool]] = field(default_factory=dict)

    @property
    def entered(self) -> int:
        """How many tokens (and fillers) the first layer has seen."""
        return self.length if self.entry is None else self.entry.index.shape[1]

    @property
    def held(self) -> int:
        """How many entries the first layer's cache holds, fillers included: what a model counts positions from."""
        return self.layers[0].index.shape[1] if 0 in self.layers else self.entered

    def check(self, start: int, count: int, inputs: dict[str, Any]) -> None:
        """Refuse a call whose `count` tokens cannot be what follows on this cache.

        Args:
            start: how many entries the first layer's cache holds.
            count: how many tokens the call brings.
            inputs: of the call; the padding mask covers everything from the first token on.

        Raises:
            UserError: the cache was edited, or tokens come that it has seen (`generate`, given a whole conversation,
                cuts it by the length of the cache).
        """
        if self.held != start:
            raise UserError("a cache with pruned tokens was cropped or edited; run the prompt again")
        mask, ids, total = inputs.get("attention_mask"), inputs.get("position_ids"), self.length + count
        fits = not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[1] == total
        if fits and count > 1 and isinstance(ids, Tensor) and ids.dim() == 2:
            fits = bool(ids[:, 0].min() >= self.real.min())
        if not fits:
            raise UserError(
                f"these {count} tokens do not follow the {self.length} that this pruned cache has seen: pass only the "
                f"new ones, with an attention_mask of all {total}"
            )

    def extend(self, count: int) -> None:
        """`count` tokens arrived; from now on none leaves."""
        entered = self.entered
        for kept in self.layers.values():
            kept.extend(entered, count)
        if self.entry is not None:
            self.entry.extend(self.length, count)
        self.length += count
        self.real = self.real + count

    def join(self, cache: Any, uniform: bool) -> None:
        """Travel with `cache` from now on; if `uniform`, every layer there holds what is left at the end alone.

        Raises:
            UserError: a layer holds a window of the prompt alone.
        """
        cache.tprune_track = self
        if not uniform or not self.layers:
            return
        first, last = min(self.layers), self.at(len(cache.layers))
        for layer in cache.layers[:first]:
            if layer.keys.shape[2] != self.entered:
                raise UserError("the prompt is longer than the window of a layer's cache: --set caches=later")
            index = last.index[:, None, :, None].expand(-1, layer.keys.shape[1], -1, layer.keys.shape[3])
            layer.keys = layer.keys.gather(2, index)
            layer.values = layer.values.gather(2, index[..., :1].expand(-1, -1, -1, layer.values.shape[3]))
            if getattr(layer, "is_sliding", False):
                layer.cumulative_length = index.shape[2]
        self.layers = {0: last}

    def at(self, layer: int) -> Kept | None:
        """What decoder layer `layer` sees of the entering sequence; None for all of it."""
        before = [place for place in self.layers if place <= layer]
        return self.layers[max(before)] if before else None

    def valid(self, layer: int, slots: Tensor) -> Tensor | None:
        """Which of the tokens [B, T] of the entering sequence before a layer are no fillers; None where all are."""
        before, entry = self.at(layer), self.entry
        valid = None if before is None else before.valid
        if entry is not None and entry.valid is not None:
            there = entry.valid.gather(1, slots)
            valid = there if valid is None else valid & there
        return valid

    def final(self) -> tuple[Tensor, Tensor | None] | None:
        """What is left of a prompt at the end: slots [B, K] of the caller's sequence, valid [B, K] or None.

        None where no token left anywhere.
        """
        last, entry = self.at(1 << 30), self.entry
        if last is None or entry is None:
            only = last or entry
            return None if only is None else (only.index, only.valid)
        index = entry.index.gather(1, last.index)
        valid = None if entry.valid is None else entry.valid.gather(1, last.index)
        if last.valid is not None:
            valid = last.valid if valid is None else valid & last.valid
        return index, valid


def check_cache(cache: Any) -> None:
    """Refuse caches whose layers cannot have lengths of their own."""
    kinds = {type(layer).__name__ for layer in getattr(cache, "layers", [])}
    fixed = sorted(kind for kind in kinds if kind.startswith("Static"))
    if fixed:
        raise UserError(
            "tokens cannot leave a static cache: run with a dynamic one (cache_implementation=None)"
        )


def gather_last(x: Tensor, index: Tensor) -> Tensor:
    """Position ids `x` [..., B or 1, N] at `index` [B, K] -> [..., B, K]."""
    shape = (*x.shape[:-2], *index.shape)
    return x.expand(*shape[:-1], x.shape[-1]).gather(-1, index.expand(shape))


def gather_rope(x: Tensor, index: Tensor) -> Tensor:
    """Cosines or sines `x` [..., B or 1, N, d] at `index` [B, K] -> [..., B, K, d]."""
    shape = (*x.shape[:-3], *index.shape, x.shape[-1])
    return x.expand(*shape[:-2], *x.shape[-2:]).gather(-2, index.unsqueeze(-1).expand(shape))


def gather_padding(mask: Tensor, kept: Kept) -> Tensor:
    """A padding mask [B, T] (nonzero: real) of the tokens that are left, fillers hidden."""
    left = mask.gather(1, kept.columns)
    return left if kept.valid is None else left * kept.valid.to(left.dtype)


def visible(rows: Tensor, kept: Kept, window: int | None = None) -> Tensor:
    """Which kept tokens the queries at the slots `rows` [B, q] see: bool [B, 1, q, T].

    Causal, within `window` slots where there is one. No row is empty: a filler sees itself where it sees nothing else.
    """
    columns = kept.columns[:, None]
    seen = columns <= rows.unsqueeze(-1)
    if window is not None:
        seen = seen & (columns > rows.unsqueeze(-1) - window)
    return _hide_fillers(seen.unsqueeze(1), kept, rows.shape[1])


def gather_mask(mask: Tensor, rows: Tensor, kept: Kept, total: int) -> Tensor:
    """An attention mask [B or 1, H or 1, n, m] at some queries and the kept keys.

    Args:
        mask: bool (True: visible) or additive; its last column is slot `total` - 1.
        rows: int64 [B, q], which of its rows.
        kept: the keys that are left.
        total: how many slots there are; a mask of a sliding window may be narrower.
    """
    batch, queries, keys = rows.shape[0], rows.shape[1], kept.index.shape[1]
    mask = mask.expand(batch, *mask.shape[1:])
    if mask.shape[-1] == keys != total:
        # Made for a cache that lost tokens already; padding is in front of them.
        return _hide_fillers(mask, kept, queries)
    heads = mask.shape[1]
    columns = kept.columns - (total - mask.shape[-1])
    mask = mask.gather(2, rows[:, None, :, None].expand(batch, heads, queries, mask.shape[-1]))
    mask = mask.gather(3, columns.clamp_min(0)[:, None, None].expand(batch, heads, queries, keys))
    outside = (columns < 0)[:, None, None]
    mask = (
        mask & ~outside if mask.dtype == torch.bool else mask.masked_fill(outside, hidden_value(mask.dtype))
    )
    return _hide_fillers(mask, kept, queries)


def _hide_fillers(mask: Tensor, kept: Kept, queries: int) -> Tensor:
    """`mask` [B, H, q, T] with the columns of fillers hidden; a filler that then sees nothing sees itself."""
    if kept.valid is None:
        return mask
    filler = ~kept.valid[:, None, None]
    own = torch.eye(kept.valid.shape[1], dtype=torch.bool, device=mask.device)[-queries:] & filler
    if mask.dtype == torch.bool:
        mask = mask & ~filler
        return mask | (own & ~mask.any(-1, keepdim=True))
    mask = mask.masked_fill(filler, hidden_value(mask.dtype))
    return mask.masked_fill(own & (mask <= hidden_value(mask.dtype)).all(-1, keepdim=True), 0)


def hidden_value(dtype: torch.dtype) -> float:
    """What hides a key in an additive mask, as transformers has it."""
    return torch.finfo(dtype).min


def gather_any_mask(mask: Any, rows: Tensor, kept: Kept, total: int) -> Any:
    """The decoder's mask, whatever its form, for the tokens that are left."""
    if isinstance(mask, dict):
        return {name: gather_any_mask(part, rows, kept, total) for name, part in mask.items()}
    if mask is None:
        return None if kept.valid is None else kept.valid.long()
    return gather_padding(mask, kept) if mask.dim() == 2 else gather_mask(mask, rows, kept, total)


def restored(hidden: Tensor, kept: Kept, full: Tensor) -> Tensor:
    """`full` [B, length, D] with `hidden` [B, K, D] in the places of what is `kept`."""
    there = mark(kept.index, kept.valid, full.shape[1]).unsqueeze(2)
    return torch.where(there, restore(hidden, kept.index, kept.valid, full.shape[1]), full)


def restore(hidden: Tensor, index: Tensor, valid: Tensor | None, length: int) -> Tensor:
    """`hidden` [B, K, D] at its slots `index` [B, K] of `length`, zeros elsewhere -> [B, length, D]."""
    full = hidden.new_zeros(hidden.shape[0], length + 1, hidden.shape[2])
    if valid is not None:
        index = torch.where(valid, index, length)
    return full.scatter(1, index.unsqueeze(-1).expand_as(hidden), hidden)[:, :length]
