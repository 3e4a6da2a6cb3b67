"""The LLM Surgeon for whole rows and columns: an output or an input of a matrix goes with all its weights.

The curvature is that of llm-surgeon. Rows and columns of all matrices compete under one threshold; what shares a row
with a column is counted once, and in each of the rounds as many go as fit into the budget.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from tprune.core.allocate import cheapest_lines
from tprune.core.kronecker import remove_lines, row_costs
from tprune.core.select import floor_count
from tprune.core.weights import WeightEdit
from tprune.methods.base import param
from tprune.methods.llm_weights._surgeon import PAPER, inverses
from tprune.methods.weight_view import LinearView
from tprune.methods.weights import WeightBudget
from tprune.methods.whole import WholeMethod


@dataclass(frozen=True)
class LlmSurgeonSp(WholeMethod):
    """Costs ½ w_r A w_rᵀ / [G⁻¹]_rr of rows and ½ w_cᵀ G w_c / [A⁻¹]_cc of columns, and the update for all of them."""

    paper = replace(
        PAPER,
        notes="Rows and columns are set to zero, as in the authors' code: shapes stay, and nothing gets faster by "
        "itself. The count is the most that whole rows and columns reach without exceeding what was asked. No low-rank "
        "training between rounds (--recover lora trains after them); otherwise as llm-surgeon.",
    )
    kind = "calibrated"
    stats = ("gram", "output_gram")
    patterns = False

    shots: int = param(40, "Rounds; the sparsity rises evenly over them", low=1)
    damp_outputs: float = param(0.01, "Damping of G, as a fraction of its mean diagonal", low=0)
    damp_inputs: float = param(0.01, "Damping of A, as a fraction of its mean diagonal", low=0)

    def rounds(self) -> int:
        """As many as there are shots."""
        return self.shots

    def prune_all(
        self, linears: Sequence[LinearView], budget: WeightBudget, share: float
    ) -> Iterator[WeightEdit]:
        """Cost of every row and column, the cheapest of all that fit, then remove and update."""
        costs, weights = [], 0
        for linear in linears:
            outer, inner = inverses(linear, self.damp_outputs, self.damp_inputs)
            rows = row_costs(linear.weight, outer.diagonal(), linear.gram)
            columns = row_costs(linear.weight.t(), inner.diagonal(), linear.output_gram)
            costs.append((rows, columns))
            weights += linear.weight.numel()
        gone = cheapest_lines(costs, floor_count(weights, share * budget.sparsity))
        for linear, (rows, columns) in zip(linears, gone, strict=True):
            outer, inner = inverses(linear, self.damp_outputs, self.damp_inputs)
            updated = remove_lines(linear.weight, rows, columns, outer, inner)
            yield WeightEdit(rows.unsqueeze(1) | columns, updated)
