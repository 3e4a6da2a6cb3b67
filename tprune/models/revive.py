"""Tokens that left inside a decoder come back, where what follows the prompt looks for them.

At every later call the sites choose anew among the tokens that the layers before them look at. What is chosen and was
never computed behind a site enters the layers there, beside the new tokens, as it was when it left; what is not chosen
is hidden from the attention of this call. So every layer computes every token once at most.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tprune.core.budget import Site
from tprune.core.ranks import rank
from tprune.core.reduction import gather_tokens
from tprune.core.select import mark, places
from tprune.errors import UserError
from tprune.methods.attention import Attention
from tprune.methods.tokens import TokenMethod
from tprune.models.cache import prunable_layers
from tprune.models.decoder import DecoderDriver
from tprune.models.deferred import Deferred, DeferringLayer, Slots
from tprune.models.layer_inputs import LayerInputs
from tprune.models.run import Inputs, Run
from tprune.models.taps import AttentionCall


def can_revive(model: nn.Module) -> bool:
    """Whether all layers keep all they have seen: what slides out of a window is not there to come back to."""
    config = model.config.get_text_config(decoder=True)
    return len(prunable_layers(config)) == config.num_hidden_layers


class Later:
    """One call behind a pruned prompt: what it looks at, and what it computes again on the way.

    Args:
        run: of the call.
        deferred: of its cache.
        inputs: of the model's layers.
        method: what chooses.

    Attributes:
        slots, valid: [B, R], which tokens the rows are, the new ones first, and which are no fillers.
        seen: bool [B, T], which of all T tokens the attention looks at.
        attention: of the layer that ran last, where a site follows.
    """

    def __init__(self, run: Run, deferred: Deferred, inputs: LayerInputs, method: TokenMethod):
        self.deferred, self.inputs, self.method = deferred, inputs, method
        self.new, self.total = run.length, run.track.length
        batch, device = len(deferred.prunable), deferred.prunable.device
        every = torch.arange(self.total, device=device).expand(batch, -1)
        mask = run.inputs.get("attention_mask")
        given = isinstance(mask, Tensor) and mask.dim() == 2
        self.real = mask.bool() if given else torch.ones_like(every, dtype=torch.bool)
        self.held: Slots = every, self.real
        self.slots, self.seen = every[:, -self.new :], self.real
        self.valid = torch.ones_like(self.slots, dtype=torch.bool)
        self.attention: Attention | None = None
        self.shared: Inputs = {}

    def enter(self, place: int, given: Inputs) -> None:
        """Change what the layer `place` is given, by name; at a site after a choice."""
        if place in self.deferred.counts:
            given["hidden_states"] = self._choose(place, given["hidden_states"])
            self._share(place, given)
        given.update(self.shared)

    def _choose(self, place: int, hidden: Tensor) -> Tensor:
        """What the coming layers look at; -> the rows that they are to compute."""
        new, old = self.new, self.seen.clone()
        old[:, -new:] = False
        last = self.real[:, -new:].cumsum(1).argmax(1, keepdim=True)
        worth = self.method.recall(self.attention, last)  # [B, keys of the layer before]
        slots, real = self.held
        score = worth.new_full((len(worth), self.total + 1), -torch.inf)
        score.scatter_(1, torch.where(real, slots, self.total), worth)
        candidates = self.real[:, :-new].sum(1)
        best = rank(score[:, :-1].masked_fill(~old, -torch.inf))
        self.seen = old & (best < self.deferred.count(place, candidates).unsqueeze(1))
        self.seen[:, -new:] = self.real[:, -new:]

        deferred = self.deferred.keep(self.slots[:, new:], self.valid[:, new:], hidden[:, new:])
        there = mark(*deferred.held[place], self.total)
        there[:, -new:] = True
        index, valid = places(self.seen & ~there)
        self.slots = torch.cat([self.slots[:, :new], index], dim=1)
        self.valid = torch.cat([self.valid[:, :new], valid], dim=1)
        self.deferred = deferred.hold(place, self.slots, self.valid)
        self.held = self.deferred.held[place]
        return torch.cat([hidden[:, :new], gather_tokens(deferred.hidden, index)], dim=1)

    def _share(self, place: int, given: Inputs) -> None:
        """Mask, positions and rotary embeddings for the layers up to the next site."""
        slots, real = self.held
        whole = slots.shape[1] == self.total and self.slots.shape[1] == self.new
        if whole and bool((self.seen == self.real).all()):
            self.shared = {}
            return
        looked_at = (self.seen.gather(1, slots) & real).unsqueeze(1)
        shown = looked_at & (slots.unsqueeze(1) <= self.slots.unsqueeze(2))  # [B, R, T]
        # A filler or padding sees itself: a row that sees nothing would be NaN.
        rows = shown.shape[1]
        shown[..., -rows:] |= torch.eye(rows, dtype=torch.bool, device=shown.device)
        self.shared = {"attention_mask": self.inputs.as_mask(shown.unsqueeze(1))}
        ids, rope = given.get("position_ids"), given.get("position_embeddings")
        if ids is None or rows == self.new:
            return
        before = self.deferred.ids.expand(len(slots), -1).gather(1, self.slots[:, self.new :])
        ids = torch.cat([ids[:, : self.new].expand(len(slots), -1), before], dim=1)
        self.shared["position_ids"] = ids
        if isinstance(rope, tuple):
            self.shared["position_embeddings"] = self.inputs.rotate(place, given["hidden_states"], ids)


class RevivingDriver(DecoderDriver):
    """A token method whose tokens may come back in later calls on the same cache, with their own positions."""

    def __init__(self, model: nn.Module, method: TokenMethod, *args: Any, **kwargs: Any):
        if kwargs.get("positions") == "compact":
            raise UserError(
                f"{method.id}: tokens that may come back keep their positions; use --positions original, or --set "
                "revive=false"
            )
        self.later: Later | None = None
        self.ids: Tensor | None = None
        super().__init__(model, method, *args, **kwargs)
        implementation = self.core.config._attn_implementation or "eager"
        if implementation not in ("sdpa", "eager"):
            self.remove()
            raise UserError(
                f"{method.id}: tokens come back beside the attention implementations sdpa and eager, not "
                f"{implementation}: load the model with attn_implementation='sdpa', or --set revive=false"
            )

    def _begin(self, module: nn.Module, args: tuple, kwargs: Inputs) -> None:
        """As ever; and what a later call may take up again."""
        self.later = None
        super()._begin(module, args, kwargs)
        if self.run is not None and not self.run.is_prompt:
            layer = self._first(self.run.inputs["past_key_values"])
            if layer is not None:
                self.later = Later(self.run, layer.stored, self.inputs, self.method)

    def _first(self, cache: Any) -> DeferringLayer | None:
        """The layer of a cache that knows what was deferred."""
        return next((x for x in cache.layers if isinstance(x, DeferringLayer) and x.stored is not None), None)

    def _end(self, module: nn.Module, args: tuple, output: Any) -> None:
        super()._end(module, args, output)
        self.later = None

    def _remembers(self, site: Site) -> bool:
        return True

    def _observe(self, call: AttentionCall) -> None:
        if self.later is None:
            super()._observe(call)
        elif self.place[call.module] + 1 in self.later.deferred.counts:
            self.later.attention = call.view()

    def _layer_hook(self, place: int) -> Callable[..., tuple[tuple, Inputs] | None]:
        prompt_hook = super()._layer_hook(place)

        def hook(module: nn.Module, args: tuple, kwargs: Inputs) -> tuple[tuple, Inputs] | None:
            if self.later is None:
                if place == 0:
                    self.ids = kwargs.get("position_ids")
                return prompt_hook(module, args, kwargs)
            names = self.names[module][: len(args)]
            given = dict(zip(names, args, strict=True)) | kwargs
            self.later.enter(place, given)
            return tuple(given.pop(name) for name in names), given

        return hook

    def _close(self, module: nn.Module, args: tuple, output: Any) -> Any:
        """After the last layer only the new tokens go on, and the cache has what was computed beside them."""
        if self.later is None:
            return super()._close(module, args, output)
        self._first(self.run.inputs["past_key_values"]).stored = self.later.deferred
        new = self.run.length
        if isinstance(output, tuple):
            return (output[0][:, :new], *output[1:])
        return output[:, :new]

    def _leave(self, module: nn.Module, args: tuple, output: Any) -> Any:
        """After a prompt its cache takes over what was left behind; the track then follows whole sequences."""
        run, output = self.run, super()._leave(module, args, output)
        cache = getattr(output, "past_key_values", None)
        if run is not None and run.is_prompt and cache is not None and run.track.layers:
            first = min(run.track.layers)
            cache.layers[first] = DeferringLayer.adopt(cache.layers[first], self._deferred(run))
            run.track.layers = {}
        return output

    def _deferred(self, run: Run) -> Deferred:
        prunable = run.prunable.sum(1)
        counts = {
            site.layer: torch.as_tensor(count, device=prunable.device).expand_as(prunable)
            for site, count in run.counts.items()
        }
        held = {
            layer: (
                kept.index,
                torch.ones_like(kept.index, dtype=torch.bool) if kept.valid is None else kept.valid,
            )
            for layer, kept in run.track.layers.items()
        }
        hidden = nn.functional.pad(run.full, (0, 0, 0, 1))
        return Deferred(hidden, self.ids, prunable, counts, held)
