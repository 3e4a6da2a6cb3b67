"""Balanced Token Pruning: early stages must leave what later layers will want, late ones what this layer wants now.

Stage after stage the share of diverse tokens falls and that of attended ones rises; attention, which favours the end of
the image, is balanced by taking early tokens first, and a grid keeps the whole image in view at the start.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tprune.core import grid, match, ranks, select
from tprune.core.budget import exponent, scale_layer, staircase
from tprune.core.reduction import Reduction
from tprune.methods.base import Paper, param
from tprune.methods.tokens import TokenMethod

PARTS = (0.3, 0.1, 0.0), (0.3, 0.9, 1.0), (3.7, 1.5, 1.2)
"""Of the tokens that a stage leaves: the diverse, the attended; and how many times the latter are candidates."""


@dataclass(frozen=True)
class BTP(TokenMethod):
    """Before layers 3, 6 and 14 diverse, attended and, at first, grid tokens stay; before layer 22 all leave."""

    paper = Paper(
        title="Balanced Token Pruning: Accelerating Vision Language Models Beyond Local Optimization",
        venue="NeurIPS",
        year=2025,
        arxiv="2505.22038",
        code="EmbodiedCity/NeurIPS2025-Balanced-Token-Pruning",
        checked="port",
        notes="Against a public copy of the authors' release, whose second stage counts tokens twice that are both "
        "diverse and attended; ours, and the golden values, count them once. A stage never keeps more than its count: "
        "of too many, grid tokens go first, then attended ones. The layers are the authors' for LLaVA-1.5-7B; how "
        "they were calibrated is not in the code. --keep raises the fractions to one power.",
    )
    reads = ("attention",)
    native = ("divisors",)

    layers: tuple[int, ...] = param(
        (3, 6, 14, 22), "tokens leave before these layers, all before the last, of 32", low=1, length=4
    )
    divisors: tuple[int, ...] = param(
        (2, 2, 3), "every stage leaves one in so many of the tokens there", low=1, length=3
    )
    grid: float = param(0.25, "fraction of each crop that the grid of the first stage has", low=0, high=1)

    def stages(self, shape, knob):
        """V // 2, half of it, a third of it, none."""
        counts, left, share = [], shape.tokens, 1.0
        for divisor in self.divisors:
            left, share = left // divisor, share / divisor
            counts.append(left if knob is None else max(1, round(shape.tokens * share ** exponent(knob))))
        counts.append(0 if knob is None else round(shape.tokens * 0.0 ** exponent(knob)))
        return staircase(self.layers, counts, 32, shape.depth)

    def reduce(self, site, view, count, memory):
        """Diverse tokens D, attended tokens R, the grid G; what is missing to k is filled with diverse ones."""
        left = torch.as_tensor(count, device=view.hidden.device).expand(len(view.hidden))
        stage = max(
            n for n, at in enumerate(self.layers) if max(1, scale_layer(at, 32, view.depth)) == site.layer
        )
        score = torch.zeros(view.prunable.shape, device=view.hidden.device)
        if stage < len(PARTS[0]) and int(left.max()):
            score = self.worth(view, left, *(part[stage] for part in PARTS), first=stage == 0)
        index, valid = select.keep_prunable_top(score, count, view.prunable)
        return Reduction.keep(index, view.hidden.shape[1], valid)

    def worth(self, view, left, diverse, attended, surplus, first):
        """D before R before G before what fills up, [B, N]."""
        paid = view.attention.rows(view.last).mean(1)[:, 0]  # [B, N]
        wanted = (left.double() * attended).long()
        chosen = ranks.prefer_early(paid, view.prunable, (wanted.double() * surplus).long(), left, wanted)
        score = 2.0 * chosen
        if first:
            score = torch.maximum(score, 1.0 * (self.spread(view) & view.prunable))
        wanted = (left.double() * diverse).long()
        if int(wanted.max()):
            order = match.farthest_first(view.hidden, int(wanted.max()), view.prunable)
            there = torch.arange(order.shape[1], device=order.device) < wanted.unsqueeze(1)
            score = score.scatter_reduce(1, order, 3.0 * there, "amax")
        missing = int((left - (score > 0).sum(1)).clamp_min(0).max())
        if missing:
            order = match.farthest_first(view.hidden, missing, view.prunable, score > 0)
            fill = 0.5 - torch.arange(missing, device=order.device) / (2 * missing + 2)
            score = score.scatter_reduce(1, order, fill.expand_as(order).to(score), "amax")
        return score

    def spread(self, view):
        """The grid tokens of every crop: bool [B, N]."""
        crop, row, column = view.signal("cells").unbind(2)
        marked = torch.zeros_like(view.prunable)
        for number in crop[crop >= 0].unique().tolist():
            mine = crop == number
            rows, columns = int(row[mine].max()) + 1, int(column[mine].max()) + 1
            apart = grid.far_apart((rows, columns), int(self.grid * rows * columns)).to(crop.device)
            marked |= mine & apart[(row * columns + column).clamp(0, rows * columns - 1)]
        return marked
