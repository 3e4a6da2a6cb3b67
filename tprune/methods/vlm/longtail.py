"""Sparsity Meets Similarity keeps the head of a long tail: few image tokens are like the class token, most are not.

Sorted, these similarities fall steeply and then run out in a tail. Where the curve bends it is cut, for every image at
its own place; inside the decoder what the text hardly looks at leaves too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tprune.core import ranks, select
from tprune.core.budget import PROJECTOR, Site, Stage, scale_layer
from tprune.core.reduction import Reduction
from tprune.methods.base import Paper, param
from tprune.methods.tokens import TokenMethod


@dataclass(frozen=True)
class LongTail(TokenMethod):
    """The head of the class token's attention, then what the text looks at."""

    paper = Paper(
        title="Sparsity Meets Similarity: Leveraging Long-Tail Distribution for Dynamic Optimized Token Representation "
        "in Multimodal Large Language Models",
        venue="arXiv",
        year=2024,
        arxiv="2409.01162",
        checked="abstract",
        notes="Neither code nor full text was at hand. Ours: similarity is the class token's attention in the "
        "projected block, the bend is the point farthest from the chord of the curve, and half of the rest leaves "
        "before decoder layer 2. --keep r takes r of the tokens first and max(r, 1/2) of these then.",
    )
    needs_cls = True
    reads = ("attention", "encoder")
    unit = "crop"
    under_keep = {"counts": "keep"}

    layer: int = param(2, "before this decoder layer tokens leave again, of 32", low=1)
    ratio: float = param(0.5, "fraction of the rest that stays there", low=0, high=1)
    counts: str = param("image", "who says how many stay: each image, or --keep", choices=("image", "keep"))

    def stages(self, shape, knob):
        """As many as the image has in its head; with a budget a fraction in both places."""
        self.check_budget(knob)
        layer = Site(max(1, scale_layer(self.layer, 32, shape.depth)))
        if knob is None:
            return [Stage(PROJECTOR, shape.tokens), Stage(layer, shape.tokens)]
        head = max(1, round(knob * shape.tokens))
        return [Stage(PROJECTOR, head), Stage(layer, max(1, round(max(knob, 0.5) * head)))]

    def reduce(self, site, view, count, memory):
        """Stage 1: up to the bend of the sorted similarities; stage 2: by the text's attention."""
        if site == PROJECTOR:
            worth = view.pool(view.encoder.saliency())
            if self.varies():
                count = ranks.beyond_knee(worth, view.prunable).sum(1).cpu()
        else:
            worth = view.text_attention()
            if self.varies():
                alive = view.prunable.sum(1)
                count = torch.minimum((alive * self.ratio).round().long().clamp_min(1), alive).cpu()
        index, valid = select.keep_prunable_top(worth, count, view.prunable)
        return Reduction.keep(index, view.hidden.shape[1], valid)
