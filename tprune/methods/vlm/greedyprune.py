"""GreedyPrune takes the most salient image tokens one by one, but none that resembles one it has taken.

Choosing tokens that are salient in sum while no two are too similar is a combinatorial problem; a greedy pass solves
it well enough.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tprune.core import alike, select
from tprune.core.budget import PROJECTOR, Stage
from tprune.core.reduction import Reduction
from tprune.methods.base import Paper, param
from tprune.methods.tokens import TokenMethod


@dataclass(frozen=True)
class GreedyPrune(TokenMethod):
    """Maximal saliency in sum, under a bound on the similarity of every pair."""

    paper = Paper(
        title="GreedyPrune: Retenting Critical Visual Token Set for Large Vision Language Models",
        venue="arXiv",
        year=2025,
        arxiv="2506.13166",
        checked="abstract",
        notes="Neither code nor full text was at hand. Ours: saliency is the class token's attention in the projected "
        "block (without one, what patches receive), similarity the cosine of projected tokens, the bound 0.7; where no "
        "token is left under it, it rises in steps until one is.",
    )
    reads = ("encoder",)
    positions = "compact"
    native = ("ratio",)
    unit = "crop"

    ratio: float = param(0.25, "fraction of every crop's tokens that stays", low=0, high=1)
    bound: float = param(0.7, "cosine up to which two kept tokens may be alike", low=-1, high=1)
    step: float = param(0.05, "by how much the bound rises where too few tokens are under it", low=1e-3)

    def stages(self, shape, knob):
        """k = round(r · N), at least one."""
        keep = self.ratio if knob is None else knob
        return [Stage(PROJECTOR, max(1, round(keep * shape.tokens)))]

    def reduce(self, site, view, count, memory):
        """Always the most salient token whose cosine to all that is taken is within the bound."""
        weight = view.pool(view.encoder.saliency())
        widest = int(torch.as_tensor(count).max())
        order = alike.suppress(view.hidden, weight, widest, self.bound, self.step, view.prunable)
        index, valid = select.keep_first(order, count, view.prunable)
        return Reduction.keep(index, view.hidden.shape[1], valid)
