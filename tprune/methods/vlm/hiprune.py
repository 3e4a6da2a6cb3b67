"""HiPrune keeps image tokens from the hierarchy of the vision tower: objects of a middle block, context of a deep one.

Anchors receive most attention in the middle block; buffers are their neighbours; registers receive most attention in
the deep block. No text is asked, and nothing is merged.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tprune.core import ranks, select
from tprune.core.budget import PROJECTOR, Stage, scale_layer
from tprune.core.reduction import Reduction
from tprune.methods.base import Paper, param
from tprune.methods.tokens import TokenMethod


@dataclass(frozen=True)
class HiPrune(TokenMethod):
    """Anchors, buffers and registers of every crop."""

    paper = Paper(
        title="HiPrune: Training-Free Visual Token Pruning via Hierarchical Attention in Vision-Language Models",
        venue="arXiv",
        year=2025,
        arxiv="2508.00553",
        code="Danielement321/HiPrune",
        checked="code",
        notes="The object layer is one of 24 and scales with the depth. Scores are compared only among tokens that are "
        "not taken yet; the authors subtract 1 from those that are. In windows patches attend as they did; the "
        "authors' code for Qwen2.5-VL lets them see the whole image. Crops that are one resized mosaic have no rows.",
    )
    reads = ("encoder",)
    positions = "compact"
    native = ("ratio",)
    unit = "crop"

    ratio: float = param(0.3334, "fraction of every crop's tokens that stays: 192 of 576", low=0, high=1)
    alpha: float = param(0.1, "fraction of these that anchors and their buffers may be", low=0, high=1)
    layer: int = param(9, "object layer, from 1, of 24", low=1, high=24)
    wrap: bool = param(True, "neighbours go on in the next row at the image's sides, as in the authors' code")

    def encoder_blocks(self, depth):
        """The object layer."""
        return (scale_layer(self.layer - 1, 24, depth),)

    def stages(self, shape, knob):
        """k = round(r · N), at least one."""
        keep = self.ratio if knob is None else knob
        return [Stage(PROJECTOR, max(1, round(keep * shape.tokens)))]

    def reduce(self, site, view, count, memory):
        """round(k · alpha / 5) anchors with their buffers, and the best of the rest by the deep block."""
        [layer] = self.encoder_blocks(view.encoder.depth)
        middle, deep = (view.pool(tower.received()) for tower in (view.encoders[layer], view.encoder))
        total = torch.as_tensor(count, device=deep.device).expand(len(deep))
        anchors = (total * self.alpha / 5).round().unsqueeze(1)
        rank = ranks.rank(middle.masked_fill(~view.prunable, -1))
        objects = self.with_buffers(rank < anchors, view.grid)
        # Attention lies between 0 and 1.
        index, valid = select.keep_prunable_top(deep + objects.float(), count, view.prunable)
        return Reduction.keep(index, view.hidden.shape[1], valid)

    def with_buffers(self, anchors, grid):
        """Anchors and the tokens left, right, above and below them: bool [B, N]."""
        length = anchors.shape[1]
        place = torch.arange(length, device=anchors.device)
        found = anchors.clone()
        for step in (-1, 1) if grid is None else (-1, 1, -grid[1], grid[1]):
            near = (place + step).clamp(0, length - 1)
            beside = anchors
            if abs(step) == 1 and grid is not None and not self.wrap:
                beside = anchors & (near // grid[1] == place // grid[1])
            found |= torch.zeros_like(anchors).scatter_reduce(1, near.expand_as(beside), beside, "amax")
        return found
