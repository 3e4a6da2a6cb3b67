"""One forward of a model whose tokens leave, and the count of what left."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tprune.core.budget import Site, Stage
from tprune.core.reduction import follow
from tprune.methods.attention import Attention
from tprune.models.track import Track

Inputs = dict[str, Any]


@dataclass(eq=False)
class Run:
    """One forward of the model.

    Attributes:
        inputs: what the model was called with, by name.
        track: what is left of the sequence.
        start: how many tokens came before this forward.
        length: how many tokens this forward brings.
        prunable, real: bool [B, N]; None unless this is a prompt that is pruned.
        counts: at each site where tokens leave, how many prunable ones are left: one number, or int64 [B] on the CPU
            where rows differ.
        seeds: int64 [B], for methods that draw at random, or None.
        memory: what the method carries from site to site.
        attention: of the layer that ran last, where the next one is a site.
        embeddings: [B, T, D], what entered the decoder; None where the method does not ask.
        before: what the layer that ran last was given, by name; None where the method does not ask.
        neurons: [B, T, F], what the layer that ran last fed into the last projection of its MLP, where a site follows.
        sublayers: per layer since the last site, what went into its attention and its MLP and what came out.
        padding: the decoder's padding mask [B, T] (nonzero: real), for the tokens that entered it, or None.
        heard: what tokens behind the prompt see of it (`models.beside`); None where the method has none.
        full: [B, T, D], all tokens that entered, each as it was when it left or last at a site; where they come back.
        trace: at every site so far, which token stands for each of the caller's (`core.reduction.follow`), int64
            [B, N]; None where nobody asked.
        fitted: masks, positions and rotary embeddings of the tokens that are left, shared by the layers that see them.
    """

    inputs: Inputs
    track: Track
    start: int
    length: int
    prunable: Tensor | None = None
    real: Tensor | None = None
    counts: dict[Site, int | Tensor] = field(default_factory=dict)
    seeds: Tensor | None = None
    memory: dict[str, Any] = field(default_factory=dict)
    attention: Attention | None = None
    embeddings: Tensor | None = None
    before: Inputs | None = None
    neurons: Tensor | None = None
    sublayers: dict[int, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)
    padding: Tensor | None = None
    heard: Any = None
    full: Tensor | None = None
    trace: list[tuple[Site, Tensor]] | None = None
    fitted: dict[Any, Any] = field(default_factory=dict)

    @property
    def is_prompt(self) -> bool:
        """Whether tokens leave in this forward."""
        return self.prunable is not None

    def note(self, site: Site, place: Tensor, heirs: Tensor, valid: Tensor | None = None) -> None:
        """Keep in the trace what became at `site` of the tokens at `place`, as `follow` wants them."""
        every = torch.arange(self.length, device=place.device).expand(place.shape[0], -1)
        before = self.trace[-1][1] if self.trace else every
        self.trace.append((site, follow(before, place, heirs, valid)))

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What `make` gives at the first call with this key."""
        if key not in self.fitted:
            self.fitted[key] = make()
        return self.fitted[key]


@dataclass(eq=False)
class Tally:
    """How many prunable tokens entered each decoder layer, over all prompts since the start.

    Attributes:
        prompts: how many.
        tokens: prunable tokens in all of them.
        entering: int64 [depth].
        last: of the last batch the slots that are left at the end [B, K], which are real, and the length N.
    """

    depth: int
    prompts: int = 0
    tokens: int | Tensor = 0
    entering: Tensor | None = None
    last: tuple[Tensor, Tensor | None, int] | None = None

    def add(self, run: Run) -> None:
        """Count one prompt's forward."""
        track, alive = run.track, entered(run.prunable, run.track)
        per_layer, counts = [], alive.sum(1)
        for layer in range(self.depth):
            if layer in track.layers:
                kept = track.layers[layer]
                counts = here(alive, kept.index, kept.valid).sum(1)
            entering = counts if layer not in track.passes else counts * ~track.passes[layer][0]
            per_layer.append(entering.sum())
        self.count(torch.stack(per_layer), run.prunable)
        final = track.final()
        self.last = None if final is None else (*final, run.length)

    def count(self, entering: Tensor, prunable: Tensor) -> None:
        """Add what entered each layer, int64 [depth], of the prompts' `prunable` tokens, bool [B, N]."""
        self.entering = entering if self.entering is None else self.entering + entering
        self.prompts += len(prunable)
        self.tokens += prunable.sum()

    @property
    def owner(self) -> Tensor | None:
        """Of the last batch, int64 [B, N]: a token's place among those that are left at the end, or -1."""
        if self.last is None:
            return None
        index, valid, length = self.last
        slots = torch.arange(index.shape[1], device=index.device).expand_as(index)
        owner = index.new_full((index.shape[0], length + 1), -1)
        if valid is not None:
            index = torch.where(valid, index, length)
        return owner.scatter(1, index, slots)[:, :-1]


def planned(stages: Sequence[Sequence[Stage]], tokens: Sequence[int]) -> dict[Site, int | Tensor]:
    """How many prunable tokens are left after each site, for rows of such numbers of tokens, and stages in order; of
    what is skipped none leave.
    """
    stages = [[stage for stage in row if not stage.skips] for row in stages]
    counts: dict[Site, int | Tensor] = {}
    for site in sorted({stage.site for row in stages for stage in row}):
        left = [
            next((stage.count for stage in reversed(row) if stage.site <= site), alive)
            for row, alive in zip(stages, tokens, strict=True)
        ]
        counts[site] = left[0] if len(set(left)) == 1 else torch.tensor(left)
    return counts


def real_tokens(inputs: Inputs, prunable: Tensor) -> Tensor:
    """Which tokens of the prompt are no padding, bool like `prunable` [B, N]."""
    mask = inputs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return mask[:, -prunable.shape[1] :].bool()
    return torch.ones_like(prunable)


def here(marked: Tensor, slots: Tensor, valid: Tensor | None) -> Tensor:
    """`marked` [B, N] at `slots` [B, T], False at fillers."""
    found = marked.gather(1, slots)
    return found if valid is None else found & valid


def entered(marked: Tensor, track: Track) -> Tensor:
    """`marked` [B, N], of the caller's sequence, for the tokens that entered the decoder."""
    return marked if track.entry is None else here(marked, track.entry.index, track.entry.valid)
