"""BlockPruner: remove attentions and MLPs one after the other, each time the one whose absence costs least.

A block is two halves that add to the residual stream, and attention is often the redundant one: taken apart, each half
is worth what the model's perplexity says without it, measured again for all that are left.
"""

from __future__ import annotations

from dataclasses import dataclass

from tprune.core.weights import HALVES, StructureEdit
from tprune.methods.base import Paper, param
from tprune.methods.llm_weights._depth import halves_in_order
from tprune.methods.llm_weights._width import check_reach
from tprune.methods.weight_view import ModelView
from tprune.methods.weights import WeightBudget, WeightMethod


@dataclass(frozen=True)
class BlockPruner(WeightMethod):
    """Halves of blocks, greedily, by the perplexity of the model without them."""

    paper = Paper(
        title="BlockPruner: Fine-grained Pruning for Large Language Models",
        venue="arXiv",
        year=2024,
        arxiv="2406.10594",
        code="MrGGLS/BlockPruner",
        checked="code",
        notes="The authors give a number of halves; here they go, in the same order, until the removed weights come "
        "nearest to the budget. They search on 256 rows of Alpaca, joined and cut into windows of 2,048 tokens.",
    )
    kind = "calibrated"
    scope = "model"
    measures = True
    units = ("halves",)
    uniform = False
    patterns = False

    halves: str = param("both", "Which halves may go: both, attention or mlp", choices=("both", *HALVES))

    def plan(self, model: ModelView, budget: WeightBudget) -> list[StructureEdit]:
        """Perplexity is always that of the model without all that have gone before."""
        kinds = HALVES if self.halves == "both" else (self.halves,)
        sizes = {(block.index, kind): block.halves[kind] for block in model.blocks for kind in kinds}
        total = sum(block.parameters for block in model.blocks)
        check_reach(
            budget.sparsity, (sum(sizes.values()) - max(sizes.values())) / total, "one half of a block"
        )
        left, least = budget.sparsity * total, min(sizes.values())
        gone: dict[int, tuple[str, ...]] = {}
        order = halves_in_order(model, kinds) if least <= 2 * left else ()
        for edit in order:
            size = sizes[edit.block, edit.halves[0]]
            if size > 2 * left:
                break
            gone[edit.block] = gone.get(edit.block, ()) + edit.halves
            left -= size
            if least > 2 * left:
                break
        return [StructureEdit(index, halves=halves) for index, halves in sorted(gone.items())]
