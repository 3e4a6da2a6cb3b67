"""CoreMatching: the image tokens that matter are those that wake the same neurons as the text does.

In a gated MLP each token has the set of neurons that it activates. Image tokens are ranked by how much of theirs the
end of the prompt shares, and where the sorted curve bends most says how many stay.
"""

from __future__ import annotations

from dataclasses import dataclass

from tprune.core import ranks, select
from tprune.core.budget import Site, Stage, scale_layer
from tprune.core.reduction import Reduction
from tprune.errors import UserError
from tprune.methods.base import Paper, param
from tprune.methods.tokens import TokenMethod


@dataclass(frozen=True)
class CoreMatching(TokenMethod):
    """Before one layer, keep the image tokens whose neurons overlap with a reference token's beyond the knee."""

    paper = Paper(
        title="CoreMatching: A Co-adaptive Sparse Inference Framework with Token and Neuron Pruning for Comprehensive "
        "Acceleration of Vision-Language Models",
        venue="ICML",
        year=2025,
        arxiv="2505.19235",
        code="wangqinsi1/2025-ICML-CoreMatching",
        checked="code",
        notes="The tokens alone: decoding with core neurons is not offered. Scores and knee are those of the authors' "
        "code, which then blanks the tokens' cache entries in layers 5 to 18 and keeps computing them; here they "
        "leave, as in the paper, before one layer, the one of the code's commented variant. --keep replaces the knee.",
    )
    reads = ("neurons",)
    under_keep = {"exact": True}

    layer: int = param(10, "image tokens leave before this layer, by the MLP of the one before, of 32", low=1)
    reference: int = param(
        5, "whose neurons count: the token that is so many from the end of the prompt", low=1
    )
    exact: bool = param(False, "keep as many as the budget says instead of those beyond the knee")

    def stages(self, shape, knob):
        """At most all of them: the knee decides."""
        layer = max(1, scale_layer(self.layer, 32, shape.depth))
        if knob is None and self.exact:
            raise UserError("corematching: exact=true goes with --keep; leave it out, the knee then decides")
        count = shape.tokens if knob is None else max(1, round(knob * shape.tokens))
        return [Stage(Site(layer), count)]

    def reduce(self, site, view, count, memory):
        """o_v = |{neurons that v activates} ∩ {those of the reference}|; those above the knee's value stay."""
        active = (view.signal("neurons") > 0).float()  # [B, N, F]
        place = (view.last - self.reference + 1).clamp_min(0)
        wanted = active.gather(1, place.unsqueeze(2).expand(-1, -1, active.shape[2]))
        overlap = (active @ wanted.transpose(1, 2)).squeeze(2)  # [B, N]
        if not self.exact:
            count = ranks.beyond_knee(overlap, view.prunable).sum(1).cpu()
        index, valid = select.keep_prunable_top(overlap, count, view.prunable)
        return Reduction.keep(index, view.hidden.shape[1], valid)
