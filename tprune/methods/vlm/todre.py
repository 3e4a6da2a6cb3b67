"""ToDRE keeps a diverse set of image tokens, and drops them all once the text has read what it needs.

Before the decoder tokens are picked one by one, each least like all picked before, from the one that the class token
attends to most. Late in the decoder, where hardly any attention goes to image tokens, the rest leaves.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tprune.core import greedy, select
from tprune.core.budget import PROJECTOR, Site, Stage, scale_layer
from tprune.core.reduction import Reduction
from tprune.core.score import uniform
from tprune.methods.base import Paper, param
from tprune.methods.tokens import TokenMethod


@dataclass(frozen=True)
class ToDRE(TokenMethod):
    """Diversity before the decoder, relevance to the task late in it."""

    paper = Paper(
        title="ToDRE: Effective Visual Token Pruning via Token Diversity and Task Relevance",
        venue="arXiv",
        year=2025,
        arxiv="2505.18757",
        checked="paper",
        notes="With --keep the numbers are fixed, and nothing leaves late. The text is what stands behind the images: "
        "image tokens cannot see it, so that only its own attention decides. Towers without a class token begin "
        "with a random pivot. dispersion=min is the first version's farthest-first choice.",
    )
    reads = ("encoder", "attention", "seeds")
    positions = "compact"
    positions_inside = "original"
    native = ("ratio",)
    under_keep = {"tau": 0.0}

    ratio: float = param(0.25, "fraction of the image tokens that stays", low=0, high=1)
    dispersion: str = param(
        "sum", "what is large: the sum of distances, or the smallest", choices=("sum", "min")
    )
    layer: int = param(28, "the layer of 32 whose attention decides whether image tokens leave", low=1)
    tau: float = param(0.1, "they leave below this share of the text's attention; 0: never", low=0, high=1)

    def encoder_blocks(self, depth):
        """The last one."""
        return (depth - 1,)

    def stages(self, shape, knob):
        """k = round(r · N), at least one; all of them, or none, from the late layer on."""
        keep = self.ratio if knob is None else knob
        count = max(1, round(keep * shape.tokens))
        stages = [Stage(PROJECTOR, count)]
        if self.tau > 0:
            late = min(scale_layer(self.layer, 32, shape.depth) + 1, shape.depth - 1)
            stages.append(Stage(Site(late), count))
        return stages

    def reduce(self, site, view, count, memory):
        """Stage 1 at the projector, stage 2 in the decoder."""
        if site != PROJECTOR:
            return self.leave(view)
        widest = int(torch.as_tensor(count).max())
        pivot, allowed = self.pivot(view), None if view.whole else view.prunable
        if self.dispersion == "sum":
            order = greedy.max_sum(view.hidden, pivot, widest, allowed)
        else:
            weight = torch.ones(view.prunable.shape, device=pivot.device).scatter(1, pivot.unsqueeze(1), 2)
            order = greedy.weighted_max_min(view.hidden, weight, widest, allowed)
        index, valid = select.keep_first(order, count, view.prunable)
        return Reduction.keep(index, view.hidden.shape[1], valid)

    def pivot(self, view):
        """The token of the whole image that the last block's class token attends to most, int64 [B]."""
        tower = view.encoders[view.encoder.depth - 1]
        if not tower.has_cls:
            noise = uniform((view.hidden.shape[1],), view.seeds).to(view.hidden.device)
            return noise.masked_fill(~view.prunable, -1).argmax(1)
        seen = view.signal("thumbnail") & view.prunable
        return view.pool(tower.saliency()).masked_fill(~seen, -1).argmax(1)

    def leave(self, view):
        """Image tokens leave the rows whose text pays them less than tau of its attention."""
        share = (view.text_attention() * view.prunable).sum(1)
        gone = (share < self.tau).unsqueeze(1) & view.prunable
        index, valid = select.keep_where(~gone)
        return Reduction.keep(index, view.hidden.shape[1], valid)
