"""A decoder while a cache method is fitted in it: every layer that can be pruned is shown, and nothing leaves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from tprune.core.budget import Site
from tprune.methods.cache import CacheMethod, CacheShape
from tprune.methods.cache_view import LayerView
from tprune.methods.fit import Fit
from tprune.models.cache import attention_modules
from tprune.models.key_values import Entering, KeyValues, projections
from tprune.models.taps import AttentionCall, Output, Tap

BASE = 10_000.0
"""Of rotary embeddings, where a model has none of its own, or one for every kind of layer."""


def cache_shape(model: nn.Module, who: str | None = None) -> CacheShape:
    """What a method may know of a model; projections where `who` needs them."""
    places, kinds, modules = attention_modules(model.get_decoder())
    config = model.config.get_text_config(decoder=True)
    rope = getattr(config, "rope_parameters", None) or {}
    made = {} if who is None else projections(model, {place: modules[place] for place in places}, kinds, who)
    return CacheShape(
        len(kinds),
        tuple(places),
        config.num_attention_heads,
        config.hidden_size,
        float(rope.get("rope_theta", BASE)),
        made,
    )


class CacheFitDriver:
    """Calls a fit's `at` in every layer that can be pruned, until removed.

    Where that gives a tensor, [B, 1, N, N], it takes the place of the layer's mask: added to the logits.

    Attributes:
        memory: of the last forward; "entering" is what the first layer's attention was given, [B, N, D].
    """

    def __init__(self, model: nn.Module, method: CacheMethod, fit: Fit):
        self.fit, self.memory, self.absent = fit, {}, False
        base = model.get_decoder()
        places, kinds, modules = attention_modules(base)
        watched = {place: modules[place] for place in places}
        self.depth = len(kinds)
        self.made = KeyValues(model, watched, kinds, method.id) if "inputs" in method.reads else None
        self.entering = Entering(modules[0])
        self.hook = base.register_forward_pre_hook(self._begin)
        self.tap = Tap(watched.values(), self._see)

    def remove(self) -> None:
        """Take all hooks out again."""
        self.hook.remove()
        self.entering.remove()
        if self.made is not None:
            self.made.remove()
        self.tap.remove()

    @contextmanager
    def away(self) -> Iterator[None]:
        """The model without the method, for a while."""
        self.absent = True
        try:
            yield
        finally:
            self.absent = False

    def _begin(self, base: nn.Module, args: tuple) -> None:
        if not self.absent:
            self.memory = {}

    def _see(self, call: AttentionCall) -> Output | None:
        if self.absent:
            return None
        place = call.module.layer_idx
        view = LayerView(place, self.depth, call.view(), call.key, call.value, None, {})
        if self.made is not None:
            view.inputs, view.projections = self.made.inputs(place), self.made.projections[place]
        self.memory["entering"] = self.entering.inputs
        bias = self.fit.at(Site(place), view, self.memory)
        return None if bias is None else call.attend(call.query, call.key, call.value, bias)
