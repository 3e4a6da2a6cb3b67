"""SLEB: remove whole blocks one after the other, each time the one whose absence costs least.

What a block is worth is seen only in what the model says without it, and changes with every block that has gone:
so the loss is measured again for all that are left.
"""

from __future__ import annotations

from dataclasses import dataclass

from tprune.core.weights import StructureEdit
from tprune.methods.base import Paper, param
from tprune.methods.llm_weights._depth import blocks_to_remove, cheapest
from tprune.methods.weight_view import ModelView
from tprune.methods.weights import WeightBudget, WeightMethod


@dataclass(frozen=True)
class SLEB(WeightMethod):
    """round(s · L) blocks, greedily, by the loss of the model without them."""

    paper = Paper(
        title="SLEB: Streamlining LLMs through Redundancy Verification and Elimination of Transformer Blocks",
        venue="ICML",
        year=2024,
        arxiv="2402.09025",
        code="leapingjagg-dev/SLEB",
        checked="code",
        notes="The authors join 128 rows of WikiText-2 and cut them into windows of the model's length.",
    )
    kind = "calibrated"
    scope = "model"
    measures = True
    patterns = False

    early_barrier: int = param(1, "of the blocks that are left, so many first ones stay", low=0)
    latter_barrier: int = param(1, "so many last ones stay", low=0)

    def plan(self, model: ModelView, budget: WeightBudget) -> list[StructureEdit]:
        """The loss is always that of the model without all that have gone before."""
        alive = list(range(len(model.blocks)))
        kept = max(1, self.early_barrier + self.latter_barrier)
        gone: list[StructureEdit] = []
        for _ in range(blocks_to_remove(budget.sparsity, len(alive), kept)):
            candidates = alive[self.early_barrier : len(alive) - self.latter_barrier]
            edits = [StructureEdit(index, removed=True) for index in candidates]
            gone.append(edits[cheapest(model, gone, edits)])
            alive.remove(gone[-1].block)
        return gone
