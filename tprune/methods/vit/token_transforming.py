"""Token Transforming: every token flows into all informative ones, by similarity, instead of into one or nowhere.

Pruning and merging are matrices over tokens with at most one entry in a column; here columns are dense. The tokens
that the class token attends to are the outputs, and each input spreads over them by a softmax of its similarities.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from tprune.core import select
from tprune.core.budget import ratio_stages
from tprune.core.reduction import Reduction
from tprune.core.score import transform_weights
from tprune.methods.base import Paper, param
from tprune.methods.tokens import TokenMethod


@dataclass(frozen=True)
class TokenTransforming(TokenMethod):
    """Many-to-many aggregation between attention and MLP at three blocks."""

    paper = Paper(
        title="Token Transforming: A Unified and Training-Free Token Compression Framework for Vision Transformer "
        "Acceleration",
        venue="arXiv",
        year=2025,
        arxiv="2506.05709",
        code="AuroraZengfh/TokenTransforming",
        checked="abstract",
        notes="The repository holds no source: the dense matrix over tokens and training-free use are the "
        "paper's; the outputs by attention, the softmax over them, its temperature and the sizes are ours.",
    )
    native = ("ratio",)

    layers: tuple[int, ...] = param(
        (3, 6, 9), "blocks between whose attention and MLP tokens transform, of 12", low=0
    )
    ratio: float = param(0.7, "fraction of the remaining tokens that each of them keeps", low=0, high=1)
    temperature: float = param(0.02, "of the softmax: small for one-to-one, large for a blur", low=1e-4)
    prop_attn: bool = param(True, "proportional attention")

    def weighs_by_size(self):
        """Sizes are conserved: every token's mass is dealt out over the outputs."""
        return self.prop_attn

    def stages(self, shape, knob):
        """ceil(ratio · n) of n tokens at every stage."""
        ratio = self.ratio if knob is None else knob
        return ratio_stages(self.layers, ratio, shape.tokens, shape.depth, between=True)

    def reduce(self, site, view, count, memory):
        """The most attended tokens, each the average of all that flows into it; the prefix stays apart."""
        batch, length = view.hidden.shape[:2]
        prefix = view.prefix
        if count >= length - prefix:
            return Reduction.identity(batch, length, view.hidden.device)
        index = select.keep_prefix_and_top(self.attended(view)[:, prefix:], count, prefix)
        metric = view.attention.key.mean(1)[:, prefix:]
        size = metric.new_ones(batch, length, dtype=torch.float32) if view.size is None else view.size
        flow = (
            transform_weights(metric, index[:, prefix:] - prefix, self.temperature) * size[:, None, prefix:]
        )
        mass = flow.sum(2)  # [B, count]
        matrix = flow.new_zeros(batch, prefix + count, length)
        matrix[:, :prefix, :prefix] = torch.eye(prefix, device=matrix.device)
        matrix[:, prefix:, prefix:] = flow / mass.unsqueeze(2)
        return replace(Reduction.mix(matrix, index), resized=torch.cat([size[:, :prefix], mass], dim=1))

    def attended(self, view):
        """The class token's attention, or where there is none the attention that every token receives: [B, N]."""
        if view.has_cls:
            return view.attention.rows(slice(0, 1)).mean(1)[:, 0]
        return view.attention.column_sums().mean(1)
