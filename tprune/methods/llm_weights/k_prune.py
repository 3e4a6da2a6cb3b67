"""K-prune: prune a tuned encoder sublayer by sublayer, by what its units know, and fit each anew to the dense one.

A unit knows of the answers what they would lose with it, and of the representation what it adds to it. From the bottom
up each sublayer keeps the units above a threshold over all that are left, and least squares make its output, on inputs
that pruning has changed already, the dense model's again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tprune.core.select import threshold_by_cost
from tprune.core.solve import least_squares
from tprune.core.units import columns_of
from tprune.core.weights import HALF_OF, StructureEdit
from tprune.methods.base import Paper, param
from tprune.methods.weight_view import ModelView, Place, Sublayer, UnitView
from tprune.methods.weights import WeightBudget, WeightMethod


@dataclass(frozen=True)
class KPrune(WeightMethod):
    """Heads and channels by predictive and representational knowledge."""

    paper = Paper(
        title="Accurate Retraining-free Pruning for Pretrained Encoder-based Language Models",
        venue="ICLR",
        year=2024,
        arxiv="2308.03449",
        code="snudm-starlab/K-prune",
        checked="code",
        notes="The budget and the cost of a unit are weights, not FLOPs. A model without classes is compared by the "
        "squared error of its embeddings. Singular normal equations are solved by a pseudo-inverse, where the code "
        "leaves a sublayer untuned.",
    )
    kind = "calibrated"
    scope = "model"
    units = ("heads", "channels")
    runs_on = ("encoder",)
    teacher = True
    uniform = False
    patterns = False

    predictive: float = param(1.0, "Weight of what a unit knows of the answers", low=0)
    representational: float = param(2.5e-4, "Weight of what it knows of the representation", low=0)
    heads: float = param(64.0, "How much more heads count than channels", low=0)
    temperature: float = param(2.0, "Of the answers", low=1e-3)
    batch: int = param(32, "Sequences of which gradients are taken together", low=1)
    tune: bool = param(True, "Fit every sublayer anew to the dense model's outputs")

    def plan(self, model: ModelView, budget: WeightBudget) -> list[StructureEdit]:
        """Sublayer by sublayer, attention before the MLP."""
        if budget.sparsity == 0:
            return []
        units = {(block.index, kind): unit for block in model.blocks for kind, unit in block.units.items()}
        left = (1 - budget.sparsity) * sum(unit.cost * unit.count for unit in units.values())
        edits = {block.index: StructureEdit(block.index) for block in model.blocks}
        teacher, places = model.teacher(self.batch), list(units)
        for at, place in enumerate(places):
            seen = teacher.sublayer(list(edits.values()), place, self.temperature)
            scores = [self.score(units[one], seen, one) for one in places[at:]]
            costs = [torch.full((units[one].count,), units[one].cost) for one in places[at:]]
            threshold = threshold_by_cost(torch.cat(scores), torch.cat(costs), left)
            keep = (scores[0] > threshold).nonzero().flatten()
            left -= len(keep) * units[place].cost
            edits[place[0]] = self.without(edits[place[0]], place[1], units[place], keep, seen)
        return list(edits.values())

    def score(self, unit: UnitView, seen: Sublayer, place: Place) -> Tensor:
        """The knowledge of every unit by weight of it, [U]: the mean over its columns."""
        representation = seen.squares[place] * unit.weight.square().mean(0)
        known = self.representational * representation + self.predictive * seen.answers[place]
        return known.view(-1, unit.width).mean(1) * (self.heads if unit.kind == "heads" else 1.0) / unit.cost

    def without(
        self, edit: StructureEdit, kind: str, unit: UnitView, keep: Tensor, seen: Sublayer
    ) -> StructureEdit:
        """The edit, which keeps these units of a kind, too; without any the sublayer is its norm alone."""
        if not len(keep):
            return replace(edit, halves=(*edit.halves, HALF_OF[kind]))
        weight = edit.weight
        if self.tune:
            columns = columns_of(keep, unit.width)
            read = seen.features[:, columns].double()
            fitted = least_squares(read.T @ read, read.T @ seen.target.double())
            weight = {**weight, kind: fitted.T.float()}
        return replace(edit, keep={**edit.keep, kind: keep}, weight=weight)
