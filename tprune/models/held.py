"""Attention of the latest tokens over what a layer of a pruned cache holds, dense or in another form."""

from __future__ import annotations

from itertools import chain

import torch
from torch import Tensor

from tprune.core.attending import attend
from tprune.core.tiles import Tile, attend_tiles
from tprune.methods.attention import Attention
from tprune.models.cache_layer import PrunedLayer
from tprune.models.storing import store
from tprune.models.taps import AttentionCall, Output
from tprune.models.threads import FewThreads


def attend_held(
    layer: PrunedLayer, call: AttentionCall, query: Tensor, mask: Tensor | None, additive: bool
) -> Output:
    """What the model's own attention makes of `query` [B, H, q, d] and a layer's entries: [B, q, H, d], and its map.

    Args:
        layer: whose cache.
        call: of the model's attention.
        query: of the latest tokens, rotated.
        mask: `biased`.
        additive: whether that attention takes masks to add, and not bool ones.
    """
    if additive and mask is not None and mask.dtype == torch.bool:
        least = torch.finfo(query.dtype).min
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, least)
    with FewThreads(query.shape[2] * layer.keys.numel(), layer.keys.device):
        return call.attend(query, layer.keys, layer.values, mask)


def attend_stored(layer: PrunedLayer, call: AttentionCall, query: Tensor) -> Tensor:
    """Attention [B, q, H, d] over dense entries and stored ones; what then shall not stay dense is stored."""
    if layer.stored.asks:
        real = None if layer.valid is None else layer.valid[:, -1]
        layer.stored = layer.stored.asked(query, real)
    latest = Tile(layer.keys, layer.values, layer.visible(query.shape[2]))
    tiles = chain([latest], layer.stored.seen_by(query))
    read = layer.stored.nbytes_read // layer.keys.element_size()
    with FewThreads(query.shape[2] * read, layer.keys.device):
        output = attend_tiles(query, tiles, call.scale, call.softcap).transpose(1, 2)
        store(layer)
    return output


def attend_by_map(layer: PrunedLayer, attention: Attention) -> Tensor:
    """One token's attention [B, 1, H, d]; its map stays with `attention`, for the method that reads it."""
    with FewThreads(layer.keys.numel(), layer.keys.device):
        attention.map = attention.rows()
        return attend(attention.map, layer.values).transpose(1, 2)


def biased(visible: Tensor | None, layer: PrunedLayer, query: Tensor) -> Tensor | None:
    """What is `visible`, with what the method adds to the logits of entries: float [B, H, 1, T]."""
    bias = layer.state.get("bias")
    if bias is None:
        return visible
    later = layer.length - bias.shape[-1]
    bias = torch.nn.functional.pad(bias, (0, later)).repeat_interleave(query.shape[1] // bias.shape[1], dim=1)
    bias = bias.unsqueeze(2).to(query.dtype)
    return bias if visible is None else bias.masked_fill(~visible, -torch.inf)
