"""What one layer's cache holds, shown to a method, and replaced by what it keeps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tprune.core.cache import Evict, follows_entries, merge_rows, stack_rows
from tprune.core.stored import Encode, stack_stored, widened
from tprune.methods.attention import Attention
from tprune.methods.cache_view import LayerView
from tprune.models.cache_layer import PrunedLayer
from tprune.models.taps import AttentionCall


def prompt_views(
    place: int, depth: int, layer: PrunedLayer, call: AttentionCall, seeds: Tensor | None
) -> list[LayerView]:
    """One view of all rows where nothing is padding, else one of each row's real entries.

    Args:
        place, depth: which layer of how many.
        layer: its cache.
        call: the attention of the prompt, or of the queries that came last.
        seeds: int64 [B], of the rows.
    """
    if layer.valid is None:
        return [_view(place, depth, call, call.query, layer.keys, layer.values, layer.places, seeds)]
    before = layer.length - call.query.shape[2]
    views = []
    for row, column in enumerate(_columns(layer)):
        one, asked = slice(row, row + 1), column[column >= before] - before
        entries = (x[one, :, column] for x in (layer.keys, layer.values, layer.places))
        views.append(
            _view(
                place, depth, call, call.query[one, :, asked], *entries, None if seeds is None else seeds[one]
            )
        )
    return views


def _columns(layer: PrunedLayer) -> list[Tensor]:
    """The slots of each row's real entries."""
    return [row.nonzero().squeeze(1) for row in layer.valid]


def _view(
    place: int,
    depth: int,
    call: AttentionCall,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    seeds: Tensor | None,
) -> LayerView:
    attention = Attention(query, keys, values, call.scale, causal=True, softcap=call.softcap)
    return LayerView(place, depth, attention, keys, values, position, {}, seeds)


def hold(
    layer: PrunedLayer, views: Sequence[LayerView], edits: Sequence[Evict] | Sequence[Encode]
) -> tuple[float, int]:
    """Let `layer` hold what the edits leave of the views; -> how many entries stay, and of how many, over rows.

    Of entries in another form those count that would take the memory that is read of them.
    """
    if isinstance(edits[0], Encode):
        return _encode(layer, views, edits)
    kept, lengths = [edit.index.shape[-1] for edit in edits], [view.length for view in views]
    states = [
        {name: edit.apply(v) if follows_entries(v) else v for name, v in view.state.items()}
        for view, edit in zip(views, edits, strict=True)
    ]
    if layer.valid is None:
        view, edit = views[0], edits[0]
        keys, values = edit.carry(view.key), edit.carry(view.value)
        layer.hold(keys, values, edit.apply(view.position), states[0])
        return kept[0] * len(keys), lengths[0] * len(keys)
    if kept == lengths:
        state = _spread(layer, states)
        layer.hold(layer.keys, layer.values, layer.places, state, layer.valid)
        return sum(kept), sum(lengths)
    pairs = list(zip(views, edits, strict=True))
    keys = stack_rows([edit.carry(view.key) for view, edit in pairs], dim=2)
    values = stack_rows([edit.carry(view.value) for view, edit in pairs], dim=2)
    places = stack_rows([edit.apply(view.position) for view, edit in pairs])
    state = {name: merge_rows([state[name] for state in states]) for name in states[0]}
    valid = stack_rows([edit.index.new_ones(1, edit.index.shape[-1], dtype=torch.bool) for edit in edits])
    layer.hold(keys, values, places, state, valid)
    return sum(kept), sum(lengths)


def _encode(layer: PrunedLayer, views: Sequence[LayerView], edits: Sequence[Encode]) -> tuple[float, int]:
    """Let `layer` hold the latest entries as they are, and what is stored of the others."""
    latest = [
        tuple(x[:, :, view.length - edit.dense :].clone() for x in (view.key, view.value, view.position))
        for view, edit in zip(views, edits, strict=True)
    ]
    entry = sum(x[0, :, :1].nbytes for x in (views[0].key, views[0].value))
    stored = sum(edit.stored.nbytes_read for edit in edits) / entry
    if layer.valid is None:
        keys, values, places, valid = *latest[0], None
    else:
        keys, values = (stack_rows([row[x] for row in latest], dim=2) for x in (0, 1))
        places = stack_rows([row[2] for row in latest])
        valid = stack_rows([row[2].new_ones(1, row[2].shape[2], dtype=torch.bool) for row in latest])
    layer.hold(keys, values, places, {}, valid)
    layer.stored = stack_stored([edit.stored for edit in edits])
    layer.block = edits[0].block
    layer.window = None if layer.block or not layer.stored.grows else edits[0].dense
    if edits[0].codes is not None:
        codes = zip(*(edit.codes for edit in edits), strict=True)
        layer.codes = tuple(stack_rows(widened(rows), dim=2) for rows in codes)
        stored += sum(x.nbytes for edit in edits for x in edit.codes) / entry
    rows = len(keys) // len(edits)
    return stored + rows * sum(edit.dense for edit in edits), rows * sum(view.length for view in views)


def _spread(layer: PrunedLayer, states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The rows' states as the batch's where nothing left: numbers go back to their columns."""
    columns = _columns(layer)
    spread = [
        {
            name: v.new_zeros(*v.shape[:2], layer.length, *v.shape[3:]).index_copy(2, column, v)
            if follows_entries(v)
            else v
            for name, v in state.items()
        }
        for state, column in zip(states, columns, strict=True)
    ]
    return {name: merge_rows([state[name] for state in spread]) for name in spread[0]}
