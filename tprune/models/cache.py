"""transformers' caches with layers whose entries may leave: taken over in place, and forked; which layers these are."""

from __future__ import annotations

import copy

from torch import nn
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from tprune.errors import UserError
from tprune.models.cache_layer import Owner, PrunedLayer


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
    if any(isinstance(layer, PrunedLayer) and layer.owner is owner for layer in cache.layers):
        return cache
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
    if hasattr(cache, "tprune_track"):
        new.tprune_track = copy.deepcopy(cache.tprune_track)
    return new


def prunable_layers(config: object) -> list[int]:
    """The layers that attend to everything, and so may lose entries."""
    return [
        place for place, kind in enumerate(DynamicCache(config=config).layers) if type(kind) is DynamicLayer
    ]


def attention_modules(base: nn.Module) -> tuple[list[int], list[str | None], dict[int, nn.Module]]:
    """The layers that can be pruned, every layer's type, and the attention modules by layer."""
    modules = {
        module.layer_idx: module
        for module in base.modules()
        if hasattr(module, "layer_idx") and hasattr(module, "is_causal") and hasattr(module, "config")
    }
    places = prunable_layers(base.config)
    if not places:
        raise UserError(
            "every layer of this model attends through a sliding window: its cache is small already"
        )
    if not modules or any(place not in modules for place in places):
        raise UserError(f"{type(base).__name__} is no decoder whose attention layers can be found")
    text = base.config.get_text_config(decoder=True)
    depth = text.num_hidden_layers
    kinds = getattr(text, "layer_types", None) or [None] * depth
    return places, kinds, modules
