"""STAR drops image tokens twice: before the decoder what other image tokens ignore, inside it what the text ignores.

The first stage removes what is redundant to the image itself, gently; the second what the question does not need, when
the decoder has had a few layers to find out.
"""

from __future__ import annotations

from dataclasses import dataclass

from tprune.core import attending, select
from tprune.core.budget import PROJECTOR, Site, Stage, scale_layer
from tprune.core.reduction import Reduction
from tprune.methods.base import Paper, param
from tprune.methods.tokens import TokenMethod


@dataclass(frozen=True)
class STAR(TokenMethod):
    """Visual self-attention before the decoder, cross-modal attention before its layer K."""

    paper = Paper(
        title="STAR: Stage-Wise Attention-Guided Token Reduction for Efficient Large Vision-Language Models Inference",
        venue="arXiv",
        year=2025,
        arxiv="2505.12359",
        checked="paper",
        notes="No code is public, and the formulas are second-hand. As printed, a token's score is the mean of its own "
        "row of a softmax, which is the same for all; here it is what the token receives, in both stages. K and both "
        "ratios are ours (half the depth, one half each); --keep takes the same fraction in both.",
    )
    native = ("first", "second")

    first: float = param(
        0.5, "R1: fraction of the image tokens that leaves before the decoder", low=0, high=1
    )
    second: float = param(0.5, "R2: fraction of the rest that leaves at layer K", low=0, high=1)
    layer: int = param(16, "K: before this decoder layer, of 32", low=1)

    def stages(self, shape, knob):
        """round((1 - R1) N), of these round((1 - R2) n) before layer K; at least one."""
        first, second = (1 - self.first, 1 - self.second) if knob is None else (knob, knob)
        some = max(1, round(first * shape.tokens))
        layer = max(1, scale_layer(self.layer, 32, shape.depth))
        return [Stage(PROJECTOR, some), Stage(Site(layer), max(1, round(second * some)))]

    def reduce(self, site, view, count, memory):
        """What tokens receive: in softmax(Z Zᵀ / √D), or from the text in layer K - 1."""
        worth = self.visual(view) if site == PROJECTOR else view.text_attention()
        index, valid = select.keep_prunable_top(worth, count, view.prunable)
        return Reduction.keep(index, view.hidden.shape[1], valid)

    def visual(self, view):
        """Column sums of the embeddings' own attention: float32 [B, N]."""
        tokens = view.hidden.unsqueeze(1)
        return attending.attention_column_sums(tokens, tokens, tokens.shape[3] ** -0.5)[:, 0]
