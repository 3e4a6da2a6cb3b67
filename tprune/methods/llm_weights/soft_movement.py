"""Soft movement pruning: one threshold for the scores of all matrices, and a penalty that pushes scores down to it.

As movement pruning, but how much a matrix loses is learned: the loss grows with the mean of the scores' sigmoids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tprune.core.allocate import smallest_of_all
from tprune.core.mask import count_true, layer_mask
from tprune.core.select import floor_count
from tprune.methods.base import param
from tprune.methods.llm_weights._movement import PAPER
from tprune.methods.trained import TrainedMethod

LEAST = 0.005
"""The fraction of a matrix that stays whatever its scores are."""


@dataclass(frozen=True)
class SoftMovement(TrainedMethod):
    """Scores whose sigmoid does not exceed a threshold go; it rises along a cubic, and so does the penalty."""

    paper = replace(
        PAPER,
        notes="The authors' threshold meets a sparsity only through its penalty: it is used without --sparsity. With "
        "it, the threshold is where that many scores of all matrices lie below, as in their code's global_topk. "
        "Otherwise as movement.",
    )
    kind = "trained"
    learns = "required"

    threshold: float = param(0.1, "Of the scores' sigmoids at the end; unused with --sparsity", low=0, high=1)
    penalize: float = param(400.0, "Weight of the mean sigmoid in the loss at the end", low=0)

    def varies(self) -> bool:
        """The scores decide, unless a sparsity is asked for."""
        return True

    def removed(self, scores: Sequence[Tensor], done: float, sparsity: float | None) -> list[Tensor]:
        """What does not exceed the threshold, but for the highest scores of every matrix."""
        most = [score.numel() - int(LEAST * score.numel()) - 1 for score in scores]
        if sparsity is None:
            level = self.threshold * self.risen(done)
            counts = [count_true(score.sigmoid() <= level) for score in scores]
            counts = [min(count, limit) for count, limit in zip(counts, most, strict=True)]
        else:
            total = floor_count(sum(score.numel() for score in scores), sparsity * self.risen(done))
            counts = smallest_of_all(lambda: map(_shielded, scores, most), min(total, sum(most)))
        return [layer_mask(score, count) for score, count in zip(scores, counts, strict=True)]

    def penalty(self, scores: Sequence[Tensor], done: float) -> Tensor:
        """The mean over matrices of the mean sigmoid, which by and by counts `penalize` times."""
        means = torch.stack([score.sigmoid().mean() for score in scores])
        return self.penalize * self.risen(done) * means.mean()


def _shielded(score: Tensor, most: int) -> Tensor:
    """Scores [R, C] of which all but the `most` lowest are infinite."""
    return score.masked_fill(~layer_mask(score, most), torch.inf)
