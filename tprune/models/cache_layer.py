"""A layer of transformers' DynamicCache whose entries may leave.

It tells the two lengths apart that a plain layer takes for one: how many tokens it has seen, which says where the
next token stands, and how many entries it holds, which says how wide a mask is.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from tprune.core.cache import per_entry
from tprune.core.stored import Stored
from tprune.errors import UserError

GROWTH = 8
"""A cache that grows takes room for an eighth more than it needs, so that it rarely moves."""

Turn = Callable[[Tensor, Tensor], Tensor]
"""Moves rotated keys [B, G, m, d] on by [B, G, m] positions."""


class Owner:
    """Stands for one compression of one model; copies of a cache keep the same one."""

    def __init__(self):
        self.active = True

    def __deepcopy__(self, memo: dict) -> Owner:
        return self


class PrunedLayer(DynamicLayer):
    """Keys and values of one layer, per row and key-value head the entries that are left.

    They stand in temporal order until one replaces another in its slot; `places` always tells when each came.
    New entries are written in place, into memory with room for more, as long as no copy of the layer shares it.

    Attributes:
        keys, values: [B, G, T, d], as the attention uses them: keys are rotated, and turned to compact positions.
        seen: how many tokens came by, in all; padding counts.
        coming: keys and values of several tokens that are to be appended one by one, since each pushes one out.
        valid: bool [B, T], False for padding and fillers, or None where all entries are real.
        state: what a method carries, see `LayerView.state`.
        limit: how many entries stay while decoding; None for no limit.
        started: whether the prompt has been pruned.
        evicted: whether any entry has left.
        shift: int64 [B, G, m], by how many positions the first m keys have been turned, or None.
        cached: [B, G, m, d], these keys as they were before, where shifts will change; else None.
        stored: further entries in another form, older than those in `keys`, or None; they never change but for rows.
        window: how many entries stay in `keys`, where older ones join what is stored; None where none does.
        block: how many entries in `keys` join what is stored at once; None where none does so.
        codes: of the entries in `keys`, what is stored of them then, [B, 1, T, R] each; None for keys and values.
        asked: [B, H, m, d], the latest queries, where the cache is pruned again by them; else None.
        budget: how many entries stay then, int64 [B] where rows differ.
        seeds: int64 [B], of the rows' prompts, where the method draws at random.
        tokens: int64 [B, seen], what came by, -1 for padding; in the first layer, where the method reads text.
        stand: which place on which shelf (`room.Shelf`) its memory is, or None where the memory is its own.
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
        self.coming: tuple[Tensor, Tensor] | None = None
        self.state: dict[str, int | Tensor] = {}
        self.limit: int | None = None
        self.started = self.evicted = False
        self.shift: Tensor | None = None
        self.cached: Tensor | None = None
        self.stored: Stored | None = None
        self.window: int | None = None
        self.block: int | None = None
        self.codes: tuple[Tensor, Tensor] | None = None
        self.asked: Tensor | None = None
        self.budget: int | Tensor = 0
        self.seeds: Tensor | None = None
        self.tokens: Tensor | None = None
        self.stand: tuple[object, int] | None = None
        self._buffers: tuple[Tensor, Tensor] | None = None
        self._places: Tensor | None = None
        self._left = 0
        self._real: int | Tensor = 0

    def __copy__(self) -> PrunedLayer:
        """A layer that goes on by itself: whichever of the two writes first takes memory of its own."""
        self._buffers = self.stand = None
        new = object.__new__(type(self))
        new.__dict__ = self.__dict__ | {"state": dict(self.state)}
        return new

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
        """T, how many entries `keys` holds."""
        return self.keys.shape[-2] if self.is_initialized and self.keys.numel() else 0

    @property
    def places(self) -> Tensor:
        """int64 [B, G, T], the place of every entry in its sequence, counted without padding.

        Only what an edit left behind is stored; entries that came later are consecutive.
        """
        batch, groups, length = self.keys.shape[:3]
        device, real = self.keys.device, self.valid
        if self._places is None:
            if real is None:
                return torch.arange(length, device=device).expand(batch, groups, length)
            return (real.cumsum(1) - 1).clamp_min(0).unsqueeze(1).expand(batch, groups, length)
        later = length - self._places.shape[-1]
        if later == 0:
            return self._places
        if real is None:
            new = torch.arange(self._real - later, self._real, device=device)
        else:
            steps = real[:, -later:].cumsum(1)
            new = (self._real.unsqueeze(1) - 1 + steps - steps[:, -1:]).unsqueeze(1)
        self._places = torch.cat([self._places, new.expand(batch, groups, later)], dim=-1)
        return self._places

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

    def append(self, keys: Tensor, values: Tensor, real: Tensor | None) -> None:
        """New entries at the end: [B, G, q, d]; a number per entry starts at zero.

        Where entries leave for later ones, whoever chooses them sees to the numbers.
        """
        held, new = self.length, keys.shape[-2]
        if held == 0:
            super().update(keys, values)
        else:
            self._reserve(held + new)
            for buffer, states in zip(self._buffers, (keys, values), strict=True):
                buffer[:, :, held : held + new] = states
            self.keys, self.values = (buffer[:, :, : held + new] for buffer in self._buffers)
        if self.valid is not None or real is not None:
            batch = keys.shape[0]
            old = self.valid if self.valid is not None else keys.new_ones(batch, held, dtype=torch.bool)
            real = real if real is not None else keys.new_ones(batch, new, dtype=torch.bool)
            self.valid = torch.cat([old, real], dim=1)
        self._real = self._real + (new if self.valid is None else real.sum(1))
        if self.limit is None:
            self._each_number(lambda value: torch.nn.functional.pad(value, (0, new)))

    def _reserve(self, count: int) -> None:
        """Make `keys` and `values` the beginning of memory that nobody else reads, with room for `count` entries."""
        held = self.keys.shape[2]
        if self._buffers is not None:
            first = self._buffers[0]
            # Somebody else may have moved the keys; and what autograd has saved must not be written to.
            ours = first.data_ptr() == self.keys.data_ptr() and not first.requires_grad
            if ours and first.shape[2] >= count and first.is_inference() <= torch.is_inference_mode_enabled():
                return
        self.stand = None
        room = count if self.limit is not None else count + count // GROWTH
        held_states = self.keys, self.values
        self._buffers = tuple(x.new_empty(*x.shape[:2], room, x.shape[3]) for x in held_states)
        self.keys, self.values = (buffer[:, :, :held] for buffer in self._buffers)
        self.keys.copy_(held_states[0])
        self.values.copy_(held_states[1])

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

    def take(self, change: Callable[[Tensor], Tensor]) -> None:
        """Hold what `change` leaves of [B, A, T, ...]: keys, values and all that is told per entry."""
        places = self.places
        self.keys, self.values, self._places = change(self.keys), change(self.values), change(places)
        self.codes = None if self.codes is None else tuple(map(change, self.codes))
        self.valid = None if self.valid is None else change(self.valid.unsqueeze(1)).squeeze(1)

    @property
    def grown(self) -> int:
        """How many entries came since `hold`."""
        return self.length - self._left

    def move_in(self, stand: tuple[object, int], keys: Tensor, values: Tensor) -> None:
        """Stand on a shelf, with these parts of its memory [B, G, T, d], which hold what the layer holds."""
        self.stand, self._buffers = stand, (keys, values)
        self.keys, self.values = keys, values

    def settle(self, places: Tensor, state: dict[str, int | Tensor]) -> None:
        """After an entry of every head has left for the latest, in the layer's own memory: forget the last slot.

        Args:
            places: int64 [B, G, T - 1], of what is left.
            state: what the method carries for it.
        """
        self.keys, self.values = (buffer[:, :, : places.shape[2]] for buffer in self._buffers)
        self._places, self.state = places, state
        self.valid = None if self.valid is None else self.valid[:, :-1]

    @property
    def latest(self) -> int | Tensor:
        """The place of the latest real token, counted without padding; int64 [B] where there is any."""
        return self._real - 1

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

    def _each_number(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply `change` to what the method carries per entry."""
        for name, value in self.state.items():
            if per_entry(value):
                self.state[name] = change(value)

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
        held = self.length - count
        if self.one_by_one or held < self._left:
            raise UserError("tokens cannot be taken back from a cache after entries have left for them")
        self.keys, self.values = self.keys[:, :, :held], self.values[:, :, :held]
        self._places = None if self._places is None else self._places[..., :held]
        self._real = self._real - (count if self.valid is None else self.valid[:, held:].sum(1))
        self.valid = None if self.valid is None else self.valid[:, :held]
        self.tokens = None if self.tokens is None else self.tokens[:, :-count]
        self._each_number(lambda value: value[..., :held])
        self.seen -= count

    def _each_row(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply `change` to every tensor with a row per sample."""
        if self.length == 0:
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
