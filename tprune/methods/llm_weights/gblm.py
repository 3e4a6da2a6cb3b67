"""GBLM-Pruner: Wanda's score plus the magnitude times the gradient of the loss.

What a weight does to the output of its layer (Wanda) says nothing of what the layers behind make of it; the gradients
of the dense model's loss do, from one backward pass per calibration sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tprune.core.weights import WeightEdit
from tprune.methods.base import Paper, param
from tprune.methods.llm_weights._scores import lowest
from tprune.methods.weight_view import LinearView
from tprune.methods.weights import WeightBudget, WeightMethod


@dataclass(frozen=True)
class Gblm(WeightMethod):
    """|W| · (‖X‖ / sqrt(N) + scale · ‖G‖), compared per output."""

    paper = Paper(
        title="Beyond Size: How Gradients Shape Pruning Decisions in Large Language Models",
        venue="arXiv",
        year=2023,
        arxiv="2311.04902",
        code="VILA-Lab/GBLM-Pruner",
        checked="code",
        notes="Gradients are kept in float32 (the code stores float16) and the model stays in eval mode. As in the "
        "code the gradients are summed over the calibration sequences and the norms averaged: with other than the "
        "paper's 128 sequences the balance of the two terms shifts.",
    )
    kind = "calibrated"
    stats = ("norm", "gradient")

    scale: float = param(100.0, "What gradients are multiplied by (the paper's α)", low=0)
    metric: str = param(
        "gblm",
        "gblm: both terms; gradient: magnitude x gradient; inverse: Wanda's score over the gradient (ablation)",
        choices=("gblm", "gradient", "inverse"),
    )
    group: str = param(
        "row", "What is compared: every output row, or the whole layer", choices=("row", "layer")
    )
    variant: bool = param(
        False, "Let rows lose different numbers, by a share of their summed scores (appendix of Wanda)"
    )

    def score(self, linear: LinearView) -> Tensor:
        """The magnitude of every weight times the norm of its input, of its gradient, or both."""
        magnitude, gradient = linear.weight.abs(), linear.gradient * self.scale
        if self.metric == "gradient":
            return magnitude * gradient
        norm = linear.norm / max(linear.sequences, 1) ** 0.5
        if self.metric == "inverse":
            return magnitude * norm / (gradient + 1e-8)
        return magnitude * norm + magnitude * gradient

    def prune(self, linear: LinearView, budget: WeightBudget, generator: torch.Generator) -> WeightEdit:
        """Remove what scores lowest in every row."""
        return lowest(self.score(linear), budget, self.group, self.variant)
