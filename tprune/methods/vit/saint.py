"""SAINT drops tokens that resemble many others, as many as each image has, in the first half of the blocks.

Tokens at even places are compared with those at odd places, by the mean of their keys over heads. One with enough
partners above a threshold is redundant: it is dropped, nothing merges.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import torch

from tprune.core import select
from tprune.core.alike import redundancy_of_evens
from tprune.core.budget import Site, Stage
from tprune.core.reduction import Reduction
from tprune.core.score import cosine_normalise
from tprune.methods.base import Paper, param
from tprune.methods.tokens import TokenMethod


@dataclass(frozen=True)
class Saint(TokenMethod):
    """Similarity-aware pruning between attention and MLP; the part for vision transformers."""

    paper = Paper(
        title="Similarity-Aware Token Pruning: Your VLM but Faster",
        venue="arXiv",
        year=2025,
        arxiv="2503.11549",
        code="ArmenJeddi/saint",
        checked="code",
        notes="Each image drops as many tokens as it has redundant ones; the authors average that number over the "
        "batch (counts=batch). --keep fixes the numbers, an equal fraction in each block.",
    )

    under_keep = {"counts": "keep"}

    threshold: float = param(0.75, "cosine of keys from which two tokens are alike", low=-1, high=1)
    partners: int = param(5, "how many alike make a token redundant (K)", low=1)
    gamma: float = param(10.0, "how much the similarity of the partners counts beside their number", low=0)
    part: float = param(0.5, "part of the blocks, from the first, in which tokens leave", low=0, high=1)
    counts: str = param(
        "image",
        "who says how many leave: each image, the mean of a batch, --keep",
        choices=("image", "batch", "keep"),
    )

    def stages(self, shape, knob):
        """With a budget the same fraction, at most half, leaves each block; without, any number."""
        self.check_budget(knob)
        stages, alive = [], shape.tokens
        for layer in range(int(shape.depth * self.part)):
            alive = alive if knob is None else ceil(alive * (1 + knob) / 2)
            stages.append(Stage(Site(layer, between=True), alive))
        return stages

    def reduce(self, site, view, count, memory):
        """Drop the most redundant even tokens: [prefix, even tokens by falling score, odd tokens] is left."""
        batch, length = view.hidden.shape[:2]
        prefix, patches = view.prefix, length - view.prefix
        metric = cosine_normalise(view.attention.key.mean(1)[:, prefix:])
        real = (
            torch.ones_like(metric[..., 0], dtype=torch.bool) if view.real is None else view.real[:, prefix:]
        )
        worth, alike = redundancy_of_evens(metric, real, self.threshold, self.gamma)
        if self.varies():
            leaving = (alike >= self.partners).sum(1)
            if self.counts == "batch":
                leaving = leaving.float().mean().floor().long().expand(batch)
        else:
            leaving = torch.full((batch,), patches - count, device=metric.device)

        order = worth.argsort(dim=1, descending=True, stable=True)
        rank = order.argsort(dim=1)
        place = torch.arange(patches, device=metric.device)
        key = place.repeat(batch, 1) + patches
        key[:, ::2] = rank
        # Where nothing leaves, the order stays as it was.
        key = torch.where(leaving.unsqueeze(1) == 0, place, key)
        stays = real.clone()
        stays[:, ::2] &= rank >= leaving.unsqueeze(1)
        slots = key.masked_fill(~stays, 3 * patches).argsort(dim=1)
        if not self.varies():
            return Reduction.keep(select.with_prefix(slots[:, :count] + prefix, prefix), length)
        left = stays.sum(1)
        widest = int(left.max())
        valid = torch.arange(prefix + widest, device=metric.device) < prefix + left.unsqueeze(1)
        return Reduction.keep(select.with_prefix(slots[:, :widest] + prefix, prefix), length, valid)
