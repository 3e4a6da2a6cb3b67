"""Mini-GPTs: what a domain's text hardly switches on is not needed in that domain.

A channel of an MLP whose mean magnitude over the domain's tokens stays under a threshold goes, with all that feeds and
reads it; one threshold for all blocks, so that those lose most which the domain uses least.
"""

from __future__ import annotations

from dataclasses import dataclass

from tprune.core.weights import StructureEdit
from tprune.methods.base import Paper
from tprune.methods.llm_weights._width import one_budget, same_share, score_units
from tprune.methods.weight_view import ModelView
from tprune.methods.weights import WeightBudget, WeightMethod


@dataclass(frozen=True)
class MiniGPTs(WeightMethod):
    """Channels by their mean magnitude, over the whole model."""

    paper = Paper(
        title="Mini-GPTs: Efficient Large Language Models through Contextual Pruning",
        venue="arXiv",
        year=2023,
        arxiv="2312.12682",
        code="tval2/contextual-pruning",
        checked="code",
        notes="The authors zero rows and columns of every linear layer; here those go that can go from the model, the "
        "channels of MLPs, which in theirs are a column of the reader and, by the activation, a row of the feeder. The "
        "threshold follows from the budget. Rows of the vocabulary stay. Every block keeps a channel. Their training "
        "on the domain is --recover full.",
    )
    kind = "calibrated"
    scope = "model"
    runs_on = ("plain", "vision")
    stats = ("absolute",)
    units = ("channels",)
    propagate = "dense"
    patterns = False

    def plan(self, model: ModelView, budget: WeightBudget) -> list[StructureEdit]:
        """The channels of the lowest mean magnitude in all blocks; of every block as many, where all must be alike."""
        scores = score_units(model.blocks, lambda unit: unit.absolute)
        choose = same_share if model.uniform else one_budget
        return choose(model.blocks, scores, budget.sparsity, sum(block.parameters for block in model.blocks))
