"""PyramidDrop drops image tokens again and again: all are needed in shallow layers, fewer and fewer in deep ones.

Before each of a few layers that layer's own queries and keys are computed ahead, and the attention that the last
instruction token would pay decides who goes on.
"""

from __future__ import annotations

from dataclasses import dataclass

from tprune.core import select
from tprune.core.budget import staircase
from tprune.core.reduction import Reduction
from tprune.methods.base import Paper, param
from tprune.methods.tokens import TokenMethod


@dataclass(frozen=True)
class PyramidDrop(TokenMethod):
    """Before layer K, keep the int(r · V) image tokens that the last token will attend to most."""

    paper = Paper(
        title="PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual Redundancy Reduction",
        venue="CVPR",
        year=2025,
        arxiv="2410.17247",
        code="Cooperx521/PyramidDrop",
        checked="code",
        notes="--keep solves one ratio λ, with V · λ^s tokens left after stage s. Grouped key-value heads serve all "
        "their queries; the authors' code takes as many of both only. Training with the rule is not offered.",
    )
    reads = ()
    positions = "compact"
    native = ("ratios",)

    layers: tuple[int, ...] = param((8, 16, 24), "image tokens leave before these layers, of 32", low=1)
    ratios: tuple[float, ...] = param(
        (0.5, 0.25, 0.125), "fraction of the image tokens left after each", low=0, high=1
    )

    def stages(self, shape, knob):
        """int(r_s · V) tokens after stage s; with --keep, r_s = λ^s."""
        if knob is None:
            self.check_pairs("layers", "ratios")
            counts = [int(ratio * shape.tokens) for ratio in self.ratios]
        else:
            counts = [max(1, round(knob**stage * shape.tokens)) for stage in range(1, len(self.layers) + 1)]
        return staircase(self.layers, counts, 32, shape.depth)

    def reduce(self, site, view, count, memory):
        """s_j = mean over heads of A[last, j], the attention that the coming layer would pay."""
        score = view.signal("next_attention").rows(view.last).mean(1)[:, 0]  # [B, N]
        index, valid = select.keep_prunable_top(score, count, view.prunable)
        return Reduction.keep(index, view.hidden.shape[1], valid)
