"""ALPS: find what may stay by ADMM, over the whole layer at once, then refit it by conjugate gradients.

Other one-shot methods decide column by column or by a score; here the support itself is optimised, with weights that
are free to move until it settles, which tells at high sparsity.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tprune.core.admm import admm_support, refit, unit_diagonal
from tprune.core.mask import layer_mask, nm_mask
from tprune.core.weights import WeightEdit
from tprune.methods.base import Paper, param
from tprune.methods.weight_view import LinearView
from tprune.methods.weights import WeightBudget, WeightMethod


@dataclass(frozen=True)
class Alps(WeightMethod):
    """ADMM for the support, conjugate gradients for the weights."""

    paper = Paper(
        title="ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large Language Models",
        venue="NeurIPS",
        year=2024,
        arxiv="2406.07831",
        code="mazumder-lab/ALPS",
        checked="code",
        notes="In float64, of the authors' float32 the decomposition alone: over hundreds of iterations rounding would "
        "decide what goes. The refit takes all its steps: the code's early stop asks for a small residual on removed "
        "weights too.",
    )
    kind = "calibrated"
    stats = ("gram",)

    rho: float = param(0.1, "The first penalty", low=1e-6)
    iterations: int = param(300, "At most so many iterations", low=1)
    damp: float = param(0.01, "Damping, as a fraction of the mean of the Gram matrix's diagonal", low=0)
    refine: int = param(10, "Steps of conjugate gradients on the support", low=0)

    def prune(self, linear: LinearView, budget: WeightBudget, generator: torch.Generator) -> WeightEdit:
        """Scale to a unit diagonal, find the support, refit, scale back."""
        count = linear.weight.numel() - round((1 - budget.sparsity) * linear.weight.numel())
        if count == 0:
            return WeightEdit(torch.zeros_like(linear.weight, dtype=torch.bool))
        gram, scale = linear.once("scaled", lambda: unit_diagonal(linear.gram.double(), self.damp))
        eigen = linear.once("eigen", lambda: tuple(torch.linalg.eigh(gram)))

        def choose(magnitude: Tensor) -> Tensor:
            return nm_mask(magnitude, *budget.pattern) if budget.pattern else layer_mask(magnitude, count)

        target = linear.weight * scale
        found, gone = admm_support(target, gram, eigen, choose, self.rho, self.iterations)
        return WeightEdit(gone, refit(found, target, gram, self.refine).div_(scale).float())
