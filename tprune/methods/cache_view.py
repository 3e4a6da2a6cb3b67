"""What a cache method is given to look at: one layer behind the prompt, and all layers behind a later token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tprune.methods.attention import Attention


@dataclass(eq=False)
class Projections:
    """How a layer makes keys and values of its inputs.

    Attributes:
        weights: () -> the projections' weights [C, D] and [E, D] in the model's own type; biases come later.
        finish_keys: projected keys [B, t, C] at positions int64 [B, t] as they are attended to: rotated, [B, G, t, d].
        finish_values: projected values [B, t, E] as they are attended to, [B, G, t, e].
        shared: what was computed from the weights, for all prompts.
    """

    weights: Callable[[], tuple[Tensor, Tensor]]
    finish_keys: Callable[[Tensor, Tensor], Tensor]
    finish_values: Callable[[Tensor], Tensor]
    shared: dict[str, Any] = field(default_factory=dict)

    def project(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of inputs [..., D], before they are finished."""
        key, value = (inputs @ weight.mT for weight in self.weights())
        return key, value

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """`make()`, computed once."""
        if name not in self.shared:
            self.shared[name] = make()
        return self.shared[name]


@dataclass(eq=False)
class Turning:
    """How a layer rotates queries and keys by their positions; nothing happens in a model without RoPE.

    Attributes:
        turn: x [B, H, m, d] that is rotated, or not yet, moved on by `shift` [B, H, m] positions, also negative ones.
        shared: what was computed of it, for all layers that turn alike.
    """

    turn: Callable[[Tensor, Tensor], Tensor]
    shared: dict[tuple[int, int, int], Tensor] = field(default_factory=dict)

    def mean(self, first: int, count: int, width: int, device: torch.device) -> Tensor:
        """The rotation of vectors [width], as rows, averaged over `count` positions: [width, width]."""
        name = first, count, width
        if name not in self.shared:
            self.shared.clear()
            rows = torch.eye(width, device=device).view(1, width, 1, width).expand(-1, -1, count, -1)
            shift = torch.arange(first, first + count, device=device).expand(1, width, -1)
            self.shared[name] = self.turn(rows, shift)[0].mean(1)
        return self.shared[name].to(device)


@dataclass(eq=False)
class LayerView:
    """One layer's cache after the prompt went through it: one row or rows of equal length, without padding.

    Attributes:
        layer, depth: which of how many.
        attention: of the prompt's queries over the entries of the cache.
        key, value: [B, G, T, d], the cache; keys as the attention uses them (rotated).
        position: int64 [B, G, T], the place of every entry in its sequence, ascending.
        state: what the method carries to its later steps for this layer; empty now. A tensor [B, G, T] holds a number
            per entry, and one [B, 1, T, r] a vector where all heads hold the same ones; both follow evictions, new
            entries start at zero. An int is for all rows, and becomes int64 [B] where rows of a padded batch differ.
        seeds: int64 [B], for methods that draw at random.
        inputs: [B, T, D], what the keys and values were projected from by `projections`, and `begin`, int64 [B], the
            position of the first of them; for methods that read "inputs".
        turning: how queries and keys are rotated, for methods that read "turning".
        probed: float32 [B, H, T], what the last token of a method's probe (`CacheMethod.probe`) paid to every entry.
        passage: int64 [B, T], in which passage of the text the entries stand, ascending, where no two heads hold
            different ones; -1 for what must stay.
    """

    layer: int
    depth: int
    attention: Attention
    key: Tensor
    value: Tensor
    position: Tensor
    state: dict[str, int | Tensor]
    seeds: Tensor | None = None
    inputs: Tensor | None = None
    begin: Tensor | None = None
    projections: Projections | None = None
    turning: Turning | None = None
    probed: Tensor | None = None
    passage: Tensor | None = None

    @property
    def groups(self) -> int:
        """G, how many key-value heads."""
        return self.key.shape[1]

    @property
    def length(self) -> int:
        """T, how many entries."""
        return self.key.shape[2]


@dataclass(eq=False)
class StepView:
    """Caches after a later token, before an entry of every key-value head leaves for it.

    Layers of equal size are stacked along the batch, so that B is layers · rows: choosing for all of them at once
    costs little more than for one. Rows that keep fewer entries begin with fillers.

    Attributes:
        attentions: per layer, of the new token's query over the entries.
        key, value: [B, G, T, d], the cache; the new entry is in the last slot.
        position: int64 [B, G, T], the place of every entry in its sequence, counted without padding; in any order
            but for the last slot's.
        fillers: how many leading entries of a row are fillers, to be kept and never read; int64 [B] where rows
            differ.
        state: what the method carries, see `LayerView`.
        layers: which layers these are, in the order of the batch.
        inputs: [B, D], what the latest entries were made of, for methods that read "inputs".
    """

    attentions: list[Attention]
    key: Tensor
    value: Tensor
    position: Tensor
    fillers: int | Tensor
    state: dict[str, int | Tensor]
    layers: list[int]
    inputs: Tensor | None = None

    @property
    def groups(self) -> int:
        """G, how many key-value heads."""
        return self.position.shape[1]

    def attention_rows(self) -> Tensor:
        """What the new query pays to every entry: float32 [B, H, T]."""
        return torch.cat([attention.rows().squeeze(2) for attention in self.attentions])
