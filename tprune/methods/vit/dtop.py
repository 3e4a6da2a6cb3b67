"""DToP segments with early exits: tokens whose class is certain halfway leave with it, the others go on.

Heads after some blocks name every patch. What they are sure of is written into the map and leaves, but for the few
surest tokens of every class, which go on to stand for it. The last head names what is left.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch.func import functional_call

from tprune.core import select
from tprune.core.budget import ratio_stages
from tprune.core.reduction import Reduction
from tprune.errors import UserError
from tprune.methods.base import Paper, param
from tprune.methods.tokens import TokenMethod
from tprune.methods.vit._dtop_fit import Exits
from tprune.methods.vit._dtop_heads import likelihood, of

DEPTH = 12
"""The paper's ViT-B."""


@dataclass(frozen=True)
class DToP(TokenMethod):
    """After two blocks: confident tokens exit with their prediction; all are back after the last one."""

    paper = Paper(
        title="Dynamic Token Pruning in Plain Vision Transformers for Semantic Segmentation",
        venue="ICCV",
        year=2023,
        arxiv="2308.01045",
        code="zbwxp/Dynamic-Token-Pruning",
        checked="code",
        notes="Heads learn from the class that covers most of a patch, the authors' from pixels; all tokens are there "
        "meanwhile, as in the authors' base models, without the 40,000 steps in which some leave; no dropout, and a "
        "cosine where their learning rate falls by a polynomial. --keep with heads that have met no budget ranks "
        "tokens by confidence. Its result is a map of patches, so that no class of digits-vit ranks it beside random.",
    )
    kind = "trained"
    needs_image = True
    reads = ()
    native = ("threshold",)
    under_keep: ClassVar[dict[str, Any]] = {"threshold": None}
    learns = "required"
    labels = "patches"
    restores = True
    built_in: ClassVar[dict[str, Any]] = {"epochs": 0.5, "lr": 5e-4, "head": "linear", "tune": False}

    threshold: float | None = param(
        0.9, "tokens that are surer of their class leave; none: as many as --keep says", low=0, high=1
    )
    layers: tuple[int, ...] = param((5, 7), "blocks after which they leave, of 12", low=0, high=DEPTH - 2)
    stay: int = param(5, "of every class, the surest tokens that stay all the same", low=0)
    head: str = param(
        "masks", "SegViT's masks of classes, or linear, every token by itself", choices=("masks", "linear")
    )
    channels: int = param(384, "of the decoder that makes masks", low=1)
    heads: int = param(6, "of its attention", low=1)
    decoder: int = param(3, "its layers", low=1)
    tune: bool = param(True, "fit the model's own weights too")
    epochs: float = param(32.0, "of a fit", low=0)
    batch: int = param(16, "images per step of a fit", low=1)
    lr: float = param(2e-5, "of a fit, at its peak; ten times as much for the heads", low=0)
    warmup: float = param(0.0375, "fraction of the steps", low=0, high=1)
    weight_decay: float = param(0.01, "of a fit", low=0)

    def sites(self, depth):
        """Where tokens leave, in a model of `depth` blocks."""
        return [stage.site for stage in ratio_stages([layer + 1 for layer in self.layers], 1.0, 1, depth)]

    def check(self, shape):
        """There are blocks between the exits."""
        super().check(shape)
        sites = self.sites(shape.depth)
        if len(set(sites)) < len(sites):
            raise UserError(
                f"dtop: {shape.depth} blocks have no room for exits after {self.layers} of {DEPTH}"
            )

    def varies(self):
        """Where every token decides for itself."""
        return super().varies() or "threshold" in (self.state or {})

    def counted(self):
        """With --keep, where no threshold has met it, the surest leave."""
        return self if "threshold" in (self.state or {}) else super().counted()

    def stages(self, shape, knob):
        """Any number, or the same fraction, leaves at every exit."""
        self.check_budget(knob)
        layers = [layer + 1 for layer in self.layers]
        return ratio_stages(layers, 1.0 if knob is None else knob, shape.tokens, shape.depth)

    def reduce(self, site, view, count, memory):
        """Write down what is seen; all leave that are sure and not among the surest of their class."""
        prefix, length = view.prefix, view.hidden.shape[1]
        sure, name = likelihood(*self.name(self.sites(view.depth).index(site), view, memory)).max(-1)
        there = view.prunable[:, prefix:]
        if not self.varies():
            spare = select.all_but_best(sure, name, there, self.stay)
            worth = torch.where(spare, -sure, 1.0)
            return Reduction.keep(select.keep_prefix_and_top(worth, count, prefix), length)
        threshold = self.state.get("threshold", self.threshold)
        leaves = select.all_but_best(sure, name, there & (sure > threshold), self.stay)
        stays = torch.ones_like(view.prunable)
        stays[:, prefix:] = there & ~leaves
        index, valid = select.keep_where(stays)
        return Reduction.keep(index, length, valid)

    def finish(self, view, memory):
        """The last head names what is left, and says anew of all patches which classes are there."""
        _, present = self.name(len(self.layers), view, memory)
        memory["map"] = likelihood(memory["canvas"][:, :-1], present)

    def name(self, place, view, memory):
        """What the head `place` says of the tokens in `view` [B, n, names] and of the classes; the canvas keeps it.

        The canvas [B, N + 1, names] keeps what the last head that saw a token said; its last row takes fillers.
        """
        state = {name.split(".", 1)[1]: t for name, t in self.state.items() if name.startswith(f"{place}.")}
        tokens, there = view.hidden[:, view.prefix :].float(), view.prunable[:, view.prefix :]
        masks, present = functional_call(
            of(state, self.heads), state, (tokens, None if view.whole else there)
        )
        batch, length, names = masks.shape
        canvas = memory.get("canvas", masks.new_zeros(batch, length + 1, names))
        spot = torch.arange(length, device=masks.device).expand(batch, -1)
        if view.position is not None:
            spot = view.position[:, view.prefix :] - view.prefix
        spot = spot.where(there, canvas.shape[1] - 1)
        memory["canvas"] = canvas.scatter(1, spot.unsqueeze(-1).expand_as(masks), masks)
        return masks, present

    def unpruned(self):
        """The heads, and no token that leaves."""
        state = {name: tensor for name, tensor in self.state.items() if name != "threshold"}
        return replace(self, threshold=None).bind(state)

    def loosened(self, knob, shape):
        """Below 0.5 the threshold falls to 0; above, its distance from 1 shrinks by powers of ten, to none at 1."""
        learned = self.state.get("threshold", torch.tensor(0.9 if self.threshold is None else self.threshold))
        more = 2 * knob - 1
        found = learned * 2 * knob if more < 0 else 1 - (1 - learned) * (10 ** (-6 * more) if more < 1 else 0)
        return self.bind(self.state | {"threshold": found})

    def neutral_state(self, shape, seed):
        """Heads as they are drawn, and no threshold that has met a budget."""
        return {
            name: value for name, value in self.fit(shape, 0.5, seed).state().items() if name != "threshold"
        }

    def fit(self, shape, keep, seed):
        """The heads, and the model; the budget sets the threshold afterwards."""
        return Exits(self, shape, seed)
