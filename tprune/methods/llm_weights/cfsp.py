"""CFSP: blocks that turn the residual stream more keep wider MLPs; in each, the most active channels stay.

Coarse: how far a block turns its tokens says how wide it shall be. Fine: the norm of what a channel hands on says
whether it stays. Both come from one forward pass.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tprune.core.allocate import widths_by_importance
from tprune.core.weights import StructureEdit
from tprune.methods.base import Paper, param
from tprune.methods.llm_weights._width import check_reach, keep_best
from tprune.methods.weight_view import ModelView, UnitView
from tprune.methods.weights import WeightBudget, WeightMethod

TOKENS = 128 * 1024 / 1e4
"""The authors sum angles over their 128 sequences of 1,024 tokens and divide by 10,000; here they are means."""


@dataclass(frozen=True)
class CFSP(WeightMethod):
    """Widths of MLPs by the importance of blocks, channels by their activation; attention stays."""

    paper = Paper(
        title="CFSP: An Efficient Structured Pruning Framework for LLMs with Coarse-to-Fine Activation Information",
        venue="COLING",
        year=2025,
        arxiv="2409.13199",
        code="wyxscir/CFSP",
        checked="code",
        notes="The authors weigh activations by normalised weights of gate, up and down. Each of these sums to one "
        "over the axis that is averaged afterwards: the norm of the activation is left, and is what is computed here. "
        "Widths are clamped to one step and the whole, where their code indexes past an end. The budget is of all "
        "weights, theirs of the MLPs'. Their recovery, with ranks by importance, is left out.",
    )
    kind = "calibrated"
    scope = "model"
    runs_on = ("plain", "vision")
    stats = ("norm", "similarity", "angle")
    units = ("channels",)
    propagate = "dense"
    patterns = False

    importance: str = param(
        "angular",
        "Of a block: angular, cosine (one minus it), or constant, which makes all equally wide",
        choices=("angular", "cosine", "constant"),
    )
    metric: str = param(
        "activation",
        "Of a channel: activation, or wanda (|weight| x activation)",
        choices=("activation", "wanda"),
    )
    sharpness: float = param(1.0, "How much widths differ for blocks of different importance (a)", low=0)
    multiple: int = param(
        128, "Widths are multiples of this; 1 for the code's rule without cuda_friendly", low=1
    )

    def plan(self, model: ModelView, budget: WeightBudget) -> list[StructureEdit]:
        """Widths of all blocks, then the best channels of each."""
        units = {block.index: block.units["channels"] for block in model.blocks}
        total = sum(block.parameters for block in model.blocks)
        whole = sum(unit.cost * unit.count for unit in units.values())
        check_reach(budget.sparsity, sum(unit.cost * (unit.count - 1) for unit in units.values()) / total)
        constant = model.uniform or self.importance == "constant"
        if constant:
            turned = [0.0 for _ in model.blocks]
        else:
            turned = [
                block.angle if self.importance == "angular" else 1 - block.similarity
                for block in model.blocks
            ]
        shares = widths_by_importance(turned, budget.sparsity * total / whole, self.sharpness * TOKENS)
        scores = {(index, "channels"): self.score(unit) for index, unit in units.items()}
        return [
            keep_best(block, scores, {"channels": self.width(units[block.index].count, share)})
            for block, share in zip(model.blocks, shares, strict=True)
        ]

    def width(self, count: int, share: float) -> int:
        """How many of `count` channels stay."""
        if self.multiple == 1:
            return min(int(count * share) + 1, count)
        rounded = int((count * share + self.multiple // 2) / self.multiple) * self.multiple
        return min(max(rounded, self.multiple), count)

    def score(self, unit: UnitView) -> Tensor:
        """What channels are compared by, [U]."""
        return unit.norm if self.metric == "activation" else unit.weight.abs().mean(0) * unit.norm
