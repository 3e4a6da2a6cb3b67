"""ATC merges tokens by agglomerative clustering: the two nearest clusters of keys become one until few enough are left.

Every cluster becomes the average of its tokens, weighted by size. Clustering takes place at three blocks, or, as ToMe,
in every block.
"""

from __future__ import annotations

from dataclasses import dataclass

from tprune.core import match, select
from tprune.core.budget import Site, Stage, even_stages, scale_layer
from tprune.core.reduction import Reduction
from tprune.core.score import cosine_normalise
from tprune.methods.base import Paper, param
from tprune.methods.tokens import TokenMethod


@dataclass(frozen=True)
class ATC(TokenMethod):
    """Agglomerative token clustering between attention and MLP."""

    paper = Paper(
        title="Agglomerative Token Clustering",
        venue="ECCV",
        year=2024,
        arxiv="2409.11923",
        code="JoakimHaurum/ATC",
        checked="code",
        notes="Clusters stand in the order of their first tokens, the authors' in that of scikit-learn. Used "
        "without fine-tuning. All prefix tokens are protected, the authors' code knows only the class token.",
    )
    native = ("ratio", "r")

    layers: tuple[int, ...] = param(
        (3, 6, 9), "blocks between whose attention and MLP tokens merge, of 12", low=0
    )
    ratio: float = param(
        0.5, "fraction that each of them keeps: ratio^s of all after the s-th", low=0, high=1
    )
    r: int | None = param(None, "tokens merged in every block instead, as with ToMe", low=0)
    every_block: bool = param(False, "with --keep: merge in every block, the same number in each")
    linkage: str = param("average", "how far apart two clusters are", choices=match.LINKAGES)
    prop_attn: bool = param(True, "proportional attention; without it merges are plain means")

    def weighs_by_size(self):
        """Proportional attention, as in ToMe."""
        return self.prop_attn

    def stages(self, shape, knob):
        """int(ratio^s · n) clusters at stage s, or r tokens fewer in every block."""
        if self.r is not None or (self.every_block and knob is not None):
            return self.gradual_stages(shape, knob)
        ratio = self.ratio if knob is None else knob
        stages, alive = [], shape.tokens
        for place, layer in enumerate(self.layers, start=1):
            alive = min(alive, max(1, int(shape.tokens * ratio**place + 1e-9)))
            stages.append(Stage(Site(scale_layer(layer, 12, shape.depth), between=True), alive))
        return stages

    def gradual_stages(self, shape, knob):
        """r tokens fewer in every block; with a budget a fractional r, spread evenly."""
        rate = self.r if knob is None else (1 - knob) * shape.tokens
        return even_stages(rate, shape.tokens, shape.depth)

    def reduce(self, site, view, count, memory):
        """Cluster this block's keys, averaged over heads, by cosine distance."""
        batch, length = view.hidden.shape[:2]
        prefix = view.prefix
        if count >= length - prefix:
            return Reduction.identity(batch, length, view.hidden.device)
        metric = cosine_normalise(view.attention.key.mean(1)[:, prefix:])
        distance = 1 - metric @ metric.transpose(1, 2)
        index, source, into = match.agglomerate(distance, count, self.linkage)
        size = view.size if self.prop_attn else None
        return Reduction.average(
            select.with_prefix(index + prefix, prefix), length, source + prefix, into + prefix, size
        )
