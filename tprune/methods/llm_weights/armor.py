"""ARMOR: a sparse core between two block-diagonal matrices, which adapt the weights to the pattern.

An n:m pattern alone costs a matrix too much. With W ≈ A S B, where A and B are block-diagonal and S has the pattern,
a few dense numbers turn the matrix so that the pattern loses less; S still runs on hardware for the pattern.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tprune.core.factorise import Factors, fit_factors, largest_divisor, unit_norms
from tprune.core.mask import weight_mask
from tprune.core.weights import WeightEdit
from tprune.methods.base import Paper, param
from tprune.methods.weight_view import LinearView
from tprune.methods.weights import WeightBudget, WeightMethod


@dataclass(frozen=True)
class Armor(WeightMethod):
    """Start from the weights of largest W² · ‖X‖² after normalisation, then improve A, S and B in turn."""

    paper = Paper(
        title="ARMOR: High-Performance Semi-Structured Pruning via Adaptive Matrix Factorization",
        venue="ICLR",
        year=2026,
        arxiv="2510.05528",
        code="LawrenceRLiu/ARMOR",
        checked="code",
        notes="Sparsity is counted in the core; the two matrices around it add b / inputs + b / outputs per weight. "
        "Blocks are the largest divisors up to b. Under --sparsity the core keeps its first zeros, as where the code "
        "takes no step of the core.",
    )
    kind = "calibrated"
    stats = ("norm",)
    propagate = "dense"
    wraps = True

    block: int = param(128, "b: the largest width of a block of A and B", low=1)
    iterations: int = param(20000, "At most so many iterations per matrix", low=0)
    rate: float = param(1e-4, "Learning rate of Adam", low=0)

    def prune(self, linear: LinearView, budget: WeightBudget, generator: torch.Generator) -> WeightEdit:
        """Normalise, choose the first core, improve the factors, and give the norms back to A and B."""
        weight, rows, columns = unit_norms(linear.weight)
        importance = self.importance(linear)
        gone = weight_mask(weight.square() * importance, budget.sparsity, budget.pattern, group="layer")
        if not bool(gone.any()):
            return WeightEdit(gone)
        group = budget.pattern[1] if budget.pattern else 1
        sizes = largest_divisor(len(rows), self.block), largest_divisor(len(columns), self.block, group)
        factors = Factors.start(weight, ~gone, sizes)
        fit_factors(factors, weight, importance, budget.pattern, self.iterations, self.rate, generator)
        outward = factors.outward * rows.view(-1, sizes[0], 1)
        inward = factors.inward * columns.view(-1, 1, sizes[1])
        return WeightEdit(~factors.stays, factors.sparse(), (outward, inward))

    def importance(self, linear: LinearView) -> Tensor:
        """d [in]: twice the mean square of every input; where that is 0 or not finite, the mean of the others."""
        found = linear.norm.square() * (2 / max(linear.tokens, 1))
        good = found.isfinite() & (found > 0)
        return torch.where(good, found, found[good].mean() if bool(good.any()) else 1.0)
