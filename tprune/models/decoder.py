"""Tokens leave before a decoder layer, or before the whole decoder, while a transformers model runs as it always does.

Nothing is forked. A hook on the model's entrance learns which tokens are prunable; one on the decoder shortens the
sequence before the first layer (site `PROJECTOR`); one on every layer shortens it there, and from then on hands on
the mask, the positions and the rotary embeddings of the tokens that are left. Each layer's cache then has its own
length, and a record of what is left (`Track`) travels with the cache, so that decode steps see the right mask and
the right next position, in `generate` and in a loop of one's own. What leaves is decided once, when the prompt comes
in; tokens that come later all stay. The decoder's output is filled up to its full length again (zeros where tokens
left), so that `logits[:, i]` is still about token i.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from tprune.core.budget import PROJECTOR, Site, Stage
from tprune.core.reduction import Reduction
from tprune.errors import UserError
from tprune.methods.token_view import TokenView
from tprune.methods.tokens import Shape, TokenMethod
from tprune.models.blocks import find_decoder
from tprune.models.claim import Uncopied
from tprune.models.deepstack import Deepstack
from tprune.models.entrance import Entrance, fill_up, place_behind, shorten
from tprune.models.episode import Episode
from tprune.models.generating import Generating
from tprune.models.layer_inputs import LayerInputs, check_positions
from tprune.models.passing import Passing, passed
from tprune.models.run import Inputs, Run, Tally, here, planned, real_tokens
from tprune.models.signals import Signals, attention_of
from tprune.models.taps import AttentionCall, Tap
from tprune.models.track import Kept, Track, check_cache, restored


class DecoderDriver:
    """A token method at work before or inside a decoder, until `remove`.

    A list put in `trace` is filled by the next prompts, as `Run.trace` says.

    Args:
        model: a transformers model with a decoder.
        method: what chooses.
        prunable_of: from the inputs of a prompt, by name, to bool [B, N]; None where nothing is to be pruned.
        stages_of: where tokens leave a row with so many prunable tokens, and how many are left.
        positions: "original" keeps the position ids of the tokens that are left, "compact" renumbers them; "closed"
            (`TokenMethod.positions`) lets what follows an image move up.
        positions_inside: the same for what leaves inside the decoder; None: as `positions`.
        seeds_of: from the inputs to a seed per row, int64 [B]; called where the method draws at random.
        entrance: what happens before the first layer, for methods with the site `PROJECTOR`.
        images: tells of a prompt's images, where the method reads that inside the decoder (`Signals`).
        outer: the module whose call carries the whole prompt; the decoder itself by default.
        check_later: called with the inputs of every later call on a cache; raises UserError for what cannot be right.
    """

    def __init__(
        self,
        model: nn.Module,
        method: TokenMethod,
        prunable_of: Callable[[Inputs], Tensor | None],
        stages_of: Callable[[int], Sequence[Stage]],
        *,
        positions: str = "original",
        positions_inside: str | None = None,
        seeds_of: Callable[[Inputs], Tensor] | None = None,
        entrance: Entrance | None = None,
        images: Any = None,
        outer: nn.Module | None = None,
        check_later: Callable[[Inputs], None] | None = None,
    ):
        self.model = model
        self.method, self.prunable_of, self.stages_of = method, prunable_of, stages_of
        self.seeds_of, self.entrance = seeds_of, entrance
        self.check_later = check_later
        self.hides, self.uniform = method.hides(), method.uniform()
        decoder = find_decoder(model)
        self.core, self.layers = decoder.core, decoder.blocks
        self.rejoin = method.rejoins(Shape(len(self.layers), 0))
        self.outer = self.core if outer is None else outer
        self.positions = check_positions(positions, self.core)
        self.inputs = LayerInputs(self.core, positions_inside or positions)
        self.signals = Signals(self.core, self.layers, self.inputs, images)
        self.tally, self.episode = Tally(len(self.layers)), Episode(method, len(self.layers))
        self.run: Run | None = None
        self.trace: list[tuple[Site, Tensor]] | None = None
        self.handles = [
            self.outer.register_forward_pre_hook(self._begin, with_kwargs=True),
            self.core.register_forward_pre_hook(self._enter, with_kwargs=True),
            self.core.register_forward_hook(self._leave),
            self.outer.register_forward_hook(self._end, always_call=True),
            self.layers[-1].register_forward_hook(self._close),
        ]
        self.names = {
            module: list(signature(module.forward).parameters) for module in [self.outer, self.core]
        }
        for place, layer in enumerate(self.layers):
            self.names[layer] = list(signature(layer.forward).parameters)
            self.handles.append(layer.register_forward_pre_hook(self._layer_hook(place), with_kwargs=True))
        if "attention" in method.reads:
            self.place = {attention_of(layer): place for place, layer in enumerate(self.layers)}
            self.handles.append(Tap(self.place, self._observe))
        self.handles += self.signals.watch(model, method.reads, lambda: self.run)
        self.handles.append(Deepstack(self.core, lambda: self.run, len(self.layers)))
        if method.routes:
            self.handles.append(Passing(self.core, self.layers, lambda: self.run))
        self.generating = Generating(model, method, len(self.layers))
        self.handles += [self.generating, Uncopied(model, method.id)]

    def remove(self) -> None:
        """Take all hooks out again."""
        for handle in self.handles:
            handle.remove()
        self.handles, self.run = [], None

    def _check(self, run: Run) -> None:
        """Refuse sites that a decoder does not have."""
        for site in run.counts:
            first = site.layer == 0 and "attention" in self.method.reads and self.rejoin is None
            if site.between or first or (site == PROJECTOR and self.entrance is None):
                raise UserError(
                    f"{self.method.id} lets tokens leave at '{site}', which a decoder does not have"
                )

    def _begin(self, module: nn.Module, args: tuple, kwargs: Inputs) -> None:
        """The model is called: a prompt to prune, a continuation of a pruned one, or nothing of ours."""
        inputs = dict(zip(self.names[module], args, strict=False)) | kwargs
        tokens = inputs.get("input_ids")
        tokens = inputs.get("inputs_embeds") if tokens is None else tokens
        cache = inputs.get("past_key_values")
        start = 0 if cache is None else cache.get_seq_length()
        self.run = None
        if start:
            if self.check_later is not None:
                self.check_later(inputs)
            track = getattr(cache, "tprune_track", None)
            if track is not None:
                track.check(start, tokens.shape[1], inputs)
                self.run = Run(inputs, track, track.length, tokens.shape[1])
                track.extend(tokens.shape[1])
            return
        prunable = self.prunable_of(inputs)
        if prunable is None:
            return
        prunable = self.generating.prompt(prunable)
        counts = prunable.sum(1).tolist()
        if not any(counts):
            return
        check_cache(cache)
        real = self._real(inputs, prunable)
        track = Track(tokens.shape[1], real.sum(1), prunable=prunable, images=max(counts))
        run = Run(inputs, track, 0, tokens.shape[1], prunable, real)
        run.memory["episode"] = self.episode.memory
        run.trace = self.trace
        stages = [self.stages_of(count) for count in counts]
        run.counts, run.memory["passed"] = planned(stages, counts), passed(stages)
        self._check(run)
        run.seeds = self.seeds_of(inputs) if self.seeds_of and "seeds" in self.method.reads else None
        self.run = run

    def _real(self, inputs: Inputs, prunable: Tensor) -> Tensor:
        """What the method takes for the prompt: no padding, nothing generated; bool like `prunable` [B, N]."""
        return self.generating.prompt(real_tokens(inputs, prunable))

    def _end(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.run = None

    def _enter(self, module: nn.Module, args: tuple, kwargs: Inputs) -> tuple[tuple, Inputs] | None:
        """Shorten the sequence before the first layer, or place a continuation behind a shortened one."""
        run = self.run
        if run is None:
            return None
        given = dict(zip(self.names[module], args, strict=False)) | kwargs
        if run.is_prompt and PROJECTOR in run.counts:
            shorten(run, given, self.entrance, self.inputs, self.positions)
        elif run.track.entry is not None:
            place_behind(run, given, run.track.entry, self.inputs, self.positions)
        if run.is_prompt and "embeddings" in self.method.reads:
            run.embeddings = given["inputs_embeds"]
        mask = given.get("attention_mask")
        run.padding = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
        first = run.track.layers.get(0)
        if first is not None:
            place_behind(run, given, first, self.inputs, self.positions)
        return ((), given) if run.track.entry is not None or first is not None else None

    def _close(self, module: nn.Module, args: tuple, output: Any) -> Any:
        """After the last layer: as many tokens as entered the first."""
        run = self.run
        if run is None or not run.is_prompt or not run.track.layers:
            return output
        full = run.full if self.method.returns else None
        return fill_up(output, run.track.at(len(self.layers)), run.track.entered, full)

    def _leave(self, module: nn.Module, args: tuple, output: Any) -> Any:
        """After the decoder: as many tokens as the caller gave; and the record travels with the cache."""
        run = self.run
        if run is None or not run.is_prompt:
            return output
        self.tally.add(run)
        track, cache = run.track, getattr(output, "past_key_values", None)
        if cache is not None:
            track.join(cache, self.uniform)
        return output if track.entry is None else fill_up(output, track.entry, run.length)

    def _observe(self, call: AttentionCall) -> None:
        """Keep the attention of a layer that a site follows; show that of a layer the method watches."""
        run, place = self.run, self.place[call.module]
        if run is None:
            return
        self.episode.see(run, place, call)
        if run.is_prompt and Site(place + 1) in run.counts:
            run.attention = call.view()

    def _layer_hook(self, place: int) -> Callable[..., tuple[tuple, Inputs] | None]:
        site = Site(place)

        def hook(module: nn.Module, args: tuple, kwargs: Inputs) -> tuple[tuple, Inputs] | None:
            run = self.run
            if run is None:
                return None
            names = self.names[module][: len(args)]
            given = dict(zip(names, args, strict=True)) | kwargs
            counted = run.is_prompt and site in run.counts
            if (run.is_prompt and site == self.rejoin) or (counted and self.method.returns):
                given["hidden_states"] = self._come_back(run, site, given["hidden_states"])
            if counted and site != self.rejoin:
                given["hidden_states"] = self._reduce(run, site, given, run.counts[site])
            kept = run.track.at(place)
            if kept is not None:
                self.inputs.fit(run, place, kept, given)
            if run.is_prompt and "before" in self.method.reads:
                run.before = dict(given)
            return None if kept is None else (tuple(given.pop(name) for name in names), given)

        return hook

    def _reduce(self, run: Run, site: Site, given: Inputs, count: int | Tensor) -> Tensor:
        """Let the method choose before a layer; -> the hidden states that are left."""
        view, slots = self._view(run, site, given)
        reduction = self.method.reduce(site, view, count, run.memory)
        return self._take(run, site, view, slots, reduction)

    def _view(self, run: Run, site: Site, given: Inputs) -> tuple[TokenView, Tensor]:
        """The tokens before a layer, and their slots [B, N] in the sequence that entered."""
        before, hidden = run.track.at(site.layer), given["hidden_states"]
        slots = torch.arange(hidden.shape[1], device=hidden.device).expand(hidden.shape[:2])
        slots = slots if before is None else before.index
        valid = run.track.valid(site.layer, slots)
        position = slots if run.track.entry is None else run.track.entry.index.gather(1, slots)
        view = TokenView(
            hidden,
            here(run.prunable, position, valid),
            depth=len(self.layers),
            whole=False,
            position=position,
            attention=run.attention,
            seeds=run.seeds,
            real=here(run.real, position, valid),
            signals=self.signals.at(run, site.layer, given, slots, position),
        )
        return view, slots

    def _come_back(self, run: Run, site: Site, hidden: Tensor) -> Tensor:
        """All tokens that left inside the decoder are there again, with the values they left with."""
        before = run.track.at(site.layer)
        if before is None:
            return hidden
        slots = torch.arange(run.full.shape[1], device=hidden.device).expand(run.full.shape[:2])
        run.neurons, run.sublayers = None, {}
        run.track.layers[site.layer] = Kept.of(slots, None, run.track.entered)
        if run.trace is not None:
            run.trace.append((site, slots if run.track.entry is None else run.track.entry.index))
        return restored(hidden, before, run.full)

    def _remembers(self, site: Site) -> bool:
        """Whether what leaves at `site` is kept as it was (`Run.full`)."""
        return self.method.returns or (self.rejoin is not None and site < self.rejoin)

    def _take(
        self, run: Run, site: Site, view: TokenView, slots: Tensor, reduction: Reduction | None
    ) -> Tensor:
        """Do what was chosen before a layer; -> the hidden states that are left."""
        run.attention, run.neurons, run.sublayers = None, None, {}
        if reduction is None:
            return view.hidden
        before, valid = run.track.at(site.layer), run.track.valid(site.layer, slots)
        if run.trace is not None:
            run.note(site, view.position, reduction.heirs(view.position), valid)
        left = reduction.valid
        if valid is not None:
            still = valid.gather(1, reduction.index)
            left = still if left is None else left & still
        if self.hides:
            run.track.layers[site.layer] = Kept.hiding(slots, reduction.index, left, run.track.entered)
            return view.hidden
        if self._remembers(site):
            run.full = view.hidden if run.full is None else restored(view.hidden, before, run.full)
        ascending = reduction.drops_only and (before is None or before.order is None)
        run.track.layers[site.layer] = Kept.of(
            slots.gather(1, reduction.index), left, run.track.entered, ascending
        )
        return reduction.apply(view.hidden)
