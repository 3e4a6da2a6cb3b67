"""An entry of every head leaves for a new token, chosen for all layers at once.

Layer by layer it would be some thirty tiny operations each, more than the attention they follow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tprune.core.cache import Replace, follows_entries, with_latest
from tprune.methods.attention import Attention
from tprune.methods.cache import CacheMethod
from tprune.methods.cache_view import StepView
from tprune.models.cache_layer import PrunedLayer, Turn
from tprune.models.threads import FewThreads


@dataclass(frozen=True, eq=False)
class Arrival:
    """A layer whose last slot has a new entry.

    Attributes:
        attention: of the new token's query over the entries.
        turn: how keys move on by some positions, for layers with compact ones; equal layers have the same.
        place: which layer it is.
        inputs: [B, D], what the entry was made of, for methods that read "inputs".
    """

    layer: PrunedLayer
    attention: Attention
    turn: Turn | None = None
    place: int = 0
    inputs: Tensor | None = None


def make_room(method: CacheMethod, arrivals: Sequence[Arrival]) -> None:
    """Let `method` choose what leaves each layer, and overwrite it. Where the new token is padding, that leaves."""
    alike: dict[tuple, list[Arrival]] = {}
    for arrival in arrivals:
        layer = arrival.layer
        numbers = tuple(value for value in layer.state.values() if isinstance(value, int))
        turned = None if layer.shift is None else layer.shift.shape[-1]
        alike.setdefault((layer.keys.shape, numbers, turned, arrival.turn), []).append(arrival)
    for (shape, *_), group in alike.items():
        with FewThreads(len(group) * shape[:3].numel(), group[0].layer.keys.device):
            _make_room(method, group)


def _make_room(method: CacheMethod, group: Sequence[Arrival]) -> None:
    layers = [arrival.layer for arrival in group]
    shelf = Shelf.of(layers)
    places = shelf.places_with(layers)
    before = {name: with_latest(value) for name, value in shelf.state.items()}
    view = StepView(
        [arrival.attention for arrival in group],
        shelf.keys,
        shelf.values,
        places,
        0 if layers[0].valid is None else _stack([layer.fillers() for layer in layers]),
        dict(before),
        [arrival.place for arrival in group],
        None if group[0].inputs is None else torch.cat([arrival.inputs for arrival in group]),
    )
    edit = method.step(view)
    real = None if layers[0].valid is None else _stack([layer.valid[:, -1:] for layer in layers])
    if real is not None:
        edit = edit.only(real, places.shape[2] - 1)
        for name, value in before.items():
            if follows_entries(value):
                view.state[name] = torch.where(_like(real, value), view.state[name], value)
    shelf.replace(edit, places, view.state)
    if shelf.shift is not None:
        shelf.keep_compact(edit, places, real, group[0].turn)
    shelf.settle(layers)


class Shelf:
    """The memory of layers of equal size, one behind the other along the batch, so that one operation writes them all.

    A layer stands on it until it takes memory of its own again. Its keys and values are then parts of the shelf's;
    everything else is a value that it is handed after each step.

    Attributes:
        keys, values: [L·B, G, T, d]; the last slot is the newest entry's.
        places: int64 [L·B, G, T - 1], of the other entries.
        state: what the method carries, as in `StepView`, for these entries.
        shift, cached: of compact positions, as in `PrunedLayer`.
    """

    def __init__(self, layers: Sequence[PrunedLayer]):
        self.count = len(layers)
        self.keys, self.values = (
            torch.cat([getattr(x, name) for x in layers]) for name in ("keys", "values")
        )
        self.places = torch.cat([layer.places[..., :-1] for layer in layers])
        self.state = {name: _stack([layer.state[name] for layer in layers]) for name in layers[0].state}
        self.shift = self.cached = None
        if layers[0].shift is not None:
            self.shift = torch.cat([layer.shift for layer in layers])
            self.cached = torch.cat([layer.cached for layer in layers])
        rows = layers[0].keys.shape[0]
        for place, layer in enumerate(layers):
            # Autograd forbids writing into one of the parts that `chunk` gives.
            part = slice(place * rows, (place + 1) * rows)
            layer.move_in((self, place), self.keys[part], self.values[part])

    @classmethod
    def of(cls, layers: Sequence[PrunedLayer]) -> Shelf:
        """The shelf on which exactly these layers stand, in this order; a new one where they do not."""
        shelf = None if layers[0].stand is None else layers[0].stand[0]
        if (
            shelf is not None
            and shelf.count == len(layers)
            # What autograd has saved must not be written to.
            and not shelf.keys.requires_grad
            and all(layer.stand == (shelf, place) for place, layer in enumerate(layers))
        ):
            return shelf
        return cls(layers)

    def places_with(self, layers: Sequence[PrunedLayer]) -> Tensor:
        """int64 [L·B, G, T], the places of all entries, the newest too."""
        latest = _stack([layer.latest for layer in layers])
        if isinstance(latest, int):
            return torch.nn.functional.pad(self.places, (0, 1), value=latest)
        newest = latest[:, None, None].expand(-1, self.places.shape[1], 1)
        return torch.cat([self.places, newest], dim=-1)

    def replace(self, edit: Replace, places: Tensor, state: dict[str, int | Tensor]) -> None:
        """Carry out an edit, on keys and values in place.

        Args:
            edit: what leaves.
            places, state: of all entries, the newest too.
        """
        if self.cached is not None:
            self.keys[:, :, : self.cached.shape[2]] = self.cached
        edit.write(self.keys)
        edit.write(self.values)
        self.places = edit.apply(places)
        self.state = {name: edit.apply(v) if follows_entries(v) else v for name, v in state.items()}

    def keep_compact(self, edit: Replace, places: Tensor, real: Tensor | None, turn: Turn) -> None:
        """What is older than the entry that left, at `places` [L·B, G, T] before, moves up by one position."""
        older = places < places.gather(2, edit.slot.unsqueeze(2))
        if real is not None:
            older &= real.unsqueeze(2)
        turned = self.shift.shape[-1]
        before = torch.nn.functional.pad(self.shift, (0, places.shape[-1] - turned))
        shift = edit.apply(older + before)
        if not bool(shift[..., turned:].any()):
            shift = shift[..., :turned]
        self.shift, self.cached = shift, self.keys[:, :, : shift.shape[-1]].clone()
        if shift.shape[-1]:
            self.keys[:, :, : shift.shape[-1]] = turn(self.cached, shift)

    def settle(self, layers: Sequence[PrunedLayer]) -> None:
        """Let the layers know what is left of them."""
        places = self.places.chunk(self.count)
        names = list(self.state)
        states = zip(*(_split(self.state[name], self.count) for name in names), strict=True)
        states = states if names else [()] * self.count
        for layer, where, values in zip(layers, places, states, strict=True):
            layer.settle(where, dict(zip(names, values, strict=True)))
        if self.shift is not None:
            for layer, shift, cached in zip(
                layers, self.shift.chunk(self.count), self.cached.chunk(self.count), strict=True
            ):
                layer.shift, layer.cached = shift, cached


def _like(real: Tensor, value: Tensor) -> Tensor:
    """`real` [B, 1] with as many dimensions as `value`."""
    return real.view(-1, *[1] * (value.dim() - 1))


def _stack(values: Sequence[int | Tensor]) -> int | Tensor:
    """Tensors one behind the other along the batch; numbers are equal, and stay one."""
    return torch.cat(list(values)) if isinstance(values[0], Tensor) else values[0]


def _split(value: int | Tensor, count: int) -> Sequence[int | Tensor]:
    """The inverse of `_stack`."""
    return value.chunk(count) if isinstance(value, Tensor) else [value] * count
