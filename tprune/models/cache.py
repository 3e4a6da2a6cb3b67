"""A layer of transformers' DynamicCache whose entries may leave.

It tells the two lengths apart that a plain layer takes for one: how many tokens it has seen, which says where the
next token stands, and how many entries it holds, which says how wide a mask is.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from tprune.core.cache import Evict, fill_left
from tprune.errors import UserError


class Owner:
    """Stands for one compression of one model; copies of a cache keep the same one."""

    def __init__(self):
        self.active = True

    def __deepcopy__(self, memo: dict) -> Owner:
        return self


class PrunedLayer(DynamicLayer):
    """Keys and values of one layer, per row and key-value head the entries that are left, in temporal order.

    Attributes:
        keys, values: [B, G, T, d], as they were cached.
        seen: how many tokens came by, in all; padding counts.
        valid: bool [B, T], False for padding and fillers, or None where all entries are real.
        state: what a method carries, see `LayerView.state`.
        limit: how many entries stay while decoding; None for no limit.
        started: whether the prompt has been pruned.
        evicted: whether any entry has left.
        shift: int64 [B, G, m], by how many positions the first m keys are turned before use, or None.
        owner: whose rules it follows; once entries have left, the cache cannot be used without it.
    """

    def __init__(self, owner: Owner):
        super().__init__()
        self.owner = owner
        self._clear()

    def _clear(self) -> None:
        self.seen = 0
        self.valid: Tensor | None = None
        self.arriving: Tensor | None = None
        self.state: dict[str, int | Tensor] = {}
        self.limit: int | None = None
        self.started = self.evicted = False
        self.shift: Tensor | None = None
        self._places: Tensor | None = None
        self._last: Tensor | None = None

    @classmethod
    def adopt(cls, layer: DynamicLayer, owner: Owner) -> PrunedLayer:
        """A layer with the entries of `layer`, nothing pruned yet."""
        new = cls(owner)
        if layer.is_initialized:
            new.lazy_initialization(layer.keys, layer.values)
            new.keys, new.values, new.seen = layer.keys, layer.values, layer.get_seq_length()
        return new

    @property
    def length(self) -> int:
        """T, how many entries it holds."""
        return self.keys.shape[-2] if self.is_initialized and self.keys.numel() else 0

    @property
    def places(self) -> Tensor:
        """int64 [B, G, T], the place of every entry in its sequence, counted without padding.

        Only what an eviction left behind is stored; entries that came later are consecutive.
        """
        batch, groups, length = self.keys.shape[:3]
        known = self._places
        if known is None:
            real = self.valid
            if real is None:
                return torch.arange(length, device=self.keys.device).expand(batch, groups, length)
            return (real.cumsum(1) - 1).clamp_min(0).unsqueeze(1).expand(batch, groups, length)
        later = length - known.shape[-1]
        if later == 0:
            return known
        if self.valid is None:
            steps = torch.arange(1, later + 1, device=known.device).expand(batch, 1, later)
        else:
            steps = self.valid[:, None, -later:].cumsum(-1)
        self._places = torch.cat([known, self._last.unsqueeze(-1) + steps], dim=-1)
        self._last = self._places[..., -1]
        return self._places

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Append; `arriving` bool [B, q], set before, says which of the new tokens are real (None: all)."""
        if self.evicted and not self.owner.active:
            raise UserError("this cache was pruned by tprune; use it inside the with block that pruned it")
        self.seen += key_states.shape[-2]
        self.append(key_states, value_states, self.arriving)
        return self.keys, self.values

    def append(self, keys: Tensor, values: Tensor, real: Tensor | None) -> None:
        """New entries at the end: [B, G, q, d]; a number per entry starts at zero."""
        held, new = self.length, keys.shape[-2]
        super().update(keys, values)
        if self.valid is not None or real is not None:
            batch = keys.shape[0]
            old = self.valid if self.valid is not None else keys.new_ones(batch, held, dtype=torch.bool)
            real = real if real is not None else keys.new_ones(batch, new, dtype=torch.bool)
            self.valid = torch.cat([old, real], dim=1)
        self._each_number(lambda value: torch.nn.functional.pad(value, (0, new)))

    def take_back(self, count: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Undo the last `append`, of `count` entries, and give them back."""
        held = self.length - count
        keys, values = self.keys[:, :, held:], self.values[:, :, held:]
        real = None if self.valid is None else self.valid[:, held:]
        self._narrow(held)
        return keys, values, real

    def _narrow(self, held: int) -> None:
        if self._places is not None and self._places.shape[-1] > held:
            self._places = self._places[..., :held]
            self._last = self._places[..., -1]
        self.keys, self.values = self.keys[:, :, :held], self.values[:, :, :held]
        self.valid = None if self.valid is None else self.valid[:, :held]
        self._each_number(lambda value: value[..., :held])

    def evict(self, edit: Evict) -> None:
        """Apply an edit: keys, values, places, validity and the numbers per entry follow it."""
        places = self.places
        self._last = places[..., -1]
        self._places = edit.apply(places)
        if self.valid is not None or edit.valid is not None:
            kept = edit.index[:, 0]
            valid = (
                torch.ones_like(kept, dtype=torch.bool) if self.valid is None else self.valid.gather(1, kept)
            )
            self.valid = valid if edit.valid is None else valid & edit.valid
        self.evicted |= edit.index.shape[-1] < self.length
        self.keys, self.values = edit.apply(self.keys), edit.apply(self.values)
        self._each_number(edit.apply)

    def shift_to_compact(self) -> None:
        """Work out by how far each key is turned so that entries stand one behind the other, up to the last."""
        length = self.length
        behind = torch.arange(length - 1, -1, -1, device=self.keys.device)
        places = self.places
        shift = (self._last.unsqueeze(-1) - behind - places).clamp_min(0)
        self.shift = shift[..., : int((shift > 0).sum(-1).max())]

    def _each_number(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply `change` to what the method carries per entry."""
        self.state = {name: change(v) if per_entry(v) else v for name, v in self.state.items()}

    def fillers(self) -> int | Tensor:
        """How many entries at the start of each row are not real, int64 [B]; 0 where all are."""
        if self.valid is None:
            return 0
        return self.valid.int().argmax(dim=1)

    def visible(self, queries: int) -> Tensor | None:
        """What the last `queries` entries may see: bool [B or 1, 1, queries, T]; None if a single one sees all."""
        if queries == 1:
            return None if self.valid is None else self.valid[:, None, None]
        place = torch.arange(self.length, device=self.keys.device)
        causal = (place <= place[-queries:, None])[None, None]
        if self.valid is None:
            return causal.expand(self.keys.shape[0], -1, -1, -1)
        return causal & self.valid[:, None, None]

    def get_seq_length(self) -> int:
        """Tokens seen: what the next position is counted from."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Entries held and to come, and no offset: what a mask is made for."""
        return self.length + query_length, 0

    def reset(self) -> None:
        """Empty, as new."""
        super().reset()
        self._clear()

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens; impossible once entries leave while decoding.

        Raises:
            UserError: what they pushed out cannot come back.
        """
        if tokens_to_remove == 0 or not self.is_initialized:
            return
        count = abs(tokens_to_remove)
        if self.limit is not None or (self.started and self._places.shape[-1] > self.length - count):
            raise UserError("tokens cannot be taken back from a cache after entries have left for them")
        self._narrow(self.length - count)
        self.seen -= count

    def _each_row(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply `change` to every tensor with a row per sample."""
        if self.length == 0:
            return
        for name in ("keys", "values", "valid", "shift", "_places", "_last"):
            value = getattr(self, name)
            if value is not None:
                setattr(self, name, change(value))
        self.state = {name: change(v) if isinstance(v, Tensor) else v for name, v in self.state.items()}

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows in a new order, for beam search."""
        self._each_row(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row several times."""
        self._each_row(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only these rows."""
        self._each_row(lambda x: x[indices, ...])


def take_over(cache: object, config: object, owner: Owner) -> DynamicCache:
    """`cache` with its full-attention layers replaced by ours, in place; sliding and other layers are left alone.

    Args:
        cache: a DynamicCache, empty or filled; None for a new one.
        config: the model's, which says what kind each layer is of.
        owner: whoever prunes.

    Raises:
        UserError: another kind of cache, or one that something else has pruned.
    """
    if cache is None:
        cache = DynamicCache(config=config)
    if not isinstance(cache, DynamicCache):
        raise UserError(
            f"a {type(cache).__name__} cannot be pruned; pass a DynamicCache or none (no cache_implementation)"
        )
    kinds = DynamicCache(config=config).layers
    cache.layers.extend(kinds[len(cache.layers) :])
    for place, kind in enumerate(kinds):
        layer = cache.layers[place]
        if isinstance(layer, PrunedLayer):
            if layer.evicted and layer.owner is not owner:
                raise UserError("this cache was pruned by another method before; start from an empty one")
            layer.owner = owner
        elif type(layer) is DynamicLayer and type(kind) is DynamicLayer:
            cache.layers[place] = PrunedLayer.adopt(layer, owner)
        elif (
            type(layer) is DynamicLayer and isinstance(kind, DynamicSlidingWindowLayer) and layer is not kind
        ):
            if layer.is_initialized:
                kind.update(layer.keys, layer.values)
            cache.layers[place] = kind
    return cache


def fork(cache: DynamicCache) -> DynamicCache:
    """A cache that goes on from where `cache` is and leaves it as it is; they share what they hold."""
    new = copy.copy(cache)
    new.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in new.layers:
        if isinstance(layer, PrunedLayer):
            layer.state = dict(layer.state)
    if hasattr(cache, "tprune_track"):
        new.tprune_track = copy.deepcopy(cache.tprune_track)
    return new


def prunable_layers(config: object) -> list[int]:
    """The layers that attend to everything, and so may lose entries."""
    return [
        place for place, kind in enumerate(DynamicCache(config=config).layers) if type(kind) is DynamicLayer
    ]


def per_entry(value: int | Tensor) -> bool:
    """Whether a state holds a number per entry, [B, G, T]."""
    return isinstance(value, Tensor) and value.dim() == 3


def merge_rows(values: list[int | Tensor]) -> int | Tensor:
    """State of single rows as one: [1, G, K_b] filled on the left and stacked; an int where all rows agree."""
    if per_entry(values[0]):
        widest = max(value.shape[-1] for value in values)
        return torch.cat([fill_left(value, widest) for value in values])
    return values[0] if len(set(values)) == 1 else torch.tensor(values)
