"""Random image tokens leave before the decoder, the control that every method must beat.

Drawn per image from its own pixels and the seed, kept in their order.
"""

from __future__ import annotations

from dataclasses import dataclass

from tprune.core import score, select
from tprune.core.budget import PROJECTOR, Stage
from tprune.core.reduction import Reduction
from tprune.methods.base import Paper, param
from tprune.methods.tokens import TokenMethod


@dataclass(frozen=True)
class Random(TokenMethod):
    """Keep a random fraction of every image."""

    paper = Paper(
        title="Random visual token pruning (baseline)",
        venue="the control of nearly every paper of this family",
        year=2024,
        checked="paper",
    )
    kind = "baseline"
    reads = ("seeds",)
    native = ("ratio",)

    ratio: float = param(0.25, "fraction of the image tokens that stays", low=0, high=1)

    def stages(self, shape, knob):
        """k = int(r · N), at least one."""
        return [Stage(PROJECTOR, max(1, int((self.ratio if knob is None else knob) * shape.tokens)))]

    def reduce(self, site, view, count, memory):
        """Keep the `count` tokens with the largest noise."""
        noise = score.uniform((view.hidden.shape[1],), view.seeds).to(view.hidden.device)
        index, valid = select.keep_prunable_top(noise, count, view.prunable)
        return Reduction.keep(index, view.hidden.shape[1], valid)
