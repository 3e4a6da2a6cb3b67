"""An entry of every head leaves for a new token, chosen for all layers at once.

Layer by layer it would be some thirty tiny operations each, more than the attention they follow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tprune.core.cache import Replace, per_entry
from tprune.methods.base import CacheMethod
from tprune.methods.views import Attention, StepView
from tprune.models.cache_layer import PrunedLayer, Turn


@dataclass(frozen=True, eq=False)
class Arrival:
    """A layer whose last slot has a new entry.

    Attributes:
        attention: of the new token's query over the entries.
        turn: how keys move on by some positions, for layers with compact ones; equal layers have the same.
    """

    layer: PrunedLayer
    attention: Attention
    turn: Turn | None = None


def make_room(method: CacheMethod, arrivals: Sequence[Arrival]) -> None:
    """Let `method` choose what leaves each layer, and overwrite it. Where the new token is padding, that leaves."""
    alike: dict[tuple, list[Arrival]] = {}
    for arrival in arrivals:
        layer = arrival.layer
        numbers = tuple(value for value in layer.state.values() if isinstance(value, int))
        turned = None if layer.shift is None else layer.shift.shape[-1]
        alike.setdefault((layer.keys.shape, numbers, turned, arrival.turn), []).append(arrival)
    for group in alike.values():
        _make_room(method, group)


def _make_room(method: CacheMethod, group: Sequence[Arrival]) -> None:
    layers = [arrival.layer for arrival in group]
    places = _stack([layer.places for layer in layers])
    before = {name: _stack([layer.state[name] for layer in layers]) for name in layers[0].state}
    # A number per entry starts at zero.
    before = {
        name: torch.nn.functional.pad(value, (0, 1)) if per_entry(value) else value
        for name, value in before.items()
    }
    view = StepView(
        [arrival.attention for arrival in group],
        _stack([layer.values[:, :, -1] for layer in layers]),
        places,
        0 if layers[0].valid is None else _stack([layer.fillers() for layer in layers]),
        dict(before),
    )
    edit = method.step(view)
    real = None if layers[0].valid is None else _stack([layer.valid[:, -1:] for layer in layers])
    if real is not None:
        edit = Replace(torch.where(real, edit.slot, places.shape[2] - 1))
        for name, value in before.items():
            if per_entry(value):
                view.state[name] = torch.where(real.unsqueeze(2), view.state[name], value)
    after = {name: edit.apply(v) if per_entry(v) else v for name, v in view.state.items()}
    count = len(layers)
    states = {name: _split(value, count) for name, value in after.items()}
    slots, moved = _split(edit.slot, count), _split(edit.apply(places), count)
    for place, layer in enumerate(layers):
        layer.state = {name: parts[place] for name, parts in states.items()}
        layer.replace(Replace(slots[place]), moved[place])
    if layers[0].shift is not None:
        _keep_compact(layers, edit, places, real, group[0].turn)


def _keep_compact(
    layers: Sequence[PrunedLayer], edit: Replace, places: Tensor, real: Tensor | None, turn: Turn
) -> None:
    """What is older than the entry that left, at `places` [B, G, T] before, moves up by one position."""
    older = places < places.gather(2, edit.slot.unsqueeze(2))
    if real is not None:
        older &= real.unsqueeze(2)
    before = _stack([layer.shift for layer in layers])
    turned = before.shape[-1]
    shift = edit.apply(older + torch.nn.functional.pad(before, (0, places.shape[-1] - turned)))
    if not bool(shift[..., turned:].any()):
        shift = shift[..., :turned]
    cached = _stack([layer.keys[:, :, : shift.shape[-1]] for layer in layers])
    keys = turn(cached, shift) if shift.shape[-1] else cached
    parts = (_split(value, len(layers)) for value in (shift, cached, keys))
    for layer, *values in zip(layers, *parts, strict=True):
        layer.turned(*values)


def _stack(values: Sequence[int | Tensor]) -> int | Tensor:
    """Tensors one behind the other along the batch; numbers are equal, and stay one."""
    return torch.cat(list(values)) if isinstance(values[0], Tensor) else values[0]


def _split(value: int | Tensor, count: int) -> Sequence[int | Tensor]:
    """The inverse of `_stack`."""
    return value.chunk(count) if isinstance(value, Tensor) else [value] * count
