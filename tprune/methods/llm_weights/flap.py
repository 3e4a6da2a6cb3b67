"""FLAP: remove the heads and channels whose activations fluctuate least, and put their mean into a bias.

What hardly varies is nearly a constant, and a constant can be moved into the bias of the projection that reads
it; fluctuation times weight, standardised per layer, lets all layers compete for one budget.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tprune.core.weights import StructureEdit
from tprune.methods.base import Paper, param
from tprune.methods.llm_weights._width import one_budget, same_share, score_units
from tprune.methods.weight_view import ModelView, UnitView
from tprune.methods.weights import WeightBudget, WeightMethod


@dataclass(frozen=True)
class Flap(WeightMethod):
    """Fluctuation-based structured pruning with bias compensation."""

    paper = Paper(
        title="Fluctuation-based Adaptive Structured Pruning for Large Language Models",
        venue="AAAI",
        year=2024,
        arxiv="2312.11983",
        code="CASIA-IVA-Lab/FLAP",
        checked="code",
        notes="The variance is the paper's (fluctuation=running is the code's recurrence) and the unit at the "
        "threshold stays (rule=strict drops it, as the code does); where all blocks lose the same share, channels take "
        "what heads leave of it. Under grouped queries a unit is a whole key-value group. Every block keeps at least "
        "one unit of each kind; biases are added, not replaced.",
    )
    kind = "calibrated"
    scope = "model"
    runs_on = ("plain", "vision")
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
        scores = score_units(model.blocks, self.score)
        total = sum(block.parameters for block in model.blocks)
        same = model.uniform or self.structure == "ul-um"
        if same:
            edits = same_share(model.blocks, scores, budget.sparsity, total)
        else:
            strict = self.rule == "strict" and budget.sparsity > 0
            edits = one_budget(model.blocks, scores, budget.sparsity, total, strict)
        if self.compensate:
            for edit in edits:
                self.add_bias(edit, model.blocks[edit.block].units)
        return edits

    def add_bias(self, edit: StructureEdit, units: dict[str, UnitView]) -> None:
        """The mean output of what the edit removes."""
        for kind, unit in units.items():
            gone = torch.ones(unit.count, dtype=torch.bool, device=unit.weight.device)
            gone[edit.keep[kind]] = False
            if bool(gone.any()):
                columns = gone.repeat_interleave(unit.width)
                edit.bias[kind] = unit.weight[:, columns] @ unit.mean[columns]

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
