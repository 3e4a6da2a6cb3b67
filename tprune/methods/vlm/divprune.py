"""DivPrune keeps the most diverse image tokens: those whose smallest mutual distance is largest.

Neither attention nor text is asked; redundancy alone decides, by a greedy max-min choice on cosine distances.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tprune.core import match, select
from tprune.core.budget import PROJECTOR, Stage
from tprune.core.reduction import Reduction
from tprune.methods.base import Paper, param
from tprune.methods.tokens import TokenMethod


@dataclass(frozen=True)
class DivPrune(TokenMethod):
    """Max-min diversity over all projected tokens of an image."""

    paper = Paper(
        title="DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models",
        venue="CVPR",
        year=2025,
        arxiv="2503.02175",
        code="vbdi/divprune",
        checked="code",
        notes="Chosen once for each image, over all its crops and newline tokens, as the authors' code does. "
        "A token is never chosen twice; with many equal tokens the authors' rounding can do that.",
    )
    reads = ()
    positions = "compact"
    native = ("ratio",)

    ratio: float = param(0.098, "fraction of the image tokens that stays", low=0, high=1)

    def stages(self, shape, knob):
        """k = round(r · N), at least one."""
        keep = self.ratio if knob is None else knob
        return [Stage(PROJECTOR, max(1, round(keep * shape.tokens)))]

    def reduce(self, site, view, count, memory):
        """First the token farthest from its nearest neighbour, then always the one farthest from all chosen."""
        widest = int(torch.as_tensor(count).max())
        order = match.farthest_first(view.hidden, widest, None if view.whole else view.prunable)
        index, valid = select.keep_first(order, count, view.prunable)
        return Reduction.keep(index, view.hidden.shape[1], valid)
