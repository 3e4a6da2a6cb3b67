"""Gradient head pruning: remove the attention heads whose outputs the loss depends on least, in a tuned encoder."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tprune.core.weights import StructureEdit
from tprune.methods.base import Paper, param
from tprune.methods.llm_weights._width import one_budget
from tprune.methods.weight_view import BlockView, ModelView
from tprune.methods.weights import WeightBudget, WeightMethod


@dataclass(frozen=True)
class MBertHeads(WeightMethod):
    """The heads of smallest gradient, compared between 0 and 1 in every layer."""

    paper = Paper(
        title="Pruning for Performance: Efficient Idiom and Metaphor Classification in Low-Resource Konkani Using "
        "mBERT",
        venue="arXiv",
        year=2025,
        arxiv="2506.02005",
        code="t1modo/KonkaniNLP",
        checked="code",
        notes="The code takes gradients behind whole layers and calls slices of them heads; official=true does so, the "
        "default takes them where heads are, at the input of their output projection. Without dropout, and with a "
        "budget: a share of one head per layer is the paper's. Every block keeps at least one head.",
    )
    kind = "calibrated"
    scope = "model"
    stats = ("sensitivity",)
    units = ("heads",)
    uniform = False
    patterns = False

    official: bool = param(False, "Take gradients behind the layer, as the authors' code does")

    def plan(self, model: ModelView, budget: WeightBudget) -> list[StructureEdit]:
        """Rank the heads of all blocks together."""
        scores = {(block.index, "heads"): self.score(block) for block in model.blocks}
        total = sum(block.parameters for block in model.blocks)
        return one_budget(model.blocks, scores, budget.sparsity, total)

    def score(self, block: BlockView) -> Tensor:
        """Σ of squared gradients over each head, between 0 and 1: [U]."""
        unit = block.units["heads"]
        gradients = block.sensitivity if self.official else unit.sensitivity
        squares = gradients.view(unit.count, -1).sum(1)
        return (squares - squares.min()) / (squares.max() - squares.min() + 1e-9)
