"""DReSS: regularise what will go, so that it can be missed, and only then remove it.

Pruning a trained model throws away what its weights hold. A short training first, whose penalty is on the chosen units
alone, moves what they hold into the rest.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tprune.core.weights import StructureEdit
from tprune.methods.base import Paper, param
from tprune.methods.llm_weights._width import same_share, score_units, sums
from tprune.methods.weight_view import ModelView, UnitView
from tprune.methods.weights import Regularised, WeightBudget, WeightMethod


@dataclass(frozen=True)
class DReSS(WeightMethod):
    """The same share of heads and channels in every block, chosen beforehand, under a group penalty in training."""

    paper = Paper(
        title="DReSS: Data-driven Regularized Structured Streamlining for Large Language Models",
        venue="arXiv",
        year=2025,
        arxiv="2501.17905",
        checked="abstract",
        notes="A reconstruction: that a little data regularises what will be removed, before it is, is the abstract's; "
        "the choice, the group penalty and all numbers are ours. The fine-tuning after it, which the paper says can "
        "be left out, is --recover.",
    )
    kind = "trained"
    scope = "model"
    stats = ("norm",)
    units = ("heads", "channels")
    propagate = "dense"
    patterns = False

    select: str = param(
        "wanda",
        "What the units are chosen by: wanda (|weight| x activation), magnitude or random",
        choices=("wanda", "magnitude", "random"),
    )
    penalty: float = param(1e-3, "Weight of the penalty, the sum of the chosen units' norms", low=0)
    epochs: float = param(4.0, "Passes over the calibration sequences, fractions allowed", low=0)
    batch: int = param(8, "Sequences per step", low=1)
    lr: float = param(1e-4, "Peak learning rate of the blocks' matrices; a cosine takes it to 0", low=0)

    @property
    def regularised(self) -> Regularised:
        """How the model is trained between the choice and the removal."""
        return Regularised(self.penalty, self.epochs, self.batch, self.lr)

    def plan(self, model: ModelView, budget: WeightBudget) -> list[StructureEdit]:
        """The units that stay."""
        generator = torch.Generator().manual_seed(model.seed)
        scores = score_units(model.blocks, lambda unit: self.score(unit, generator))
        total = sum(block.parameters for block in model.blocks)
        return same_share(model.blocks, scores, budget.sparsity, total)

    def score(self, unit: UnitView, generator: torch.Generator) -> Tensor:
        """What units are compared by, [U]."""
        if self.select == "random":
            return torch.rand(unit.count, generator=generator).to(unit.weight.device)
        if self.select == "magnitude":
            return sums(unit.weight.norm(dim=0), unit)
        return sums(unit.weight.abs().mean(0) * unit.norm, unit)
