"""DERN: drop the experts that the router uses least, and merge their neurons into those of the others.

Whole experts do not match one another, single neurons do: each neuron of an expert that leaves goes to the neuron
most like it, in whichever expert that is, and becomes part of its weighted mean.
"""

from __future__ import annotations

from dataclasses import dataclass

from tprune.core.recombine import recombine
from tprune.core.select import complement, top
from tprune.core.weights import StructureEdit
from tprune.errors import UserError
from tprune.methods.base import Paper, param
from tprune.methods.llm_weights._width import check_reach
from tprune.methods.weight_view import BlockView, ExpertView, ModelView
from tprune.methods.weights import WeightBudget, WeightMethod


@dataclass(frozen=True)
class DERN(WeightMethod):
    """As many experts from every block, nearest to the budget; what is left has the width it had."""

    paper = Paper(
        title="Dropping Experts, Recombining Neurons: Retraining-Free Pruning for Sparse Mixture-of-Experts LLMs",
        venue="Findings of EMNLP",
        year=2025,
        arxiv="2509.10377",
        checked="abstract",
        notes="No code is public, and of the paper the abstract alone was to be had: that router statistics choose, "
        "that neurons join the most compatible one and that they are merged is its; the cosine, its threshold, the "
        "weighted mean and how statistics are put together are a reconstruction.",
    )
    kind = "calibrated"
    scope = "model"
    stats = ("routing",)
    units = ("experts",)
    propagate = "dense"
    patterns = False

    usage: str = param(
        "worth",
        "What ranks experts: worth, the sum of their routing weights; uses, how many tokens they get",
        choices=("worth", "uses"),
    )
    least: float = param(0.4, "Neurons that are like none by this cosine are dropped", low=-1, high=2)
    by_part: bool = param(False, "Compare gate, up and down each at length one")

    def plan(self, model: ModelView, budget: WeightBudget) -> list[StructureEdit]:
        """The same number of experts from every block that has some."""
        blocks = [block for block in model.blocks if block.experts is not None]
        if not blocks:
            raise UserError("dern removes experts, and this model has none; choose a mixture such as Mixtral")
        total = sum(block.parameters for block in model.blocks)
        step = sum(block.experts.cost for block in blocks) / total
        check_reach(budget.sparsity, (blocks[0].experts.count - 1) * step, "an expert of each block")
        gone = round(budget.sparsity / step)
        return [self.edit(block, block.experts, gone) for block in blocks] if gone else []

    def edit(self, block: BlockView, experts: ExpertView, gone: int) -> StructureEdit:
        """One block without its `gone` experts of least use, whose neurons the others take in."""
        usage = getattr(experts, self.usage)
        keep = top(usage, experts.count - gone)
        leave = complement(keep[None], experts.count)[0]
        merged = recombine(
            experts.neurons(keep.tolist()),
            usage[keep],
            (experts.neurons([expert])[0] for expert in leave.tolist()),
            usage[leave],
            self.least,
            self.by_part,
        )
        return StructureEdit(
            block.index, keep={"experts": keep}, weight={"experts": merged.to(experts.dtype)}
        )
