"""A cache method at work whose queries choose which keys they read: a mask, and nothing is forgotten."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tprune.errors import UserError
from tprune.methods.cache import CacheMethod
from tprune.models.cache_fit import cache_shape
from tprune.models.cache_layer import PrunedLayer
from tprune.models.compress import Compression
from tprune.models.held import attend_held
from tprune.models.key_values import Entering, given_positions
from tprune.models.taps import AttentionCall, Output


class Choosing(Compression):
    """A method that `chooses` at work, until `remove`; `kept` tells how many keys the latest prompt's queries read."""

    chooses_in = "_choose"

    def __init__(self, model: nn.Module, method: CacheMethod, keep: float, seed: int, compact: bool):
        if compact:
            raise UserError(
                f"{method.id} forgets nothing: positions stay as they are; leave out --positions compact"
            )
        super().__init__(model, method, keep, seed, compact)
        self.shape = cache_shape(model)
        self.entering = Entering(self.modules[0])
        self.position: Tensor | None = None
        self.foreseen: Any = None

    def remove(self) -> None:
        """Take hooks and taps off."""
        super().remove()
        self.entering.remove()

    def _before(self, base: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """As ever; a call without a cache gets one: what is chosen is remembered there."""
        kwargs = dict(zip(self.parameters, args, strict=False)) | kwargs | {"use_cache": True}
        found = super()._before(base, (), kwargs)
        tokens = kwargs.get("input_ids") if kwargs.get("input_ids") is not None else kwargs["inputs_embeds"]
        first = self.cache.layers[self.places[0]]
        self.position = given_positions(kwargs.get("position_ids"), tokens, first.seen)
        return found

    def _after(self, base: nn.Module, args: tuple, output: Any) -> None:
        """As ever; what was foreseen has been used."""
        super()._after(base, args, output)
        self.foreseen = self.entering.inputs = None

    def _attend(self, call: AttentionCall) -> Output | None:
        """One layer's attention over the keys that its queries choose."""
        if self.cache is None:
            return None
        place, count = call.module.layer_idx, call.query.shape[2]
        layer: PrunedLayer = self.cache.layers[place]
        prompt, layer.started = not layer.started, True
        if self.keep == 1:
            return None
        visible = layer.visible(count)
        if visible is None:
            visible = call.key.new_ones(len(call.key), 1, 1, layer.length, dtype=torch.bool)
        memory = self.cache.layers[self.places[0]].state
        if place == self.places[0]:
            self.foreseen = self._foresee(visible, memory)
        chosen = self._choose(place, visible, memory)
        if prompt:
            self.kept[place] = read_of(chosen, visible, call.query.shape[1])
        # What sees nothing is padding: it sees everything, as its output is not read.
        mask = chosen | ~chosen.any(-1, keepdim=True)
        return attend_held(layer, call, call.query, mask, self.additive)

    def _choose(self, place: int, visible: Tensor, memory: dict[str, Tensor]) -> Tensor:
        return self.method.choose(self.shape, place, self.foreseen, visible, self.keep, memory)

    def _foresee(self, visible: Tensor, memory: dict[str, Tensor]) -> Any:
        before = visible.shape[3] - visible.shape[2]
        if any(x.shape[2] != visible.shape[3] for x in memory.values()) or before and not memory:
            raise UserError(
                f"{self.method.id} must see a cache from its first token on: start from an empty one"
            )
        # The cache has made room for what came; the method tells it.
        memory.update({name: x[:, :, :before] for name, x in memory.items()})
        shown = visible | ~visible.any(-1, keepdim=True)
        return self.method.foresee(self.shape, self.entering.inputs, self.position, shown, memory)


def read_of(chosen: Tensor, visible: Tensor, heads: int) -> tuple[int, int]:
    """How many keys the queries of all heads read, of how many that they may see."""
    one = (len(chosen), heads, *chosen.shape[2:])
    sums: Sequence[Tensor] = [x.expand(one).sum() for x in (chosen, visible)]
    return int(sums[0]), int(sums[1])
