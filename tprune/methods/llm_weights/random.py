"""Random: remove weights drawn at random, the floor every criterion must beat.

Each matrix draws from a generator of its own, seeded by the recipe's seed and the matrix's name, so the result
does not depend on the order in which matrices are visited.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tprune.core.mask import weight_mask
from tprune.core.weights import WeightEdit
from tprune.methods.base import Paper, param
from tprune.methods.weight_view import LinearView
from tprune.methods.weights import WeightBudget, WeightMethod


@dataclass(frozen=True)
class Random(WeightMethod):
    """Uniform noise as the score."""

    paper = Paper(
        title="Random pruning (baseline)", venue="the control of nearly every paper of this family", year=2023
    )

    kind = "baseline"

    group: str = param(
        "row", "What loses the same fraction: every row, or the whole layer", choices=("row", "layer")
    )

    def prune(self, linear: LinearView, budget: WeightBudget, generator: torch.Generator) -> WeightEdit:
        """Score every weight by a uniform draw."""
        score = torch.rand(linear.weight.shape, generator=generator).to(linear.weight.device)
        return WeightEdit(weight_mask(score, budget.sparsity, budget.pattern, self.group))
