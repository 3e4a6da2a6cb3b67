"""DART keeps a few pivot tokens and, for each, the image tokens least like it: duplication matters, not importance.

Pivots are the image and text tokens with the largest keys; no attention map is needed, so fused kernels stay.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tprune.core import match, select
from tprune.core.budget import Site, Stage, scale_layer
from tprune.core.reduction import Reduction
from tprune.methods.base import Paper, param
from tprune.methods.tokens import TokenMethod


@dataclass(frozen=True)
class DART(TokenMethod):
    """Duplication-aware reduction before decoder layer K, on the normalised output of layer K - 1."""

    paper = Paper(
        title="Stop Looking for Important Tokens in Multimodal Language Models: Duplication Matters More",
        venue="EMNLP",
        year=2025,
        arxiv="2502.11494",
        code="ZichenWen1/DART",
        checked="code",
        notes="Pivots choose in the order of their norm, image before text. The authors iterate a set, in hash order: "
        "the golden values are of their function with that order replaced, and 6 of 8 cases differ with it. "
        "--keep is met exactly: what the pivots' equal shares leave over goes to the first of them. K is a layer "
        "of 32 and scales with the depth.",
    )
    native = ("reduction",)

    layer: int = param(2, "K: image tokens leave before this decoder layer, of 32", low=1)
    reduction: float = param(
        0.778, "R: fraction of the image tokens that leaves, pivots not counted", low=0, high=1
    )
    image_pivots: int = param(4, "how many image tokens are pivots; they stay", low=1)
    text_pivots: int = param(4, "how many text tokens behind the images are pivots", low=0)

    def stages(self, shape, knob):
        """4 pivots and floor(N (1 - R) / 8) for each of 8; with --keep, round(r · N) in all."""
        pivots = self.image_pivots + self.text_pivots
        if knob is None:
            count = self.image_pivots + pivots * int(shape.tokens * (1 - self.reduction) / pivots)
        else:
            count = max(1, round(knob * shape.tokens))
        layer = max(1, scale_layer(self.layer, 32, shape.depth))
        return [Stage(Site(layer), min(count, shape.tokens))]

    def reduce(self, site, view, count, memory):
        """Pivots by the L1 norm of their keys; each takes its share of the tokens least similar to it."""
        norm = view.attention.key.abs().sum(3, dtype=torch.float32).sum(1)  # [B, N]
        pivots, weight = self.pivots(norm, view, count)
        image = select.mark(pivots, weight > 0, norm.shape[1]) & view.prunable
        total = torch.as_tensor(count, device=norm.device).expand(len(norm))
        quota = shares(total - image.sum(1), weight)
        taken = match.least_similar(view.signal("final_norm"), pivots, quota, view.prunable & ~image)
        index, valid = select.keep_prunable_top((image | taken).float(), count, view.prunable)
        return Reduction.keep(index, view.hidden.shape[1], valid)

    def pivots(self, norm, view, count):
        """Pivots [B, P], image before text, by norm descending; and which of them are real, 1 or 0 [B, P]."""
        found, real = [], []
        for group, most in (
            (view.prunable, min(self.image_pivots, int(torch.as_tensor(count).max()))),
            (view.text, self.text_pivots),
        ):
            best = select.top_ranked(norm.masked_fill(~group, -torch.inf), min(most, norm.shape[1]))
            found.append(best)
            real.append(group.gather(1, best).long())
        room = torch.as_tensor(count, device=norm.device).expand(len(norm)).unsqueeze(1)
        real[0] = real[0] * (torch.arange(real[0].shape[1], device=norm.device) < room)
        return torch.cat(found, 1), torch.cat(real, 1)


def shares(total, weight):
    """Whole shares [B, P] of `total` [B] for those with `weight` 1; the first get what is left over."""
    number = weight.sum(1, keepdim=True).clamp_min(1)
    total = total.clamp_min(0).unsqueeze(1)
    return weight * (total // number + (weight.cumsum(1) <= total % number))
