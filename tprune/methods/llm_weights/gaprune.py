"""GAPrune: of a text embedder the weights stay that its domain needs beyond general text.

Squared gradients of a contrastive loss (Fisher information) tell what a weight is worth to triples of the domain, and
to general ones. What it is worth to the first beyond the second counts, a little more where both sets pull it the same
way, and so does its magnitude.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus

from tprune.core.alignment import agreement, neighbourhood_mean
from tprune.core.contrast import POOLINGS, contrastive_loss, pooled
from tprune.core.ranks import rank
from tprune.core.score import min_max
from tprune.core.weights import WeightEdit
from tprune.methods.allocate import Allocation, Global, PerBlock
from tprune.methods.base import Paper, param
from tprune.methods.llm_weights._scores import lowest
from tprune.methods.weight_view import LinearView
from tprune.methods.weights import WeightBudget, WeightMethod

LEAST = 1e-8
"""Added to Fisher information and to magnitudes."""


@dataclass(frozen=True)
class GaPrune(WeightMethod):
    """softplus((F_domain - β · F_general) · |w| · (1 + 0.2 · alignment) + γ · sqrt(|w|)), compared in all matrices."""

    paper = Paper(
        title="GAPrune: Gradient-Alignment Pruning for Domain-Aware Embeddings",
        venue="arXiv",
        year=2025,
        arxiv="2509.10844",
        code="yixuantt/GAPrune",
        checked="code",
        notes="As in the code alignment scales the Fisher terms alone. Gradients are kept in float32 (the code holds "
        "float16, where Fisher information below 6e-8 is lost), and those of Fisher information and alignment are of "
        "the same batches, in order. A matrix of nearly one score is not spread by magnitude, blocks have no bounds of "
        "5% and 95%, and mixing in F · |w| once more and the contrastive training afterwards are left out. The scalar "
        "alignment is the plain cosine, which the code varies along the matrix where it has no other.",
    )
    kind = "calibrated"
    stats = ("triples",)
    runs_on = ("plain", "encoder")

    general: str = param("built-in", "General triples, in any form that --data (the domain's) takes")
    beta: float = param(1.0, "What general Fisher information is weighed by", low=0)
    gamma: float = param(0.5, "What the root of the magnitude is weighed by", low=0)
    weight: float = param(0.2, "How far alignment may scale the Fisher terms", low=0, high=1)
    alignment: str = param(
        "elementwise",
        "elementwise: of every weight and its neighbours in the matrix; scalar: the matrix's cosine",
        choices=("elementwise", "scalar"),
    )
    fisher_norm: bool = param(
        False, "Divide Fisher information by its mean over the matrix (ours): raw, it may hardly count"
    )
    normalisation: str = param(
        "none",
        "What is made of a matrix's scores before they are compared with others'",
        choices=("none", "zscore_sigmoid", "minmax", "rank"),
    )
    temperature: float = param(1.0, "Of zscore_sigmoid", low=1e-6)
    strategy: str = param(
        "global",
        "Without --allocate, what is compared: all weights, those of a block, those of a matrix",
        choices=("global", "block", "matrix"),
    )
    layers: str = param("mlp", "Which matrices are pruned", choices=("mlp", "all"))
    pooling: str = param(
        "last",
        "What of its tokens embeds a text in a decoder; in an encoder it is the mean",
        choices=POOLINGS,
    )
    batch: int = param(4, "Triples among whose texts a query must find its positive", low=1)
    scale: float = param(20.0, "Of the cosines that are logits", low=0)

    @property
    def part(self) -> str:
        """Which matrices of a block are pruned."""
        return self.layers

    def allocation(self) -> Allocation | None:
        """One threshold for all weights, or one for each block's."""
        return {"global": Global(), "block": PerBlock(), "matrix": None}[self.strategy]

    def pool(self, hidden: Tensor, begin: Tensor, end: Tensor) -> Tensor:
        """Embeddings [B, D] of a decoder's hidden states [B, L, D], by the tokens from `begin` to `end` [B]."""
        return pooled(hidden, begin, end, self.pooling)

    def loss(self, query: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        """The contrastive loss of a batch's embeddings, [B, D] each: a scalar."""
        return contrastive_loss(query, positive, negative, self.scale)

    def score(self, linear: LinearView) -> Tensor:
        """The domain-alignment importance of every weight, not negative: float32 [out, in]."""
        magnitude = linear.weight.abs()
        domain, general = (self._fisher(linear.gradients[f"{name}_square"]) for name in ("domain", "general"))
        aligned = self._aligned(linear.gradients["general_mean"], linear.gradients["domain_mean"])
        factor = (1 + self.weight * aligned).clamp(1 - self.weight, 1 + self.weight)
        worth = (domain - self.beta * general) * magnitude * factor
        return self._normalised(softplus(worth + self.gamma * (magnitude + LEAST).sqrt()))

    def _fisher(self, square: Tensor) -> Tensor:
        found = square + LEAST
        return found / found.mean() if self.fisher_norm else found

    def _aligned(self, general: Tensor, domain: Tensor) -> Tensor:
        found = agreement(general, domain)
        return found.sum() if self.alignment == "scalar" else neighbourhood_mean(found)

    def _normalised(self, score: Tensor) -> Tensor:
        if self.normalisation == "zscore_sigmoid":
            return torch.sigmoid((score - score.mean()) / (score.std() + LEAST) / self.temperature)
        if self.normalisation == "minmax":
            return min_max(score.flatten()).view_as(score)
        if self.normalisation == "rank":
            return ((rank(-score.flatten()) + 1) / score.numel()).view_as(score)
        return score

    def prune(self, linear: LinearView, budget: WeightBudget, generator: torch.Generator) -> WeightEdit:
        """Remove what scores lowest in the matrix, as many as its share says."""
        return lowest(self.score(linear), budget, "layer", variant=False)
