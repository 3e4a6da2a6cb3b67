"""Wanda, structured: remove the heads and channels whose weights times activations are smallest."""

from __future__ import annotations

from dataclasses import dataclass

from tprune.core.weights import StructureEdit
from tprune.methods.base import Paper
from tprune.methods.llm_weights._width import same_share, score_units, sums
from tprune.methods.weight_view import ModelView
from tprune.methods.weights import WeightBudget, WeightMethod


@dataclass(frozen=True)
class WandaSP(WeightMethod):
    """The same share of heads and channels in every block; what is left feeds the next."""

    paper = Paper(
        title="Fluctuation-based Adaptive Structured Pruning for Large Language Models (its baseline Wanda-SP)",
        venue="AAAI",
        year=2024,
        arxiv="2312.11983",
        code="CASIA-IVA-Lab/FLAP",
        checked="code",
        notes="As the code, which scores heads and channels of a block before it removes either. A unit under grouped "
        "queries is a whole key-value group. What heads leave of the budget, whose shares round down, channels take; "
        "at the authors' ratios that is nothing.",
    )
    kind = "calibrated"
    scope = "model"
    runs_on = ("plain", "vision")
    stats = ("norm",)
    units = ("heads", "channels")
    propagate = "pruned"
    patterns = False

    def plan(self, model: ModelView, budget: WeightBudget) -> list[StructureEdit]:
        """Mean |weight| of a column times the norm of its input, summed over a head's columns."""
        scores = score_units(model.blocks, lambda unit: sums(unit.weight.abs().mean(0) * unit.norm, unit))
        total = sum(block.parameters for block in model.blocks)
        return same_share(model.blocks, scores, budget.sparsity, total)
