"""Pruning a model's key-value cache while it runs, around ordinary calls of `model()` and `generate()`.

A pre-hook on the decoder takes over the cache it is called with; a tap on each full-attention module sees the queries
and runs the attention itself, with a mask for the entries that layer holds. The prompt attends to everything, then the
method prunes what it left in the cache; whatever comes later attends to what is there.
"""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from tprune.errors import UserError
from tprune.methods.attention import Attention
from tprune.methods.cache import CacheMethod
from tprune.methods.cache_view import Turning
from tprune.models.cache import attention_modules, take_over
from tprune.models.cache_layer import Owner, PrunedLayer, Turn
from tprune.models.claim import Uncopied
from tprune.models.held import attend_by_map, attend_held, attend_stored, biased
from tprune.models.key_values import KeyValues
from tprune.models.prompt_cache import hold, prompt_views
from tprune.models.room import Arrival, make_room
from tprune.models.rope import Rotation, rotary_embedding
from tprune.models.storing import encode, room
from tprune.models.taps import AttentionCall, Output, Tap

ASKED = 256
"""Of a cache that is pruned again, how many of the latest queries are kept to choose by."""


class Compression:
    """A cache method at work on a model, until `remove`.

    Args:
        model, method, keep, seed: what chooses which part of the entries stays.
        compact: whether positions close up behind entries that left.
        name: what is said to be at work; the method's id by default.

    Attributes:
        kept: per layer, how many entries the latest prompt left there and how many tokens it had, over rows.
    """

    chooses_in = "prune_prompt"
    """Where the method chooses what a prompt leaves."""

    def __init__(
        self,
        model: nn.Module,
        method: CacheMethod,
        keep: float,
        seed: int,
        compact: bool,
        name: str | None = None,
    ):
        self.base = model.get_decoder()
        self.method, self.keep, self.seed = method, keep, seed
        self.config = self.base.config
        self.places, self.kinds, self.modules = attention_modules(self.base)
        implementation = self.config._attn_implementation
        if implementation not in ("sdpa", "eager"):
            raise UserError(
                f"caches are pruned beside the attention implementations sdpa and eager, not {implementation}: "
                "load the model with attn_implementation='sdpa'"
            )
        self.additive = implementation == "eager"
        if compact and (method.per_head is not None or method.interval is not None):
            raise UserError(
                f"{method.id}: keys are turned to compact positions once, or as single entries leave; use --positions "
                "original with --set per_head=… or interval=…"
            )
        rotation = Rotation(model) if compact else None
        self.turns: dict[str | None, Turn | None] = {
            kind: None if rotation is None else partial(rotation.turn, layer_type=kind)
            for kind in set(self.kinds)
        }
        self.turning = turning_of(model, self.kinds, method.id) if "turning" in method.reads else None
        self.kept: dict[int, tuple[int, int]] = {}
        self.counts = lru_cache(maxsize=64)(lambda length: method.planned(length, len(self.places), keep))
        self.cache: Any = None
        self.waiting: list[Arrival] = []
        self.calls: dict[int, AttentionCall] = {}
        self.arriving: Tensor | None = None
        self.seeds: Tensor | None = None
        self.owner = Owner()
        watched = {place: self.modules[place] for place in self.places}
        reads = "inputs" in method.reads
        self.made = KeyValues(model, watched, self.kinds, method.id) if reads else None
        self.parameters = list(inspect.signature(self.base.forward).parameters)
        self.hooks = [
            self.base.register_forward_pre_hook(self._before, with_kwargs=True),
            self.base.register_forward_hook(self._after),
            Uncopied(model, method.id if name is None else name),
        ]
        self.tap = Tap([self.modules[place] for place in self.places], self._attend)

    def remove(self) -> None:
        """Take hooks and taps off; caches that have lost entries are refused from now on."""
        self.owner.active = False
        for hook in self.hooks:
            hook.remove()
        self.tap.remove()
        if self.made is not None:
            self.made.remove()

    def _before(self, base: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Take the cache over, and see which of the coming tokens are padding."""
        self.waiting = []
        kwargs = dict(zip(self.parameters, args, strict=False)) | kwargs
        use_cache = kwargs.get("use_cache")
        wanted = self.config.use_cache if use_cache is None else use_cache
        if kwargs.get("past_key_values") is None and not wanted:
            self.cache = None
            return (), kwargs
        self.cache = kwargs["past_key_values"] = take_over(
            kwargs.get("past_key_values"), self.config, self.owner
        )
        layers = [self.cache.layers[place] for place in self.places]
        tokens = kwargs.get("input_ids") if kwargs.get("input_ids") is not None else kwargs["inputs_embeds"]
        real = _padding(self.given_mask(kwargs), layers[0].seen, tokens.shape[1])
        self.arriving = None if real is None else _some(real[:, layers[0].seen :])
        for layer in layers:
            layer.arriving = self.arriving
            if real is not None and not layer.started and layer.valid is None and layer.length:
                layer.valid = _some(real[:, : layer.seen])
        if not layers[0].started and "seeds" in self.method.reads:
            self.seeds = _seeds(tokens, self.arriving, self.seed)
        if self.made is not None:
            self.made.begin(kwargs.get("position_ids"), tokens, layers[0].seen)
        return (), kwargs

    def given_mask(self, kwargs: dict[str, Any]) -> Any:
        """The padding mask of what is coming."""
        return kwargs.get("attention_mask")

    def _after(self, base: nn.Module, args: tuple, output: Any) -> None:
        """Choose what leaves for a generated token; let go of the cache; refuse models whose attention we never saw."""
        if self.waiting:
            self.make_room(self.waiting)
        cache, self.cache = self.cache, None
        if cache is not None:
            self.prune_again(cache)
        if cache is not None and not cache.layers[self.places[0]].started:
            raise UserError(
                f"the attention of {type(base).__name__} does not go through transformers' attention interface, so "
                "its cache cannot be pruned"
            )

    def _attend(self, call: AttentionCall) -> Output | None:
        """One layer's attention: the prompt's, a chunk's, or that of one generated token."""
        if self.cache is None:
            return None
        place = call.module.layer_idx
        layer: PrunedLayer = self.cache.layers[place]
        if not layer.started:
            output = call.attend(call.query, call.key, call.value, call.mask)
            self.prune_prompt(place, layer, call)
            return output
        if not layer.one_by_one:
            return self._answer(layer, call)
        if layer.coming is None:
            if layer.stores:
                return self._store(place, layer, call, slice(0, 1)), None
            arrival, output = self._arrive(place, layer, call, slice(0, 1))
            self.waiting.append(arrival)
            return output, None
        (keys, values), layer.coming = layer.coming, None
        outputs, token = [], 0
        while token < keys.shape[2]:
            some = slice(token, token + room(layer))
            real = None if self.arriving is None else self.arriving[:, some]
            layer.append(keys[:, :, some], values[:, :, some], real)
            token = some.stop
            if layer.stores:
                outputs.append(self._store(place, layer, call, some))
                continue
            arrival, output = self._arrive(place, layer, call, some)
            outputs.append(output)
            self.make_room([arrival])
        return torch.cat(outputs, dim=1), None

    def _store(self, place: int, layer: PrunedLayer, call: AttentionCall, some: slice) -> Tensor:
        """Attention of `some` of the coming tokens, which are appended; what must not stay dense is stored."""
        if self.made is not None:
            encode(layer, self.made.inputs(place)[:, some])
        return attend_stored(layer, call, call.query[:, :, some])

    def _answer(self, layer: PrunedLayer, call: AttentionCall) -> Output:
        """Attention of the latest tokens over what the layer holds, where nothing leaves for them."""
        if self.method.interval is not None:
            layer.asked = torch.cat([layer.asked, call.query], dim=2)[:, :, -ASKED:]
        if layer.stored is not None:
            return attend_stored(layer, call, call.query), None
        mask = biased(layer.visible(call.query.shape[2]), layer, call.query)
        return attend_held(layer, call, call.query, mask, self.additive)

    def _arrive(
        self, place: int, layer: PrunedLayer, call: AttentionCall, one: slice
    ) -> tuple[Arrival, Tensor]:
        """One token's attention [B, 1, H, d], where something will leave for it; its row is computed once for both."""
        query = call.query[:, :, one]
        mask = biased(layer.visible(1), layer, query)
        attention = Attention(query, layer.keys, layer.values, call.scale, bias=mask, softcap=call.softcap)
        if "attention" in self.method.reads:
            output = attend_by_map(layer, attention)
        else:
            output = attend_held(layer, call, query, mask, self.additive)[0]
        inputs = None if self.made is None else self.made.inputs(place)[:, one].squeeze(1)
        return Arrival(layer, attention, self.turns[self.kinds[place]], place, inputs), output

    def prune_prompt(self, place: int, layer: PrunedLayer, call: AttentionCall) -> None:
        """Prune what the prompt left: all rows at once, or row by row without their padding."""
        views = prompt_views(place, len(self.kinds), layer, call, self.seeds)
        if self.made is not None:
            self.made.show(place, views, layer.valid)
        if self.turning is not None:
            for view in views:
                view.turning = self.turning[self.kinds[place]]
        counts = [self.count(place, view.length) for view in views]
        edits = [self.method.start(view, count) for view, count in zip(views, counts, strict=True)]
        kept, lengths = hold(layer, views, edits)
        layer.started = True
        if self.method.interval is not None:
            layer.asked, layer.seeds = call.query[:, :, -ASKED:].clone(), self.seeds
            layer.budget = counts[0] if layer.valid is None else torch.tensor(counts)
            self.calls[place] = replace(call, query=None, key=None, value=None, mask=None)
        if self.method.evicts_while_decoding and kept < lengths:
            layer.limit = layer.length
        self.kept[place] = kept, lengths
        if self.turns[self.kinds[place]] is not None:
            layer.shift_to_compact(self.turns[self.kinds[place]])

    def prune_again(self, cache: DynamicCache) -> None:
        """Prune the layers that have grown by an interval, by what the latest queries look at."""
        if self.method.interval is None:
            return
        for place in self.places:
            layer: PrunedLayer = cache.layers[place]
            if layer.grown < self.method.interval or self.keep == 1:
                continue
            call = replace(self.calls[place], query=layer.asked[:, :, -layer.length :])
            views = prompt_views(place, len(self.kinds), layer, call, layer.seeds)
            budgets = [layer.budget] if isinstance(layer.budget, int) else layer.budget.tolist()
            budgets = [min(count, view.length) for count, view in zip(budgets, views, strict=True)]
            hold(layer, views, [self.method.start(*pair) for pair in zip(views, budgets, strict=True)])

    def make_room(self, arrivals: Sequence[Arrival]) -> None:
        """One token came in each of some layers: let the method choose what leaves for it."""
        make_room(self.method, arrivals)

    def count(self, place: int, length: int) -> int:
        """How many entries of a prompt of `length` tokens a layer keeps; errors as `CacheMethod.planned`."""
        return self.counts(length)[self.places.index(place)]


def turning_of(model: nn.Module, kinds: Sequence[str | None], method: str) -> dict[str | None, Turning]:
    """How each kind of layer rotates queries and keys.

    Raises:
        UserError: it cannot be had apart from the model's forward.
    """
    if rotary_embedding(model) is None:
        return dict.fromkeys(kinds, Turning(lambda x, shift: x))
    rotation = Rotation(model, method, "choose another method")
    return {kind: Turning(partial(rotation.turn, layer_type=kind)) for kind in set(kinds)}


def _padding(mask: Any, seen: int, coming: int) -> Tensor | None:
    """The 2-D mask as bool [B, seen + coming]; None without one."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        raise UserError(
            "a pruned cache makes its own masks: pass a 2-D attention_mask over all tokens, or none"
        )
    if mask.shape[1] != seen + coming:
        raise UserError(
            f"attention_mask has {mask.shape[1]} columns; expected {seen + coming}, one per token so far, kept or not"
        )
    return mask.bool()


def _some(real: Tensor) -> Tensor | None:
    """None where nothing is padding."""
    return None if bool(real.all()) else real


def _seeds(tokens: Tensor, real: Tensor | None, seed: int) -> Tensor:
    """int64 [B] from each row's own tokens, so that equal samples draw equally in any batch."""
    rows = tokens.detach().cpu()
    kept = [row if real is None else row[real[place].cpu()] for place, row in enumerate(rows)]
    bits = [row.contiguous().view(torch.uint8).numpy().tobytes() for row in kept]
    return torch.tensor([zlib.crc32(row, seed & 0xFFFFFFFF) for row in bits])
