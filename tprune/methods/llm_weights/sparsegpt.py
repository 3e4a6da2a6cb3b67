"""SparseGPT: remove weights column by column, and update the rest of each row so that the layer's output stays.

Optimal Brain Surgeon made affordable: all rows share one sequence of inverse Hessians, which one Cholesky
decomposition gives, and what goes is chosen 128 columns at a time by w² / [H⁻¹]_cc of the updated weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tprune.core.mask import inclusive_mask, layer_mask, nm_mask
from tprune.core.select import floor_count
from tprune.core.solve import dead_inputs, inverse_factor, obs_prune
from tprune.core.weights import WeightEdit
from tprune.errors import UserError
from tprune.methods.base import Paper, param
from tprune.methods.weight_view import LinearView
from tprune.methods.weights import WeightBudget, WeightMethod


@dataclass(frozen=True)
class SparseGPT(WeightMethod):
    """One-shot pruning with weight reconstruction."""

    paper = Paper(
        title="SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot",
        venue="ICML",
        year=2023,
        arxiv="2301.00774",
        code="IST-DASLab/sparsegpt",
        checked="code",
        notes="Counts are exact and weights on inputs that were always zero go first; rule=inclusive removes one "
        "weight more per block and all of those, as the authors' code does. A failed Cholesky raises the damping.",
    )
    kind = "calibrated"
    stats = ("gram",)

    block: int = param(128, "Columns whose weights are chosen together", low=1)
    damp: float = param(0.01, "Damping, as a fraction of the mean of the Hessian's diagonal", low=0)
    rule: str = param(
        "exact",
        "exact: the count asked for in every block; inclusive: the threshold too, as in the authors' code",
        choices=("exact", "inclusive"),
    )

    def prune(self, linear: LinearView, budget: WeightBudget, generator: torch.Generator) -> WeightEdit:
        """Factor the inverse Hessian once for all matrices with these inputs, then sweep over the columns."""
        group = budget.pattern[1] if budget.pattern else None
        if group and self.block % group:
            raise UserError(f"--set block={self.block}: expected a multiple of the pattern's {group}")
        dead = linear.once("dead", lambda: dead_inputs(linear.gram))
        factor = linear.once("factor", lambda: inverse_factor(linear.gram, self.damp, replace=True))

        def choose(score: Tensor) -> Tensor:
            if budget.pattern:
                return nm_mask(score, *budget.pattern)
            count = floor_count(score.numel(), budget.sparsity)
            return inclusive_mask(score, count) if self.rule == "inclusive" else layer_mask(score, count)

        weight, mask = obs_prune(linear.weight, factor, choose, dead=dead, group=group, block=self.block)
        if self.rule == "exact":
            columns = dead.nonzero().flatten()
            weight[:, columns] = linear.weight[:, columns].masked_fill(mask[:, columns], 0.0)
        return WeightEdit(mask, weight)
