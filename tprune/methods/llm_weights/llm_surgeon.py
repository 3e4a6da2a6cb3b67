"""The LLM Surgeon: Optimal Brain Surgeon over a whole model, with a Kronecker-factored curvature, in many small rounds.

The second moments of a layer's inputs and of the gradients at its outputs say together what removing weights costs the
loss, in which layer they may be, and how the others make up for it; after each round they are taken anew.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tprune.core.allocate import smallest_of_all
from tprune.core.kronecker import removal_costs, remove_together
from tprune.core.mask import layer_mask, nm_mask
from tprune.core.select import floor_count
from tprune.core.weights import WeightEdit
from tprune.methods.base import param
from tprune.methods.llm_weights._surgeon import PAPER, inverses
from tprune.methods.weight_view import LinearView
from tprune.methods.weights import WeightBudget
from tprune.methods.whole import WholeMethod


@dataclass(frozen=True)
class LlmSurgeon(WholeMethod):
    """Costs ½ w² / ([G⁻¹]_rr [A⁻¹]_cc) under one threshold for all layers, and the update for what goes together."""

    paper = replace(
        PAPER,
        notes="Single weights and n:m, with one Kronecker product (rows and columns: llm-surgeon-sp); no low-rank "
        "training between rounds. Biases are neither removed nor updated. Counts are exact; rule=inclusive removes one "
        "weight or group more, as the code does. n:m works without a bias too, where the code drops the last input.",
    )
    kind = "calibrated"
    stats = ("gram", "output_gram")

    shots: int = param(40, "Rounds; the sparsity rises evenly over them", low=1)
    damp_outputs: float = param(0.1, "Damping of G, as a fraction of its mean diagonal", low=0)
    damp_inputs: float = param(0.01, "Damping of A, as a fraction of its mean diagonal", low=0)
    together: int = param(2000, "At most so many weights are removed together, in whole rows", low=1)
    rule: str = param(
        "exact",
        "exact: the count asked for; inclusive: the threshold too, as in the authors' code",
        choices=("exact", "inclusive"),
    )

    def rounds(self) -> int:
        """As many as there are shots."""
        return self.shots

    def prune_all(
        self, linears: Sequence[LinearView], budget: WeightBudget, share: float
    ) -> Iterator[WeightEdit]:
        """Find the threshold over all matrices, then remove and update; an inverse is taken twice rather than held."""
        diagonals = [self._diagonals(linear) for linear in linears]

        def costs() -> Iterator[Tensor]:
            for linear, pair in zip(linears, diagonals, strict=True):
                cost = removal_costs(linear.weight, *pair)
                yield cost if budget.pattern is None else _group_costs(cost, *budget.pattern)

        weights = sum(len(outer) * len(inner) for outer, inner in diagonals)
        counts = smallest_of_all(costs, self._count(weights, budget, share))
        for linear, pair, count in zip(linears, diagonals, counts, strict=True):
            if count == 0:
                yield WeightEdit(torch.zeros_like(linear.weight, dtype=torch.bool))
                continue
            mask = _mask(removal_costs(linear.weight, *pair), count, budget.pattern)
            outer, inner = inverses(linear, self.damp_outputs, self.damp_inputs)
            yield WeightEdit(mask, remove_together(linear.weight, mask, outer, inner, self.together))

    def _diagonals(self, linear: LinearView) -> tuple[Tensor, Tensor]:
        """Those of G⁻¹ and A⁻¹."""
        found = inverses(linear, self.damp_outputs, self.damp_inputs)
        return tuple(inverse.diagonal().clone() for inverse in found)

    def _count(self, weights: int, budget: WeightBudget, share: float) -> int:
        """How many of so many weights, or of their groups of a pattern, go."""
        total = weights // budget.pattern[1] if budget.pattern else weights
        count = floor_count(total, share if budget.pattern else share * budget.sparsity)
        return min(count + 1, total) if self.rule == "inclusive" else count


def _group_costs(cost: Tensor, keep: int, group: int) -> Tensor:
    """What the cheapest `group - keep` of every group of weights cost together: [R, C] -> [R, C / group]."""
    return cost.unflatten(1, (-1, group)).sort(dim=2).values[..., : group - keep].sum(2)


def _mask(cost: Tensor, count: int, pattern: tuple[int, int] | None) -> Tensor:
    """The `count` cheapest weights [R, C], or those that leave the cheapest groups of a pattern."""
    if pattern is None:
        return layer_mask(cost, count)
    groups = layer_mask(_group_costs(cost, *pattern), count)
    return nm_mask(cost, *pattern) & groups.repeat_interleave(pattern[1], dim=1)
