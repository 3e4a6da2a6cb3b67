"""PTP shares the budget out among the tiles of an image, and inside each goes by the tower and by the question.

A tile gets tokens for how salient it is to the vision tower; which ones, that saliency and the attention of the text
early in the decoder decide together, and the others leave there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tprune.core import ranks, score, select
from tprune.core.budget import PROJECTOR, Site, Stage, scale_layer
from tprune.core.reduction import Reduction
from tprune.methods.base import Paper, param
from tprune.methods.tokens import TokenMethod


@dataclass(frozen=True)
class PTP(TokenMethod):
    """Region, token and instruction: three levels of importance."""

    paper = Paper(
        title="Pyramid Token Pruning for High-Resolution Large Vision-Language Models via Region, Token, and "
        "Instruction-Guided Importance",
        venue="TCSVT",
        year=2025,
        arxiv="2509.15704",
        checked="abstract",
        notes="No code is public, and the formulas are known second-hand: a tile's saliency is taken to be the mean of "
        "what its tokens receive, which class-token attention makes nearly equal for all tiles. What quotas leave over "
        "goes by the fused score. K is a layer of 32 and scales with the depth.",
    )
    reads = ("encoder", "attention")
    native = ("ratio",)
    unit = "crop"

    ratio: float = param(0.5, "fraction of the image tokens that stays", low=0, high=1)
    alpha: float = param(0.5, "weight of the instruction beside the tower's saliency", low=0, high=1)
    layer: int = param(2, "K: image tokens leave before this decoder layer, of 32", low=1)

    def encoder_blocks(self, depth):
        """The last one."""
        return (depth - 1,)

    def stages(self, shape, knob):
        """Tiles are looked at before the decoder; k = round(r · N) tokens stay at layer K, at least one."""
        keep = self.ratio if knob is None else knob
        late = Site(max(1, scale_layer(self.layer, 32, shape.depth)))
        return [Stage(PROJECTOR, shape.tokens), Stage(late, max(1, round(keep * shape.tokens)))]

    def reduce(self, site, view, count, memory):
        """Remember the tiles; then f = (1 - alpha) b + alpha c, and the best of every tile."""
        if site == PROJECTOR:
            memory.setdefault("tiles", []).append(self.tiles(view))
            return Reduction.identity(*view.prunable.shape, view.hidden.device)
        saliency, tile, regions = spread(memory["tiles"], view.prunable)
        instruction = score.min_max(view.text_looks()[0].amax(1), view.prunable)
        fused = (1 - self.alpha) * saliency + self.alpha * instruction
        total = torch.as_tensor(count, device=tile.device).expand(len(tile))
        quota = ranks.apportion(regions, total).clamp_min(1)
        quota[:, -1] = 0  # newlines are in no tile
        over = select.all_but_best(fused, tile, view.prunable, quota.gather(1, tile))
        first = view.prunable & ~over
        index, valid = select.keep_prunable_top(fused + 2 * first, count, view.prunable)
        return Reduction.keep(index, view.hidden.shape[1], valid)

    def tiles(self, view):
        """Of each tile its row, places, which tokens are there, their saliency 0 to 1, and its own saliency."""
        seen, there = view.pool(view.encoders[view.encoder.depth - 1].saliency()), view.prunable
        region = (seen * there).sum(1) / there.sum(1).clamp_min(1)
        return view.signal("rows"), view.position, there, score.min_max(seen, there), region


def spread(tiles, like):
    """Over the prompts, as large as `like` [B, N]: the saliency of every token [B, N], its tile [B, N], the last for
    none, and how salient the tiles of every row are [B, T + 1], 0 for those of others.
    """
    number = sum(len(region) for *_, region in tiles)
    saliency = torch.zeros(like.shape, device=like.device)
    tile = torch.full(like.shape, number, device=like.device)
    regions = torch.zeros(len(like), number + 1, device=like.device)
    start = 0
    for rows, position, there, seen, region in tiles:
        names = torch.arange(start, start + len(region), device=like.device)
        place = (rows.unsqueeze(1).expand_as(position)[there], position[there])
        saliency[place] = seen[there]
        tile[place] = names.unsqueeze(1).expand_as(position)[there]
        regions[rows, names] = region
        start += len(region)
    return saliency, tile, regions
