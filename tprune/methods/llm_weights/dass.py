"""DaSS: prune the MLPs of gated models alone, and weigh the rows that make a channel by how loud the channel is.

What a row of the gate and up projections is worth shows behind the activation: in the norm of the channel it makes,
where the down projection reads it. A factor per row only tells where rows compete, so gate and up are compared along
their outputs, within every input; down is pruned as Wanda does.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tprune.core.mask import weight_mask
from tprune.core.weights import WeightEdit
from tprune.methods.base import Paper, param
from tprune.methods.weight_view import LinearView
from tprune.methods.weights import WeightBudget, WeightMethod


@dataclass(frozen=True)
class DaSS(WeightMethod):
    """|W| · ‖z‖^α by channel before the activation, |W| · ‖z‖ behind it."""

    paper = Paper(
        title="Dependency-Aware Semi-Structured Sparsity of GLU Variants in Large Language Models",
        venue="TMLR",
        year=2025,
        arxiv="2405.01943",
        code="guozhiyu/glu_dass",
        checked="code",
        notes="Attention stays dense; the sparsity is of the MLPs. MLPs without a gate are pruned by the same rule, "
        "experts each by their own channels.",
    )
    kind = "calibrated"
    stats = ("norm",)
    part = "mlp"
    groups_outputs = True

    alpha: float = param(0.5, "Exponent of a channel's norm in the scores of the rows that make it", low=0)

    def score(self, linear: LinearView) -> Tensor:
        """The magnitude times the norm of the channel that a weight takes part in."""
        if linear.channel_norm is None:
            return linear.weight.abs().mul_(linear.norm)
        return linear.weight.abs().mul_(linear.channel_norm.pow(self.alpha).unsqueeze(1))

    def prune(self, linear: LinearView, budget: WeightBudget, generator: torch.Generator) -> WeightEdit:
        """Compare every input's weights to the channels, or every output's from them."""
        score = self.score(linear)
        if linear.channel_norm is None:
            return WeightEdit(weight_mask(score, budget.sparsity, budget.pattern))
        return WeightEdit(weight_mask(score.t().contiguous(), budget.sparsity, budget.pattern).t())
