"""Dense entries of a cache that join those which are held in another form, one by one or a block at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from tprune.models.cache_layer import PrunedLayer


def room(layer: PrunedLayer) -> int:
    """How many tokens may come at once: what they push out of `keys` leaves at a time."""
    if layer.block is None:
        return 1
    return layer.block - (layer.length if layer.valid is None else int(layer.valid.sum(1).max()))


def encode(layer: PrunedLayer, inputs: Tensor) -> None:
    """Note what is stored of the latest entries, by the inputs [B, q, D] that they were made of."""
    if layer.codes is not None:
        latest = layer.stored.codes(inputs)
        layer.codes = tuple(torch.cat(pair, dim=2) for pair in zip(layer.codes, latest, strict=True))


def store(layer: PrunedLayer) -> None:
    """What shall not stay dense any longer joins what is stored."""
    if layer.window is not None:
        _store_oldest(layer, layer.window)
    elif layer.block is not None:
        _store_block(layer, layer.block)


def _store_oldest(layer: PrunedLayer, window: int) -> None:
    """What has `window` later real entries behind it: of a row with padding one entry at most, as room was for one."""
    if layer.valid is None:
        count = layer.length - window
        if count > 0:
            layer.stored = layer.stored.absorb(layer.keys[:, :, :count], layer.values[:, :, :count])
            layer.take(lambda x: x[:, :, count:])
        return
    counts = layer.valid.sum(1).tolist()
    _fillers_first(layer)
    if max(counts) > window:
        oldest = slice(layer.length - window - 1, layer.length - window)
        full = torch.tensor([count > window for count in counts])
        layer.stored = layer.stored.absorb(layer.keys[:, :, oldest], layer.values[:, :, oldest], full)
    most = min(max(counts), window)
    layer.take(lambda x: x[:, :, x.shape[2] - most :])


def _store_block(layer: PrunedLayer, block: int) -> None:
    """All entries of the rows that hold a whole block."""
    if layer.valid is None:
        if layer.length == block:
            layer.stored = layer.stored.absorb(*(layer.codes or (layer.keys, layer.values)))
            layer.take(lambda x: x[:, :, block:])
        return
    full = layer.valid.sum(1) == block
    if not bool(full.any()):
        return
    _fillers_first(layer)
    entries = layer.codes or (layer.keys, layer.values)
    layer.stored = layer.stored.absorb(*(x[:, :, -block:] for x in entries), full)
    layer.valid = layer.valid & ~full.unsqueeze(1)
    most = int(layer.valid.sum(1).max())
    layer.take(lambda x: x[:, :, x.shape[2] - most :])


def _fillers_first(layer: PrunedLayer) -> None:
    """The real entries of every row stand at the end, so that as many of each row can leave or stay."""
    order = layer.valid.long().argsort(dim=1, stable=True)
    layer.take(lambda x: _gathered(x, order))


def _gathered(x: Tensor, order: Tensor) -> Tensor:
    """[B, A, T, ...] with the entries of every row in `order`, int64 [B, T]."""
    index = order.view(len(order), 1, -1, *[1] * (x.dim() - 3))
    return x.gather(2, index.expand_as(x))
