"""RIA: a weight counts by its part in its row and in its column, times a root of its input's norm.

Magnitudes compared as they are leave whole channels without a weight; what each weight is to its own input and its own
output keeps them. The root keeps loud inputs from deciding alone.
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
class RIA(WeightMethod):
    """(|W| / Σ|W| of its row + |W| / Σ|W| of its column) · ‖X‖^power, compared over the layer."""

    paper = Paper(
        title="Plug-and-Play: An Efficient Post-training Pruning Method for Large Language Models",
        venue="ICLR",
        year=2024,
        code="biomedical-cybernetics/Relative-importance-and-activation-pruning",
        checked="code",
        notes="Over a layer the authors' threshold takes one weight more than the fraction. Their permutation of inputs"
        " before n:m, which the layers before would have to follow, is left out.",
    )
    kind = "calibrated"
    stats = ("norm",)

    power: float = param(0.5, "Of the input's norm; 0: relative importance alone", low=0)
    group: str = param(
        "layer", "What is compared: every output row, or the whole layer", choices=("row", "layer")
    )

    def score(self, linear: LinearView) -> Tensor:
        """The sum of a weight's parts in its row and its column, times the root of its input's norm, [R, C]."""
        magnitude = linear.weight.abs()
        rows, columns = (_inverse(magnitude.sum(dim, keepdim=True)) for dim in (1, 0))
        return (rows + columns).mul_(linear.norm.pow(self.power)).mul_(magnitude)

    def prune(self, linear: LinearView, budget: WeightBudget, generator: torch.Generator) -> WeightEdit:
        """Remove what scores lowest."""
        return lowest(self.score(linear), budget, self.group, False)


def _inverse(total: Tensor) -> Tensor:
    """One over it, and 0 where nothing is summed."""
    return torch.where(total > 0, 1 / total, 0.0)
