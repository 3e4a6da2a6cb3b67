"""A layer of transformers' DynamicCache whose entries may leave.

It tells the two lengths apart that a plain layer takes for one: how many tokens it has seen, which says where the
next token stands, and how many entries it holds, which says how wide a mask is.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from tprune.core.cache import follows_entries
from tprune.core.stored import Stored
from tprune.errors import UserError
from tprune.models.entries import Entries

Turn = Callable[[Tensor, Tensor], Tensor]
"""Moves rotated keys [B, G, m, d] on by [B, G, m] positions."""


class Owner:
    """Stands for one compression of one model; copies of a cache keep the same one."""

    def __init__(self):
        self.active = True

    def __deepcopy__(self, memo: dict) -> Owner:
        return self


class PrunedLayer(Entries):
    """Keys and values of one layer, per row and key-value head the entries that are left.

    Attributes:
        seen: how many tokens came by, in all; padding counts.
        coming: keys and values of several tokens that are to be appended one by one, since each pushes one out.
        started: whether the prompt has been pruned.
        evicted: whether any entry has left.
        shift: int64 [B, G, m], by how many positions the first m keys have been turned, or None.
        cached: [B, G, m, d], these keys as they were before, where shifts will change; else None.
        stored: further entries in another form, older than those in `keys`, or None; they never change but for rows.
        window: how many entries stay in `keys`, where older ones join what is stored; None where none does.
        block: how many entries in `keys` join what is stored at once; None where none does so.
        asked: [B, H, m, d], the latest queries, where the cache is pruned again by them; else None.
        budget: how many entries stay then, int64 [B] where rows differ.
        seeds: int64 [B], of the rows' prompts, where the method draws at random.
        tokens: int64 [B, seen], what came by, -1 for padding; in the first layer, where the method reads text.
        owner: whose rules it follows; once entries have left, the cache cannot be used without it.
    """

    def __init__(self, owner: Owner):
        super().__init__()
        self.owner = owner

    def _clear(self) -> None:
        super()._clear()
        self.seen = 0
        self.arriving: Tensor | None = None
        self.coming: tuple[Tensor, Tensor] | None = None
        self.started = self.evicted = False
        self.shift: Tensor | None = None
        self.cached: Tensor | None = None
        self.stored: Stored | None = None
        self.window: int | None = None
        self.block: int | None = None
        self.asked: Tensor | None = None
        self.budget: int | Tensor = 0
        self.seeds: Tensor | None = None
        self.tokens: Tensor | None = None
        self._left = 0

    @classmethod
    def adopt(cls, layer: DynamicLayer, owner: Owner) -> PrunedLayer:
        """A layer with the entries of `layer`, nothing pruned yet."""
        new = cls(owner)
        if layer.is_initialized:
            new.lazy_initialization(layer.keys, layer.values)
            new.keys, new.values, new.seen = layer.keys, layer.values, layer.get_seq_length()
        return new

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Append; `arriving` bool [B, q], set before, says which of the new tokens are real (None: all)."""
        if self.evicted and not self.owner.active:
            raise UserError("this cache was pruned by tprune; use it inside the with block that pruned it")
        self.seen += key_states.shape[-2]
        if self.one_by_one and key_states.shape[-2] > 1:
            self.coming = key_states, value_states
        else:
            self.append(key_states, value_states, self.arriving)
        return self.keys, self.values

    def hold(
        self,
        keys: Tensor,
        values: Tensor,
        places: Tensor,
        state: dict[str, int | Tensor],
        valid: Tensor | None = None,
    ) -> None:
        """Hold these entries from now on, [B, G, K, d] at `places` [B, G, K]: what an edit left of the prompt.

        `valid` bool [B, K] is False for fillers; None where there are none.
        """
        if not self.started:
            self._real = self.length if self.valid is None else self.valid.sum(1)
        self.evicted |= keys.shape[2] < self.length
        self.keys, self.values = self._buffers = keys, values
        self._places, self.state, self.valid = places, state, valid
        self._left = self.length

    @property
    def one_by_one(self) -> bool:
        """Whether something happens to the cache between a token and the next."""
        return self.limit is not None or self.stores

    @property
    def stores(self) -> bool:
        """Whether entries join what is stored."""
        return self.window is not None or self.block is not None

    @property
    def grown(self) -> int:
        """How many entries came since `hold`."""
        return self.length - self._left

    def shift_to_compact(self, turn: Turn) -> None:
        """Turn keys so that entries stand one behind the other, up to the latest token's place.

        Entries must be in temporal order, as after `hold`.
        """
        came = self._real if isinstance(self._real, int) else self._real[:, None, None]
        compact = came - torch.arange(self.length, 0, -1, device=self.keys.device)
        shift = (compact - self.places).clamp_min(0)
        shift = shift[..., : int((shift > 0).sum(-1).max())]
        cached = self.keys[:, :, : shift.shape[-1]].clone()
        self.shift, self.cached = shift, None if self.limit is None else cached
        if shift.shape[-1]:
            self.keys[:, :, : shift.shape[-1]] = turn(cached, shift)

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
        held = self.length - count
        if self.one_by_one or held < self._left:
            raise UserError("tokens cannot be taken back from a cache after entries have left for them")
        self.keys, self.values = self.keys[:, :, :held], self.values[:, :, :held]
        self._places = None if self._places is None else self._places[..., :held]
        self._real = self._real - (count if self.valid is None else self.valid[:, held:].sum(1))
        self.valid = None if self.valid is None else self.valid[:, :held]
        self.tokens = None if self.tokens is None else self.tokens[:, :-count]
        self.state = {n: v[:, :, :held] if follows_entries(v) else v for n, v in self.state.items()}
        self.seen -= count

    def _each_row(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply `change` to every tensor with a row per sample."""
        if self.seen == 0:  # not `length`: all that came may be stored
            return
        self._buffers = self.stand = None
        for name in (
            "keys",
            "values",
            "valid",
            "shift",
            "cached",
            "asked",
            "budget",
            "seeds",
            "tokens",
            "_places",
            "_real",
        ):
            value = getattr(self, name)
            if isinstance(value, Tensor):
                setattr(self, name, change(value))
        self.state = {name: change(v) if isinstance(v, Tensor) else v for name, v in self.state.items()}
        self.stored = None if self.stored is None else self.stored.each_row(change)
        self.codes = None if self.codes is None else tuple(map(change, self.codes))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows in a new order, for beam search."""
        self._each_row(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row several times."""
        self._each_row(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only these rows."""
        self._each_row(lambda x: x[indices.to(x.device)])
