"""CATP: with examples in the prompt, an image token is worth what the question finds in it as it is read in context.

Before the decoder each image keeps tokens that differ from each other and fit the text; in a shallow layer those go
on whose attention from the question has grown over the last layers, and that are like what the question is about.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tprune.core import greedy, select
from tprune.core.budget import PROJECTOR, Site, Stage, exponent, scale_layer
from tprune.core.reduction import Reduction, gather_tokens
from tprune.core.score import cosine_normalise, min_max
from tprune.errors import UserError
from tprune.methods.base import Paper, param
from tprune.methods.tokens import TokenMethod


@dataclass(frozen=True)
class CATP(TokenMethod):
    """Diverse and aligned tokens at the projector, then attention gained between two shallow layers plus similarity."""

    paper = Paper(
        title="CATP: Contextually Adaptive Token Pruning for Efficient and Enhanced Multimodal In-Context Learning",
        venue="AAAI",
        year=2026,
        arxiv="2508.07871",
        checked="abstract",
        notes="A reconstruction: neither code nor full text was at hand. Ours are the greedy choice (alignment times "
        "distance), the layers 6 and 10, equal weights and half of the tokens in the first stage; images of examples "
        "and of the question are ranked together. The text is what stands behind the last image. 128 of 576 are left.",
    )
    reads = ("attention",)
    native = ("first", "second")

    first: float = param(0.5, "fraction of every image's tokens left before the decoder", low=0, high=1)
    second: float = param(0.2222, "fraction left after the shallow layers", low=0, high=1)
    layers: tuple[int, ...] = param(
        (6, 10), "attention is compared between these layers, of 32", low=0, length=2
    )
    weight: float = param(
        0.5, "of the gained attention; the rest is of the similarity to the question", low=0, high=1
    )

    def check(self, shape):
        """Two layers to compare, and one behind them."""
        super().check(shape)
        if shape.depth < 3:
            raise UserError(f"catp compares two layers before a third, and this decoder has {shape.depth}")

    def sites(self, depth):
        """Behind the two layers, one after the other."""
        early, late = (scale_layer(layer + 1, 32, depth) for layer in self.layers)
        early = min(max(1, early), depth - 2)
        return Site(early), Site(max(early + 1, late))

    def stages(self, shape, knob):
        """Before the decoder, a look behind the first of the layers, and behind the second."""
        power = 1.0 if knob is None else exponent(knob)
        counts = [max(1, round(shape.tokens * part**power)) for part in (self.first, self.second)]
        early, late = self.sites(shape.depth)
        return [Stage(PROJECTOR, counts[0]), Stage(early, counts[0]), Stage(late, min(counts))]

    def reduce(self, site, view, count, memory):
        """Stage 1 at the projector; behind layer a remember the question's attention, behind layer b compare."""
        if site == PROJECTOR:
            index, valid = select.keep_first(self.diverse(view, count), count, view.prunable)
            return Reduction.keep(index, view.hidden.shape[1], valid)
        if site == self.sites(view.depth)[0]:
            memory["paid"] = self.paid(view)
            return None
        gained = self.among(self.paid(view) - memory["paid"], view)
        unit = cosine_normalise(view.hidden)
        alike = self.among((unit * gather_tokens(unit, view.last)).sum(2), view)
        score = self.weight * gained + (1 - self.weight) * alike
        index, valid = select.keep_prunable_top(score, count, view.prunable)
        return Reduction.keep(index, view.hidden.shape[1], valid)

    def diverse(self, view, count):
        """The tokens picked for their likeness to the text and their distance to what is picked, in turn: [B, K]."""
        text = view.signal("text")
        said = (cosine_normalise(text.hidden) * text.real.unsqueeze(2)).sum(1, keepdim=True)
        aligned = (cosine_normalise(view.hidden) @ said.transpose(1, 2)).squeeze(2)
        aligned = self.among(aligned / text.real.sum(1, keepdim=True).clamp_min(1), view)
        widest = int(torch.as_tensor(count).max())
        return greedy.weighted_max_min(view.hidden, aligned, widest, view.prunable)

    def paid(self, view):
        """What the last token pays to every token, mean over heads: [B, N]."""
        return view.attention.rows(view.last).mean(1)[:, 0]

    def among(self, score, view):
        """`score` [B, N] of the image tokens scaled to 0 .. 1, 0 elsewhere."""
        least = score.masked_fill(~view.prunable, torch.inf).amin(1, keepdim=True)
        score = torch.where(view.prunable, score, least.nan_to_num(posinf=0.0))
        return min_max(score)
