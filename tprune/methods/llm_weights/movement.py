"""Movement pruning: keep the weights that training moves away from zero, rather than those that are large.

A score for every weight is trained with the model. What it learns from is the gradient of the masked weight times the
weight itself, so that it sums up how far the weight was pushed outward; in every matrix the highest scores stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from tprune.core.mask import layer_mask
from tprune.core.select import floor_count
from tprune.methods.llm_weights._movement import PAPER
from tprune.methods.trained import TrainedMethod


@dataclass(frozen=True)
class Movement(TrainedMethod):
    """The lowest scores of every matrix go, more and more of them along a cubic."""

    paper = replace(
        PAPER,
        notes="Biases, norms and the head are trained too, embeddings are not. Without dropout, and without the "
        "optional distillation. Of equal scores the lower index goes, where the authors' sort leaves it open.",
    )
    kind = "trained"
    learns = "required"

    def removed(self, scores: Sequence[Tensor], done: float, sparsity: float | None) -> list[Tensor]:
        """Of every matrix the same fraction is kept, rounded down."""
        share = 1 - sparsity * self.risen(done)
        return [layer_mask(score, score.numel() - floor_count(score.numel(), share)) for score in scores]
