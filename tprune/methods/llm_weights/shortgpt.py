"""ShortGPT: remove whole blocks, those that change the residual stream least.

A block's influence is one minus the mean cosine between a token before and after it; many deep blocks only
nudge what flows past them, and go together with their keys and values.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import pi

from tprune.core.statistics import token_cosine
from tprune.core.weights import StructureEdit
from tprune.methods.base import Paper, param
from tprune.methods.llm_weights._depth import blocks_to_remove, least_influential
from tprune.methods.weight_view import ModelView
from tprune.methods.weights import WeightBudget, WeightMethod


@dataclass(frozen=True)
class ShortGPT(WeightMethod):
    """The round(s · L) blocks of smallest influence, at once."""

    paper = Paper(
        title="ShortGPT: Layers in Large Language Models are More Redundant Than You Expect",
        venue="arXiv",
        year=2024,
        arxiv="2403.03853",
        checked="port",
        notes="No official code; checked against github.com/sramshetty/ShortGPT. metric=angular is the contiguous "
        "run of Gromov et al. (arXiv 2403.17887).",
    )
    kind = "calibrated"
    scope = "model"
    runs_on = ("plain", "vision")
    stats = ("similarity",)
    propagate = "dense"
    patterns = False

    metric: str = param(
        "influence",
        "influence: single blocks, over all tokens; angular: a run of blocks, by the last token's angle across it",
        choices=("influence", "angular"),
    )

    def plan(self, model: ModelView, budget: WeightBudget) -> list[StructureEdit]:
        """Rank the blocks once and remove the least influential."""
        count = blocks_to_remove(budget.sparsity, len(model.blocks))
        gone = (
            self.angular(model, count) if self.metric == "angular" else least_influential(model.blocks, count)
        )
        return [StructureEdit(index, removed=True) for index in gone]

    def angular(self, model: ModelView, count: int) -> list[int]:
        """The run of `count` blocks across which the last token turns least."""
        if count == 0:
            return []
        starts = range(len(model.blocks) - count + 1)
        angles = [
            (
                token_cosine(model.blocks[first].entering, model.blocks[first + count - 1].leaving)
                .clamp(-1, 1)
                .acos()
                / pi
            )
            .mean()
            .item()
            for first in starts
        ]
        first = min(starts, key=angles.__getitem__)
        return list(range(first, first + count))
