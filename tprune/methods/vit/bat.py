"""BAT keeps tokens both important and diverse: attentive ones that resemble each other pair up, the others cluster.

The class token's attention splits the tokens. The most similar pairs of attentive tokens become one each, inattentive
tokens gather around density peaks, and every group becomes its mean weighted by attention.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tprune.core import match, select
from tprune.core.budget import ratio_stages
from tprune.core.reduction import Reduction, gather_tokens
from tprune.methods.base import Paper, param
from tprune.methods.tokens import TokenMethod


@dataclass(frozen=True)
class BAT(TokenMethod):
    """Token decoupling and merging between attention and MLP at three blocks; here without the paper's training."""

    paper = Paper(
        title="Beyond Attentive Tokens: Incorporating Token Importance and Diversity for Efficient Vision "
        "Transformers",
        venue="CVPR",
        year=2023,
        arxiv="2211.11315",
        code="BWLONG/BeyondAttentiveTokens",
        checked="paper",
        notes="The repository holds logs and no source. ceil(ratio · n) tokens per stage agree with its logged MACs "
        "within 3%; how many of them are clusters and pairs is not published, so both are hyperparameters.",
    )
    needs_cls = True
    native = ("ratio",)

    layers: tuple[int, ...] = param(
        (3, 6, 9), "blocks between whose attention and MLP tokens leave, of 12", low=0
    )
    ratio: float = param(0.7, "fraction of the remaining tokens that each of them keeps", low=0, high=1)
    clusters: float = param(
        0.1, "fraction of the tokens kept that are clusters of inattentive ones", low=0, high=1
    )
    pairs: float = param(0.1, "fraction of the attentive tokens that join another", low=0, high=0.5)
    neighbours: int = param(5, "nearest tokens that make up a token's density", low=1)

    def stages(self, shape, knob):
        """ceil(ratio · n) tokens are left of n, clusters and pairs among them."""
        ratio = self.ratio if knob is None else knob
        return ratio_stages(self.layers, ratio, shape.tokens, shape.depth, between=True)

    def reduce(self, site, view, count, memory):
        """Decouple, match the attentive, cluster the inattentive."""
        batch, length = view.hidden.shape[:2]
        prefix, alive = view.prefix, length - view.prefix
        if count >= alive:
            return Reduction.identity(batch, length, view.hidden.device)
        clusters, attentive, pairs = self.parts(alive, count)
        attention = view.attention.rows(slice(0, 1)).mean(1)[:, 0]  # [B, N]
        order = select.top_ranked(attention[:, prefix:], alive) + prefix
        strong, weak = order[:, :attentive].sort(dim=1).values, order[:, attentive:].sort(dim=1).values

        stays, joins, partner = match.bipartite_merge(gather_tokens(view.hidden, strong), pairs, 0)
        centre, other, nearest = match.density_peaks(
            gather_tokens(view.hidden, weak), clusters, self.neighbours
        )

        index = select.with_prefix(
            torch.cat([strong.gather(1, stays), weak.gather(1, centre)], dim=1), prefix
        )
        source = torch.cat([strong.gather(1, joins), weak.gather(1, other)], dim=1)
        into = torch.cat([prefix + partner, prefix + attentive - pairs + nearest], dim=1)
        weight = attention.clamp_min(torch.finfo(attention.dtype).tiny)
        return Reduction.average(index, length, source, into, weight)

    def parts(self, alive, count):
        """How many clusters there are, and how many attentive tokens of which how many join another."""
        clusters = min(max(1, round(self.clusters * count)), count)
        single = count - clusters
        attentive = min(round(single / (1 - self.pairs)), alive - clusters)
        return clusters, attentive, attentive - single
