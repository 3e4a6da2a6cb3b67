"""Magnitude: remove the weights of smallest absolute value in each layer.

The classic criterion, which needs no data; it fails on language models, whose few outlier features make small
weights matter.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tprune.core.mask import inclusive_mask, weight_mask
from tprune.core.select import floor_count
from tprune.core.weights import WeightEdit
from tprune.methods.base import Paper, param
from tprune.methods.weight_view import LinearView
from tprune.methods.weights import WeightBudget, WeightMethod


@dataclass(frozen=True)
class Magnitude(WeightMethod):
    """|W|, one threshold per layer."""

    paper = Paper(
        title="Learning both Weights and Connections for Efficient Neural Networks",
        venue="NeurIPS",
        year=2015,
        arxiv="1506.02626",
        code="locuslab/wanda",
        checked="code",
        notes="The layer-wise baseline of Wanda's code; its inclusive rule, which removes one weight too many and "
        "all ties, is rule=inclusive.",
    )

    kind = "baseline"

    group: str = param("layer", "What is compared: the whole layer, or every row", choices=("layer", "row"))
    rule: str = param(
        "exact",
        "exact: the count asked for; inclusive: the threshold too, as in the authors' code (layer only)",
        choices=("exact", "inclusive"),
    )

    def score(self, linear: LinearView) -> Tensor:
        """The absolute value."""
        return linear.weight.abs()

    def prune(self, linear: LinearView, budget: WeightBudget, generator: torch.Generator) -> WeightEdit:
        """Remove the weights of the smallest absolute values."""
        score = self.score(linear)
        if self.rule == "inclusive" and budget.pattern is None and self.group == "layer":
            return WeightEdit(inclusive_mask(score, floor_count(score.numel(), budget.sparsity)))
        return WeightEdit(weight_mask(score, budget.sparsity, budget.pattern, self.group))
