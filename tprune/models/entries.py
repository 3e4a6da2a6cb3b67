"""The memory of one layer's cache: keys and values that grow in place, and what is told of each entry."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from tprune.core.cache import with_latest

GROWTH = 8
"""A cache that grows takes room for an eighth more than it needs, so that it rarely moves."""


class Entries(DynamicLayer):
    """Keys and values of one layer, per row and key-value head.

    They stand in temporal order until one replaces another in its slot; `places` always tells when each came.
    New entries are written in place, into memory with room for more, as long as no copy of the layer shares it.

    Attributes:
        keys, values: [B, G, T, d], as the attention uses them: keys are rotated, and turned to compact positions.
        valid: bool [B, T], False for padding and fillers, or None where all entries are real.
        state: what a method carries, see `LayerView.state`.
        limit: how many entries stay while decoding; None for no limit.
        codes: of the entries in `keys`, what is stored of them when they leave, [B, 1, T, R] each; None for keys and
            values.
        stand: which place on which shelf (`room.Shelf`) its memory is, or None where the memory is its own.
    """

    def __init__(self):
        super().__init__()
        self._clear()

    def _clear(self) -> None:
        self.valid: Tensor | None = None
        self.state: dict[str, int | Tensor] = {}
        self.limit: int | None = None
        self.codes: tuple[Tensor, Tensor] | None = None
        self.stand: tuple[object, int] | None = None
        self._buffers: tuple[Tensor, Tensor] | None = None
        self._places: Tensor | None = None
        self._real: int | Tensor = 0

    def __copy__(self) -> Self:
        """A layer that goes on by itself: whichever of the two writes first takes memory of its own."""
        self._buffers = self.stand = None
        new = object.__new__(type(self))
        new.__dict__ = self.__dict__ | {"state": dict(self.state)}
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

    def append(self, keys: Tensor, values: Tensor, real: Tensor | None) -> None:
        """New entries at the end: [B, G, q, d]; what is carried per entry starts at zero.

        Where entries leave for later ones, whoever chooses them sees to that.
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
            self.state = {name: with_latest(value, new) for name, value in self.state.items()}

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

    def take(self, change: Callable[[Tensor], Tensor]) -> None:
        """Hold what `change` leaves of [B, A, T, ...]: keys, values and all that is told per entry."""
        places = self.places
        self.keys, self.values, self._places = change(self.keys), change(self.values), change(places)
        self.codes = None if self.codes is None else tuple(map(change, self.codes))
        self.valid = None if self.valid is None else change(self.valid.unsqueeze(1)).squeeze(1)

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
