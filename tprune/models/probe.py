"""Asking a model what it would need of the text so far, and pruning its cache by the answer.

Behind the prompt and then at equal steps an instruction goes through the model on a fork of its cache, which is
forgotten: no entry, position or random draw of it stays. What its last token looks at decides what leaves.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from tprune.errors import UserError
from tprune.methods.attention import Attention
from tprune.methods.cache import CacheMethod
from tprune.methods.cache_view import LayerView
from tprune.models.cache import fork
from tprune.models.cache_layer import PrunedLayer
from tprune.models.compress import Compression
from tprune.models.held import attend_held
from tprune.models.prompt_cache import hold, prompt_views
from tprune.models.taps import AttentionCall, Output


class Probing(Compression):
    """A cache method with a `probe` at work on a model, until `remove`.

    Its budget is a fraction of all that was seen, so that the cache grows with the text.

    Args:
        model, method, keep, seed, compact: as for `Compression`.
        tokenizer: of the model.
    """

    chooses_in = "prune_again"

    def __init__(
        self, model: nn.Module, method: CacheMethod, keep: float, seed: int, compact: bool, tokenizer: Any
    ):
        probe = method.probe()
        if tokenizer is None:
            raise UserError(
                f"{method.id} reads text: pass the model's tokenizer (tokenizer=…), or add its files"
            )
        if compact:
            raise UserError(
                f"{method.id}: entries leave again and again, and keys are turned to compact positions once; use "
                "--positions original"
            )

        def ids(text: str) -> list[int]:
            return tokenizer(text, add_special_tokens=False)["input_ids"]

        self.instruction, self.every = torch.tensor([ids(probe.instruction)]), probe.every
        if self.instruction.shape[1] == 0:
            raise UserError(
                f"--set instruction={probe.instruction}: {method.id} has nothing to ask; give some words"
            )
        words = (space + word for word in probe.words if word for space in ("", " "))
        self.begins = torch.tensor([ids(word)[0] for word in words])
        self.ends = torch.tensor([ids(text)[-1] for text in probe.breaks])
        opening = ids(probe.opening)
        self.opening = opening[0] if len(opening) == 1 else None
        self.heard: dict[int, Tensor] = {}
        self.asking: DynamicCache | None = None
        super().__init__(model, method, keep, seed, False)

    def _before(self, base: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Note which tokens come, unless they are the probe's."""
        if self.asking is not None:
            return args, kwargs
        args, kwargs = super()._before(base, args, kwargs)
        if self.cache is None:
            return args, kwargs
        tokens, first = kwargs.get("input_ids"), self.cache.layers[self.places[0]]
        if tokens is None or (first.tokens is None and first.seen):
            raise UserError(
                f"{self.method.id} reads text: pass input_ids, and all of them from the first token on"
            )
        if self.arriving is not None:
            tokens = tokens.masked_fill(~self.arriving, -1)
        first.tokens = tokens if first.tokens is None else torch.cat([first.tokens, tokens], dim=1)
        return args, kwargs

    def _after(self, base: nn.Module, args: tuple, output: Any) -> None:
        if self.asking is None:
            super()._after(base, args, output)

    def _attend(self, call: AttentionCall) -> Output | None:
        if self.asking is None:
            return super()._attend(call)
        layer: PrunedLayer = self.asking.layers[call.module.layer_idx]
        mask = layer.visible(call.query.shape[2])
        attention = Attention(
            call.query, layer.keys, layer.values, call.scale, bias=mask, softcap=call.softcap
        )
        paid = attention.rows(slice(-1, None)).squeeze(2)
        self.heard[call.module.layer_idx] = paid[..., : layer.length - call.query.shape[2]]
        return attend_held(layer, call, call.query, mask, self.additive)

    def prune_prompt(self, place: int, layer: PrunedLayer, call: AttentionCall) -> None:
        """Not yet: the probe goes through all layers first."""
        self.calls[place] = replace(call, query=None, key=None, value=None, mask=None)

    def prune_again(self, cache: DynamicCache) -> None:
        """Ask, behind a prompt or where the cache has grown by a step, and prune every layer."""
        layers: list[PrunedLayer] = [cache.layers[place] for place in self.places]
        tokens, started = layers[0].tokens, layers[0].started
        if started and (layers[0].grown < self.every or self.keep == 1):
            return
        heard, passages = self._ask(cache, tokens), self._passages(tokens)
        for place, layer in zip(self.places, layers, strict=True):
            views = self._views(place, layer, heard[place], passages)
            seen = [tokens.shape[1]] if layer.valid is None else (tokens >= 0).sum(1).tolist()
            counts = [min(self.count(place, n), view.length) for n, view in zip(seen, views, strict=True)]
            kept = hold(layer, views, [self.method.start(*pair) for pair in zip(views, counts, strict=True)])
            layer.started = True
            if not started:
                self.kept[place] = kept

    def _ask(self, cache: DynamicCache, tokens: Tensor) -> dict[int, Tensor]:
        """What the instruction's last token pays to the entries of every layer that can be pruned: [B, H, T]."""
        self.asking = fork(cache)
        for layer in self.asking.layers:
            if isinstance(layer, PrunedLayer):
                layer.arriving = None
        instruction, real = self.instruction.to(tokens.device).expand(len(tokens), -1), tokens >= 0
        given = {
            "input_ids": instruction,
            "attention_mask": torch.cat([real, torch.ones_like(instruction, dtype=torch.bool)], dim=1).long(),
            "position_ids": real.sum(1, keepdim=True)
            + torch.arange(instruction.shape[1], device=tokens.device),
        }
        try:
            with torch.no_grad():
                self.base(**given, past_key_values=self.asking, use_cache=True)
            return self.heard
        finally:
            self.asking, self.heard = None, {}

    def _passages(self, tokens: Tensor) -> Tensor:
        """In which passage every real token stands, by its place among them: int64 [B, N]; -1 up to the opening."""
        tokens = tokens.gather(1, (tokens < 0).int().argsort(dim=1, stable=True))
        begins = torch.isin(tokens, self.begins.to(tokens.device))
        begins[:, 1:] |= torch.isin(tokens[:, :-1], self.ends.to(tokens.device))
        passage = begins.cumsum(1)
        if self.opening is None:
            return passage
        ahead = (tokens == self.opening).flip(1).cumsum(1).flip(1)
        return torch.where(ahead > 0, -1, passage)

    def _views(self, place: int, layer: PrunedLayer, heard: Tensor, passages: Tensor) -> list[LayerView]:
        """A layer's cache as the method sees it, with what was heard of its entries."""
        call = replace(self.calls[place], query=layer.keys[:, :, :0])
        views = prompt_views(place, len(self.kinds), layer, call, None)
        for row, view in enumerate(views):
            rows = slice(None) if layer.valid is None else slice(row, row + 1)
            view.probed = heard[rows] if layer.valid is None else heard[rows][:, :, layer.valid[row]]
            # All heads hold the same entries.
            view.passage = passages[rows].gather(1, view.position[:, 0])
        return views
