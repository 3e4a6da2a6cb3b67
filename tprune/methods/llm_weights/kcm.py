"""KCM: remove the channels of MLPs that others can stand for and that are seldom active, without gradients or labels.

How much a channel is needed is read off the columns of the projection behind it, as the weight that each has in
representing itself among all; how much it is used is its mean activation. Their product ranks all layers' channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tprune.core.representative import representativeness
from tprune.core.weights import StructureEdit
from tprune.methods.base import Paper, param
from tprune.methods.llm_weights._width import one_budget, same_share, score_units
from tprune.methods.weight_view import ModelView, UnitView
from tprune.methods.weights import WeightBudget, WeightMethod


@dataclass(frozen=True)
class KCM(WeightMethod):
    """The channels of smallest representativeness times activation, wherever they are."""

    paper = Paper(
        title="Gradient-Free Structured Pruning with Unlabeled Data",
        venue="ICML",
        year=2023,
        arxiv="2303.04185",
        checked="paper",
        notes="No code of the authors is public; what the formula leaves open, both factors between 0 and 1 in every "
        "layer, is a public port's. The budget counts weights, not FLOPs, and the scaling of masks is left out. "
        "Every block keeps at least one channel.",
    )
    kind = "calibrated"
    scope = "model"
    runs_on = ("plain", "vision")
    stats = ("moments",)
    units = ("channels",)
    propagate = "dense"
    patterns = False

    width: float = param(1.0, "Width of the Gaussian kernel between columns", low=1e-6)
    tolerance: float = param(
        0.01, "The mixtures stand still when their sum changes by less than this", low=1e-6
    )
    activation: str = param(
        "min-max",
        "How mean activations are made comparable in a layer: min-max, z-score or l2",
        choices=("min-max", "z-score", "l2"),
    )

    def plan(self, model: ModelView, budget: WeightBudget) -> list[StructureEdit]:
        """Rank the channels of all blocks together."""
        scores = score_units(model.blocks, self.score)
        total = sum(block.parameters for block in model.blocks)
        return (same_share if model.uniform else one_budget)(model.blocks, scores, budget.sparsity, total)

    def score(self, unit: UnitView) -> Tensor:
        """R2 · D2 of every channel, [U]."""
        needed = _min_max(representativeness(unit.weight.t(), self.width, self.tolerance))
        used = unit.mean
        if self.activation == "min-max":
            return needed * _min_max(used)
        if self.activation == "l2":
            return needed * used / used.norm().clamp_min(torch.finfo(used.dtype).tiny)
        return needed * (used - used.mean()) / used.std().clamp_min(1e-12)


def _min_max(values: Tensor) -> Tensor:
    """`values` [N] between 0 and 1; 0 where all are equal."""
    low, high = values.aminmax()
    return (values - low) / (high - low).clamp_min(torch.finfo(values.dtype).tiny)
