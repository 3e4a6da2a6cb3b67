"""FEATHER: attention with rotary embeddings ranks image tokens by where they stand, so it ranks without them.

Early, where any ranking is weak, a uniform grid of tokens stays besides the best ones; a second, harder cut comes
when the ranking can be trusted.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from tprune.core import ranks, select
from tprune.core.budget import Site, Stage, scale_layer
from tprune.core.reduction import Reduction
from tprune.methods.base import Paper, param
from tprune.methods.tokens import TokenMethod


@dataclass(frozen=True)
class Feather(TokenMethod):
    """Before layer K₁ the best and a grid, before layer K₂ the best of these, by attention without RoPE."""

    paper = Paper(
        title="Feather the Throttle: Revisiting Visual Token Pruning for Vision-Language Model Acceleration",
        venue="ICCV",
        year=2025,
        arxiv="2412.13180",
        code="markendo/FEATHER",
        checked="code",
        notes="The grid is laid over each crop by itself; the authors have one square image. How many tokens are both "
        "in the grid and among the best is the image's business; --keep fixes the sum (exact).",
    )
    reads = ("before",)
    native = ("reduction",)
    under_keep = {"exact": True}

    layers: tuple[int, ...] = param(
        (8, 16), "K₁, K₂: image tokens leave before these layers, of 32", low=1, length=2
    )
    reduction: float = param(
        0.7, "R: fraction of the image tokens that is not among the best at K₁", low=0, high=1
    )
    stride: int = param(3, "every s-th row and column is in the grid", low=1)
    exact: bool = param(
        False, "the grid and as many of the best as the stage has room for, instead of both in full"
    )

    def stages(self, shape, knob):
        """|A ∪ G| and ρ² of it, with |A| = int(ρ V), ρ = 1 - R; at most |A| + |G| where the image decides."""
        side = int(shape.tokens**0.5)
        grid = min(shape.tokens, (-(-side // self.stride)) ** 2)
        share = 1 - self.reduction if knob is None else knob
        if self.exact:
            first = round(share * shape.tokens + (1 - share) * grid)
        else:
            first = min(shape.tokens, int(share * shape.tokens) + grid)
        least = 0 if knob is None else 1
        counts = max(1, first), max(least, int(first * (share * share)))
        sites = [max(1, scale_layer(layer, 32, shape.depth)) for layer in self.layers]
        return [Stage(Site(site), count) for site, count in zip(sites, counts, strict=True)]

    def reduce(self, site, view, count, memory):
        """s_j = mean over heads of softmax_j(q_last · k_j) over image tokens, without RoPE, in the layer before."""
        attention = view.signal("unrotated_attention")
        attention = replace(attention, bias=view.prunable[:, None, None], causal=False)
        score = attention.rows(view.last).mean(1)[:, 0]  # [B, N]
        if "seen" not in memory:
            score, count = self.with_grid(view, score, count)
        elif not self.exact:
            count = self.part(view.prunable, (1 - self.reduction) ** 2).cpu()
        memory["seen"] = True
        index, valid = select.keep_prunable_top(score, count, view.prunable)
        return Reduction.keep(index, view.hidden.shape[1], valid)

    def with_grid(self, view, score, count):
        """The scores with the grid on top, and how many stay."""
        cell = view.signal("cells")  # [B, N, 3]
        grid = view.prunable & (cell[..., 1] >= 0) & (cell[..., 1:] % self.stride == 0).all(2)
        if not self.exact:
            best = self.part(view.prunable, 1 - self.reduction)
            among = ranks.rank(score.masked_fill(~view.prunable, -torch.inf)) < best.unsqueeze(1)
            count = (grid | (among & view.prunable)).sum(1).cpu()
        return score + 2.0 * grid, count

    def part(self, prunable, share):
        """int(share · n) of each row's n image tokens, int64 [B]."""
        return (prunable.sum(1).double() * share).long()
