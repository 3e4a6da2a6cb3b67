"""FasterVLM keeps the image tokens that the vision tower's class token attends to, before the decoder sees any.

The attention is that of the block whose output is projected; text-to-image attention inside the decoder is no
better a guide, and comes too late to save its cost.
"""

from __future__ import annotations

from dataclasses import dataclass

from tprune.core import select
from tprune.core.budget import PROJECTOR, Stage
from tprune.core.reduction import Reduction
from tprune.methods.base import Paper, param
from tprune.methods.tokens import TokenMethod


@dataclass(frozen=True)
class FasterVLM(TokenMethod):
    """Top k patches of every crop by class-token attention, mean over heads."""

    paper = Paper(
        title="[CLS] Attention is All You Need for Training-Free Visual Token Pruning: Make VLM Inference Faster",
        venue="arXiv",
        year=2024,
        arxiv="2412.01818",
        code="Theia-4869/FasterVLM",
        checked="code",
        notes="Of several crops each keeps the same fraction of its tokens, and newline tokens leave with the first "
        "image token, as the authors' layout has none. Towers without a class token are refused; the paper "
        "defines no other score.",
    )
    needs_cls = True
    reads = ("encoder",)
    positions = "compact"
    native = ("ratio",)
    unit = "crop"

    ratio: float = param(0.25, "fraction of every crop's tokens that stays", low=0, high=1)

    def stages(self, shape, knob):
        """k = round(r · N), at least one."""
        keep = self.ratio if knob is None else knob
        return [Stage(PROJECTOR, max(1, round(keep * shape.tokens)))]

    def reduce(self, site, view, count, memory):
        """s = mean over heads of the class token's attention to the patches; top k, in their order."""
        score = view.pool(view.encoder.saliency())
        index, valid = select.keep_prunable_top(score, count, view.prunable)
        return Reduction.keep(index, view.hidden.shape[1], valid)
