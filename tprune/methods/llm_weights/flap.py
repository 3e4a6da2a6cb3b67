"""FLAP: remove the heads and channels whose activations fluctuate least, and put their mean into a bias.

What hardly varies is nearly a constant, and a constant can be moved into the bias of the projection that reads
it; fluctuation times weight, standardised per layer, lets all layers compete for one budget.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tprune.core.budget import bisect
from tprune.core.select import floor_count, keep_by_cost, top
from tprune.core.weights import StructureEdit
from tprune.errors import BudgetError
from tprune.methods.base import Paper, param
from tprune.methods.views import ModelView, UnitView
from tprune.methods.weights import WeightBudget, WeightMethod


@dataclass(frozen=True)
class Flap(WeightMethod):
    """Fluctuation-based structured pruning with bias compensation."""

    paper = Paper(
        title="Fluctuation-based Adaptive Structured Pruning for Large Language Models",
        venue="AAAI",
        year=2024,
        arxiv="2312.11983",
        code="github.com/CASIA-IVA-Lab/FLAP",
        checked="code",
        notes="The variance is the paper's (fluctuation=running is the code's recurrence) and the unit at the "
        "threshold stays (rule=strict drops it, as the code does). Under grouped queries a unit is a whole key-value "
        "group. Every block keeps at least one unit of each kind; biases are added, not replaced.",
    )
    kind = "calibrated"
    scope = "model"
    stats = ("moments", "norm")
    units = ("heads", "channels")
    propagate = "dense"
    patterns = False

    metric: str = param(
        "wifv",
        "wifv: fluctuation x squared weights; ifv: fluctuation; wifn: |weights| x norm",
        choices=("wifv", "ifv", "wifn"),
    )
    structure: str = param(
        "al-am",
        "al-am: one budget for all layers; ul-um: the same fraction in every layer",
        choices=("al-am", "ul-um"),
    )
    fluctuation: str = param(
        "variance",
        "variance: the sample variance; running: the recurrence of the code",
        choices=("variance", "running"),
    )
    rule: str = param(
        "exact",
        "exact: nearest to the budget; strict: drop the unit at the threshold too",
        choices=("exact", "strict"),
    )
    compensate: bool = param(True, "Add the mean output of what is removed to a bias")

    def plan(self, model: ModelView, budget: WeightBudget) -> list[StructureEdit]:
        """Score all units, choose under the budget, compensate."""
        sites = [(block.index, unit) for block in model.blocks for unit in block.units.values()]
        total = sum(block.parameters for block in model.blocks)
        same = model.uniform or self.structure == "ul-um"
        choose = self.same_fraction if same else self.one_budget
        kept = choose([unit for _, unit in sites], budget.sparsity, total)
        edits = {block.index: StructureEdit(block.index) for block in model.blocks}
        for (index, unit), keep in zip(sites, kept, strict=True):
            edits[index].keep[unit.kind] = keep.nonzero().flatten()
            if self.compensate and not bool(keep.all()):
                gone = ~keep.repeat_interleave(unit.width)
                edits[index].bias[unit.kind] = unit.weight[:, gone] @ unit.mean[gone]
        return list(edits.values())

    def columns(self, unit: UnitView) -> Tensor:
        """The score of every input of the projection, [in]; attention's is squared."""
        fluctuation = unit.fluctuation if self.fluctuation == "running" else unit.variance
        if self.metric == "wifn":
            score = unit.weight.abs().mean(0) * unit.norm
        elif self.metric == "ifv":
            score = fluctuation
        else:
            score = fluctuation * unit.weight.square().sum(0)
        return score.square() if unit.kind == "heads" else score

    def score(self, unit: UnitView) -> Tensor:
        """The score of every unit, [U]: its standardised columns, averaged over a head and summed over a group."""
        columns = self.columns(unit)
        standard = (columns - columns.mean()) / columns.std().clamp_min(1e-12)
        return standard.view(-1, unit.heads, unit.width // unit.heads).mean(2).sum(1)

    def one_budget(self, sites: list[UnitView], sparsity: float, total: int) -> list[Tensor]:
        """Keep the best units of all layers and kinds until the kept weights come nearest to the budget."""
        scores = [self.score(unit) for unit in sites]
        costs = [torch.full((len(score),), unit.cost) for unit, score in zip(sites, scores, strict=True)]
        spent = sum(int(cost.sum()) for cost in costs)
        self.check(sparsity, sum(int(cost[1:].sum()) for cost in costs) / total)
        strict = self.rule == "strict" and sparsity > 0
        keep = keep_by_cost(torch.cat(scores).cpu(), torch.cat(costs), spent - sparsity * total, strict)
        parts = list(keep.to(scores[0].device).split([len(score) for score in scores]))
        for part, score in zip(parts, scores, strict=True):
            if not bool(part.any()):
                part[score.argmax()] = True
        return parts

    def same_fraction(self, sites: list[UnitView], sparsity: float, total: int) -> list[Tensor]:
        """Remove the same fraction of units everywhere, the one that comes nearest to the budget."""
        scores = [self.score(unit) for unit in sites]

        def removed(fraction: float) -> float:
            counts = (
                unit.cost * min(floor_count(len(s), fraction), len(s) - 1)
                for unit, s in zip(sites, scores, strict=True)
            )
            return sum(counts) / total

        self.check(sparsity, removed(1.0))
        fraction = bisect(removed, sparsity)
        kept = []
        for score in scores:
            count = len(score) - min(floor_count(len(score), fraction), len(score) - 1)
            kept.append(torch.zeros_like(score, dtype=torch.bool).index_fill_(0, top(score, count), True))
        return kept

    def check(self, sparsity: float, most: float) -> None:
        """Refuse what one unit per layer does not leave room for."""
        if sparsity > most:
            raise BudgetError(
                f"--sparsity {sparsity:g}: this model can lose at most {most:.4g} (a unit of each kind stays)",
                0.0,
                most,
            )
