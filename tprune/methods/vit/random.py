"""Random token drop, the floor that every method must beat: at a few blocks a random part of the tokens leaves.

Drawn per image from its own content and the seed, so that any batch gives the same result.
"""

from __future__ import annotations

from dataclasses import dataclass

from tprune.core import score, select
from tprune.core.budget import ratio_stages
from tprune.core.reduction import Reduction
from tprune.methods.base import Paper, param
from tprune.methods.tokens import TokenMethod


@dataclass(frozen=True)
class Random(TokenMethod):
    """Keep a random fraction at three blocks (EViT's), the rest is dropped."""

    paper = Paper(
        title="Random token drop (baseline)",
        venue="the control of nearly every paper of this family",
        year=2022,
        checked="paper",
    )
    kind = "baseline"
    reads = ("seeds",)
    native = ("ratio",)

    layers: tuple[int, ...] = param((3, 6, 9), "blocks before which tokens leave, of 12", low=0)
    ratio: float = param(0.7, "fraction of the remaining tokens that each of them keeps", low=0, high=1)

    def stages(self, shape, knob):
        """k = ceil(ratio · n) at every stage."""
        ratio = self.ratio if knob is None else knob
        return ratio_stages(self.layers, ratio, shape.tokens, shape.depth)

    def reduce(self, site, view, count, memory):
        """Keep the `count` tokens with the largest noise, in their order."""
        batch, length = view.hidden.shape[:2]
        noise = score.uniform((length - view.prefix,), view.seeds + site.layer).to(view.hidden.device)
        return Reduction.keep(select.keep_prefix_and_top(noise, count, view.prefix), length)
