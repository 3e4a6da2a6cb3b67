"""PPT prunes or pools, image by image: what is inattentive leaves, what is alike merges, at three blocks.

Where the scores of an image's tokens vary much, the least important ones are dropped; where they are alike, the most
similar pairs of tokens merge. Both leave the same number of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tprune.core import match, select
from tprune.core.budget import Site, Stage, scale_layer
from tprune.core.reduction import Reduction
from tprune.core.score import cls_times_value_norm
from tprune.methods.base import Paper, param
from tprune.methods.tokens import TokenMethod

PATCHES = 196
"""The paper's threshold is for the variance of this many scores that sum to 1."""


@dataclass(frozen=True)
class PPT(TokenMethod):
    """Token pruning and pooling between attention and MLP, chosen by the variance of the scores."""

    paper = Paper(
        title="PPT: Token Pruning and Pooling for Efficient Vision Transformers",
        venue="arXiv",
        year=2023,
        arxiv="2310.01812",
        code="xjwu1024/PPT",
        checked="code",
        notes="The threshold is for 196 patches and scales with the square of 196 over the model's number. A "
        "distillation token is protected; the authors' code scores it as a patch. --keep scales r; three "
        "blocks that lose half of their patches each reach 0.506 of 196 patches in 12 blocks at the least.",
    )
    needs_cls = True
    native = ("r",)

    layers: tuple[int, ...] = param(
        (3, 6, 9), "blocks between whose attention and MLP tokens leave, of 12", low=0
    )
    r: int = param(50, "tokens that leave at each of them, at most half", low=0)
    threshold: float = param(
        7e-5,
        "variance of the scores from which an image is pruned; 6e-5 after the paper's fine-tuning",
        low=0,
    )
    prop_attn: bool = param(True, "proportional attention")

    def weighs_by_size(self):
        """As in ToMe: attention counts a pooled token as often as the tokens it stands for."""
        return self.prop_attn

    def stages(self, shape, knob):
        """r tokens fewer at every stage, never more than half of them."""
        r = self.r if knob is None else round((1 - knob) * shape.tokens / 2)
        stages, alive = [], shape.tokens
        for layer in self.layers:
            alive -= min(r, alive // 2)
            stages.append(Stage(Site(scale_layer(layer, 12, shape.depth), between=True), alive))
        return stages

    def reduce(self, site, view, count, memory):
        """Prune or pool every image, whichever its scores ask for."""
        batch, length = view.hidden.shape[:2]
        prefix, alive = view.prefix, length - view.prefix
        patches = memory.setdefault("patches", alive)
        if count >= alive:
            return Reduction.identity(batch, length, view.hidden.device)
        attention = view.attention
        score = cls_times_value_norm(attention.rows(slice(0, 1))[:, :, 0], attention.value)[:, prefix:]
        score = score / score.sum(1, keepdim=True)
        peaked = score.var(1) >= self.threshold * (PATCHES / patches) ** 2  # [B]

        index, source, into = match.bipartite_merge(attention.key.mean(1), alive - count, prefix)
        order = select.top_ranked(score, alive) + prefix
        peaked = peaked.unsqueeze(1)
        index = torch.where(peaked, select.with_prefix(order[:, :count], prefix), index)
        source = torch.where(peaked, order[:, count:], source)
        return Reduction.average(index, length, source, into.masked_fill(peaked, -1), view.size)
