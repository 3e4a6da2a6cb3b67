"""FastV drops the image tokens that the last prompt token hardly looks at, once, early inside the decoder.

After the second layer image tokens receive little attention, so half of them can leave there at almost no loss.
"""

from __future__ import annotations

from dataclasses import dataclass

from tprune.core import select
from tprune.core.budget import Site, Stage, scale_layer
from tprune.core.reduction import Reduction
from tprune.methods.base import Paper, param
from tprune.methods.tokens import TokenMethod


@dataclass(frozen=True)
class FastV(TokenMethod):
    """Rank image tokens by the last query's attention in layer K - 1, keep the best from layer K on."""

    paper = Paper(
        title="An Image is Worth 1/2 Tokens After Layer 2: Plug-and-Play Inference Acceleration for Large "
        "Vision-Language Models",
        venue="ECCV",
        year=2024,
        arxiv="2403.06764",
        code="pkunlp-icler/FastV",
        checked="code",
        notes="K is a layer of 32 and scales with the depth. The last token is each row's last real one; the authors "
        "take one row at a time.",
    )
    native = ("ratio",)

    layer: int = param(2, "K: image tokens leave before this decoder layer, of 32", low=1)
    ratio: float = param(0.5, "R: fraction of the image tokens that leaves", low=0, high=1)

    def stages(self, shape, knob):
        """k = round(N · (1 - R)), at least one."""
        keep = 1 - self.ratio if knob is None else knob
        layer = max(1, scale_layer(self.layer, 32, shape.depth))
        return [Stage(Site(layer), max(1, round(shape.tokens * keep)))]

    def reduce(self, site, view, count, memory):
        """s_j = mean over heads of A[last, j] in layer K - 1; the top k stay, in their order."""
        score = view.attention.rows(view.last).mean(1)[:, 0]  # [B, N]
        index, valid = select.keep_prunable_top(score, count, view.prunable)
        return Reduction.keep(index, view.hidden.shape[1], valid)
