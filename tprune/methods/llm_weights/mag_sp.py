"""Magnitude, structured: remove the heads and channels that the next projection reads with the smallest weights."""

from __future__ import annotations

from dataclasses import dataclass

from tprune.core.weights import StructureEdit
from tprune.methods.base import Paper
from tprune.methods.llm_weights._width import same_share, score_units, sums
from tprune.methods.weight_view import ModelView
from tprune.methods.weights import WeightBudget, WeightMethod


@dataclass(frozen=True)
class MagSP(WeightMethod):
    """The same share of heads and channels in every block, by the norms of the columns that read them."""

    paper = Paper(
        title="Fluctuation-based Adaptive Structured Pruning for Large Language Models (its baseline Magnitude-SP)",
        venue="AAAI",
        year=2024,
        arxiv="2312.11983",
        code="CASIA-IVA-Lab/FLAP",
        checked="code",
        notes="A unit under grouped queries is a whole key-value group. What heads leave of the budget, whose shares "
        "round down, channels take; at the authors' ratios that is nothing.",
    )
    scope = "model"
    runs_on = ("plain", "vision")
    units = ("heads", "channels")
    patterns = False

    def plan(self, model: ModelView, budget: WeightBudget) -> list[StructureEdit]:
        """Norms of columns, summed over a head's."""
        scores = score_units(model.blocks, lambda unit: sums(unit.weight.norm(dim=0), unit))
        total = sum(block.parameters for block in model.blocks)
        return same_share(model.blocks, scores, budget.sparsity, total)
