"""AIM merges image tokens before the decoder and hides them one after the other inside it.

Neighbouring patches that look alike become one; then, from the middle of the decoder on, a page rank over each layer's
sharpened attention says which image tokens the next layer still sees, until it sees none.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from tprune.core import match, score, select
from tprune.core.budget import PROJECTOR, Stage, exponent, staircase
from tprune.core.reduction import Reduction
from tprune.methods.base import Paper, param
from tprune.methods.tokens import TokenMethod


@dataclass(frozen=True)
class AIM(TokenMethod):
    """Bipartite merging of each image's tokens, then hiding by page rank over a ramp of layers."""

    paper = Paper(
        title="AIM: Adaptive Inference of Multi-Modal LLMs via Token Merging and Pruning",
        venue="ICCV",
        year=2025,
        arxiv="2412.03248",
        code="LaVi-Lab/AIM",
        checked="code",
        notes="What leaves inside the decoder is hidden, as the authors have it: no time is saved there, and the "
        "budget counts the tokens that are seen; exact_mask=false removes it, and then its last vote is missing. An "
        "image is merged over all its crops. Left-padding has no vote. --keep raises both rates to one power.",
    )
    reads = ("attention",)
    native = ("merged", "first", "steps")

    merged: float = param(0.25, "fraction of an image's tokens left by merging", low=0, high=1)
    first: int = param(14, "l₁: tokens are hidden behind this layer and the next ones, of 28", low=0)
    steps: int = param(8, "over so many layers the image disappears", low=1)
    temperature: float = param(0.1, "what attention logits are divided by before the page rank", low=1e-3)
    votes: int = param(5, "rounds of the page rank", low=1)
    exact_mask: bool = param(True, "hide what leaves inside the decoder, instead of removing it")

    def hides(self):
        """Hidden tokens still vote once, with their share of the start."""
        return self.exact_mask

    def stages(self, shape, knob):
        """Merging first; behind layer l₁ + i the fraction 1 - (i + 1)/8 of what is left of it."""
        power = 1.0 if knob is None else exponent(knob)
        left = max(1, round(shape.tokens * self.merged**power))
        layers = [self.first + step + 1 for step in range(self.steps)]
        rates = [1 - (step + 1) / self.steps for step in range(self.steps)]
        counts = [int(left * rate**power) for rate in rates]
        if knob is not None:
            counts = [max(count, 1 if rate else 0) for count, rate in zip(counts, rates, strict=True)]
        ramp = staircase(layers, counts, 28, shape.depth)
        return [Stage(PROJECTOR, left), *ramp]

    def reduce(self, site, view, count, memory):
        """At the projector merge; inside, M = softmax(logits / τ), u ← u M, and what has the least is hidden."""
        if site == PROJECTOR:
            return self.merge(view.hidden, count)
        index, valid = select.keep_prunable_top(self.rank(view), count, view.prunable)
        return Reduction.keep(index, view.hidden.shape[1], valid)

    def rank(self, view):
        """√(mean over heads of u²) after the votes, [B, N]; every token that is computed has one at the start."""
        sharp = replace(view.attention, scale=view.attention.scale / self.temperature)
        attention = sharp.rows()  # [B, H, N, N]
        if sharp.bias is not None:
            attention = attention.nan_to_num()  # padding may see nothing
        voters = (view.real | view.signal("hidden")).to(attention.dtype)
        start = (voters / voters.sum(1, keepdim=True)).unsqueeze(1).expand(attention.shape[:3])
        return score.page_rank(attention, start, self.votes).square().mean(1).sqrt()

    def merge(self, features, count):
        """Rounds of bipartite matching, at most half of the tokens in each, plain means of means."""
        whole, count = None, int(torch.as_tensor(count).max())
        while features.shape[1] > count:
            length = features.shape[1]
            index, source, into = match.bipartite_merge(features, min(length // 2, length - count), 0)
            step = Reduction.average(index, length, source, into)
            features, whole = step.apply(features), step if whole is None else whole.compose(step)
        return Reduction.identity(*features.shape[:2], features.device) if whole is None else whole
