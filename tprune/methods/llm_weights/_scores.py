"""What methods that score every weight share: Wanda's way of comparing the scores."""

from __future__ import annotations

from torch import Tensor

from tprune.core.mask import cumulative_mask, weight_mask
from tprune.core.weights import WeightEdit
from tprune.methods.weights import WeightBudget


def lowest(score: Tensor, budget: WeightBudget, group: str, variant: bool) -> WeightEdit:
    """Remove the weights with the lowest scores [R, C].

    Args:
        score: not negative.
        budget: a fraction or a pattern.
        group: what is compared, "row" or "layer".
        variant: under a fraction, let rows lose different numbers, by a share of their summed scores.
    """
    if variant and budget.pattern is None and budget.sparsity > 0:
        return WeightEdit(cumulative_mask(score, budget.sparsity))
    return WeightEdit(weight_mask(score, budget.sparsity, budget.pattern, group))
