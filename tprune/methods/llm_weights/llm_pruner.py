"""LLM-Pruner: remove the heads and channels without which the loss would change least, by its gradient.

What must go together is one group, q, k, v and o of a head, gate, up and down of a channel; its importance is the
first (and second) order change of the loss when its weights become zero, added up over the group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tprune.core.weights import StructureEdit
from tprune.errors import UserError
from tprune.methods.base import Paper, param
from tprune.methods.llm_weights._width import same_share, score_units
from tprune.methods.weight_view import MemberView, ModelView, UnitView
from tprune.methods.weights import WeightBudget, WeightMethod

ACROSS = {"sum": Tensor.sum, "mean": Tensor.mean, "max": Tensor.amax, "prod": Tensor.prod}
"""How the importances that a group has in its matrices become one."""


@dataclass(frozen=True)
class LLMPruner(WeightMethod):
    """The same share of heads and channels in every block of the middle."""

    paper = Paper(
        title="LLM-Pruner: On the Structural Pruning of Large Language Models",
        venue="NeurIPS",
        year=2023,
        arxiv="2305.11627",
        code="horseee/LLM-Pruner",
        checked="code",
        notes="Block-wise and local, in one step; its other granularities and its global threshold are left out. Under "
        "grouped queries the heads of a key-value group are added up, where the code adds those of other groups. What "
        "heads leave of the budget, whose shares round down, channels take. The authors train on: --recover lora.",
    )
    kind = "calibrated"
    scope = "model"
    runs_on = ("plain", "vision")
    units = ("heads", "channels")
    patterns = False

    taylor: str = param(
        "first",
        "first: |w g|; second: |w² F|, F the mean squared gradient; mix: |w g - w² F / 2|; vectorize: |Σ w g| of a row",
        choices=("first", "second", "mix", "vectorize"),
    )
    reduction: str = param("sum", "How the matrices of a group are put together", choices=tuple(ACROSS))
    first: int = param(4, "So many first blocks, of 32, stay as they are", low=0)
    last: int = param(2, "So many last blocks, of 32, stay as they are", low=0)

    @property
    def stats(self) -> tuple[str, ...]:
        """The gradients that the chosen order of the expansion needs."""
        return {"second": ("gradient_square",), "mix": ("gradient_mean", "gradient_square")}.get(
            self.taylor, ("gradient_mean",)
        )

    def plan(self, model: ModelView, budget: WeightBudget) -> list[StructureEdit]:
        """Importance of every unit in the range; the same share goes from each of its blocks."""
        depth = len(model.blocks)
        ends = (0, 0) if model.uniform else (round(self.first * depth / 32), round(self.last * depth / 32))
        blocks = model.blocks[ends[0] : depth - ends[1]]
        if not blocks:
            raise UserError(
                f"llm-pruner: first={self.first} and last={self.last} of 32 blocks leave none to prune; lower them"
            )
        scores = score_units(blocks, self.score)
        return same_share(blocks, scores, budget.sparsity, sum(block.parameters for block in model.blocks))

    def score(self, unit: UnitView) -> Tensor:
        """The importance of every unit, [U]: summed over its channels, of which each is a group for itself."""
        channels = unit.width // unit.heads
        parts = [
            self.saliency(member).unflatten(1, (-1, channels)).sum(1) for member in unit.members()
        ]  # [U, channels] each
        return ACROSS[self.reduction](torch.stack(parts), 0).sum(1)

    def saliency(self, member: MemberView) -> Tensor:
        """What the loss changes when a row (a column of the output projection) becomes zero, [U, R]."""
        weight = member.weight
        if self.taylor == "vectorize":
            return (weight * member.gradient).sum(2).abs()
        change = 0.0 if member.gradient is None else weight * member.gradient
        if self.taylor != "first":
            second = weight.square() * member.square
            change = second if self.taylor == "second" else change - second / 2
        return change.abs().sum(2)
