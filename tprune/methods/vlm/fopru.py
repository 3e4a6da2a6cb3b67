"""FoPru keeps the image tokens that the vision tower attends to, one by one or as whole rows of the image.

Where an image's key information lies in a line, as text does, whole rows keep it together.
"""

from __future__ import annotations

from dataclasses import dataclass

from tprune.core import ranks, select
from tprune.core.budget import PROJECTOR, Stage
from tprune.core.reduction import Reduction
from tprune.core.score import min_max
from tprune.errors import UserError
from tprune.methods.base import Paper, param
from tprune.methods.tokens import TokenMethod


@dataclass(frozen=True)
class FoPru(TokenMethod):
    """Focal pruning by the attention that patches receive, mean over heads and queries."""

    paper = Paper(
        title="FoPru: Focal Pruning for Efficient Large Vision-Language Models",
        venue="arXiv",
        year=2024,
        arxiv="2411.14164",
        checked="abstract",
        notes="No code is public. The block is the one that is projected, its class token's query counts as any other. "
        "Rows are taken by their mean; what whole rows leave of the budget goes to the best tokens of the next (ours).",
    )
    reads = ("encoder",)
    positions = "compact"
    native = ("ratio",)
    unit = "crop"

    ratio: float = param(0.25, "fraction of every crop's tokens that stays", low=0, high=1)
    strategy: str = param("rank", "what stays: the best tokens, or the best rows", choices=("rank", "row"))

    def stages(self, shape, knob):
        """k = round(r · N), at least one."""
        keep = self.ratio if knob is None else knob
        return [Stage(PROJECTOR, max(1, round(keep * shape.tokens)))]

    def reduce(self, site, view, count, memory):
        """s_j = mean over queries and heads of A[i, j]; top k, or row after row."""
        worth = view.pool(view.encoder.received())
        if self.strategy == "row":
            worth = self.by_row(view, worth)
        index, valid = select.keep_prunable_top(worth, count, view.prunable)
        return Reduction.keep(index, view.hidden.shape[1], valid)

    def by_row(self, view, worth):
        """Scores [B, N] that put the best row's tokens first, then the next's; within a row as `worth` does."""
        if view.grid is None:
            raise UserError(
                "fopru: --set strategy=row needs image tokens in rows and columns; use strategy=rank"
            )
        shape = (len(worth), *view.grid)
        there = view.prunable.view(shape)
        mean = (worth.view(shape) * there).sum(2) / there.sum(2).clamp_min(1)
        turn = ranks.rank(mean.masked_fill(~there.any(2), -1)).unsqueeze(2)
        return (min_max(worth).view(shape) - 2 * turn).flatten(1)
