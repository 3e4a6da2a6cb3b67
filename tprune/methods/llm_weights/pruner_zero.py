"""Pruner-Zero: the metric that a genetic programme found, squared weights times min-max scaled gradients.

Of all expressions over weights, gradients and input norms that were tried on LLaMA-2-7B, this short one, without any
activation, gave the lowest perplexity after pruning.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tprune.core.weights import WeightEdit
from tprune.methods.base import Paper, param
from tprune.methods.llm_weights._scores import lowest
from tprune.methods.views import LinearView
from tprune.methods.weights import WeightBudget, WeightMethod


@dataclass(frozen=True)
class PrunerZero(WeightMethod):
    """W² · (G - min G) / (max G - min G), compared per output."""

    paper = Paper(
        title="Pruner-Zero: Evolving Symbolic Pruning Metric from scratch for Large Language Models",
        venue="ICML",
        year=2024,
        arxiv="2406.02924",
        code="github.com/pprp/Pruner-Zero",
        checked="code",
        notes="The published metric; the search is not here. Gradients are of the calibration text (the code's are of "
        "WikiText-2), kept in float32 (the code stores float16).",
    )
    kind = "calibrated"
    stats = ("gradient",)

    group: str = param(
        "row", "What is compared: every output row, or the whole layer", choices=("row", "layer")
    )
    variant: bool = param(
        False, "Let rows lose different numbers, by a share of their summed scores (appendix of Wanda)"
    )

    def score(self, linear: LinearView) -> Tensor:
        """The square of every weight times its gradient, scaled to 0 to 1 over the layer, or alone."""
        low, high = linear.gradient.aminmax()
        scaled = torch.where(high > low, (linear.gradient - low) / (high - low), 1.0)
        return linear.weight.square() * scaled

    def prune(self, linear: LinearView, budget: WeightBudget, generator: torch.Generator) -> WeightEdit:
        """Remove what scores lowest in every row."""
        return lowest(self.score(linear), budget, self.group, self.variant)
