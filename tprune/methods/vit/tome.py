"""ToMe merges the r most similar pairs of tokens in every block, by the mean of their keys over heads.

A merged token is the average weighted by size, and attention counts it as often as the tokens it stands for.
"""

from __future__ import annotations

from dataclasses import dataclass

from tprune.core import match
from tprune.core.budget import Site, Stage, whole_steps
from tprune.core.reduction import Reduction
from tprune.methods.base import Paper, param
from tprune.methods.tokens import TokenMethod


@dataclass(frozen=True)
class ToMe(TokenMethod):
    """Bipartite soft matching between attention and MLP of every block."""

    paper = Paper(
        title="Token Merging: Your ViT But Faster",
        venue="ICLR",
        year=2023,
        arxiv="2210.09461",
        code="facebookresearch/ToMe",
        checked="code",
        notes="--keep spreads a fractional r evenly over the blocks. All prefix tokens are protected, registers too.",
    )
    native = ("r",)

    r: tuple[int, ...] = param(
        (13,), "tokens merged per block: one number, or one per block and then 0", low=0
    )
    inflect: float = param(0.0, "-1 merges more in early blocks, 1 in late ones", low=-1, high=1)
    prop_attn: bool = param(True, "proportional attention (off for MAE off the shelf)")

    def weighs_by_size(self):
        """Proportional attention, eq. 4."""
        return self.prop_attn

    def stages(self, shape, knob):
        """r_l tokens fewer after block l, never more than half of them."""
        stages, alive = [], shape.tokens
        for layer, wanted in enumerate(self.schedule(shape, knob)):
            alive -= min(wanted, alive // 2)
            stages.append(Stage(Site(layer, between=True), alive))
        return stages

    def schedule(self, shape, knob):
        """r per block: as given, or a line through the mean r with the slope of `inflect`."""
        if knob is None and len(self.r) > 1:
            return [*self.r, *[0] * shape.depth][: shape.depth]
        mean = self.r[0] if knob is None else (1 - knob) * shape.tokens / 2
        low = mean * (1 - self.inflect)
        low = int(low) if knob is None else low
        step = 2 * (mean - low) / max(shape.depth - 1, 1)
        line = [low + step * layer for layer in range(shape.depth)]
        if knob is None:
            return [int(rate) for rate in line]
        return whole_steps(line)

    def reduce(self, site, view, count, memory):
        """Merge the most similar pairs of this block's keys."""
        batch, length = view.hidden.shape[:2]
        merged = length - view.prefix - count
        if merged == 0:
            return Reduction.identity(batch, length, view.hidden.device)
        metric = view.attention.key.mean(1)  # [B, N, d]
        index, source, into = match.bipartite_merge(metric, merged, view.prefix)
        return Reduction.average(index, length, source, into, view.size)
