"""AdaptInfer: which words guide the image changes from layer to layer, so each pruning layer asks its own attention.

A word counts by the attention it gives to and receives from the other words; image tokens are ranked by what the
words pay them, weighted so, head by head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tprune.core import select
from tprune.core.budget import exponent, staircase
from tprune.core.reduction import Reduction
from tprune.methods.base import Paper, param
from tprune.methods.tokens import TokenMethod


@dataclass(frozen=True)
class AdaptInfer(TokenMethod):
    """Behind layers 1, 10 and 20 keep the top k by Σ_h Σ_t w[h, t] · A[h, t, j]."""

    paper = Paper(
        title="AdaptInfer: Adaptive Token Pruning for Vision-Language Model Inference with Dynamical Text Guidance",
        venue="arXiv",
        year=2025,
        arxiv="2508.06084",
        code="weiczh02/AdaptInfer-base",
        checked="code",
        notes="The layers are the authors' for LLaVA-1.5-7B; how they were found is not in their code. Counts are "
        "theirs of 576, scaled to other numbers; --keep raises the fractions to one power. Their 128 tokens leaving a "
        "layer are 146.3 entering one.",
    )
    positions = "compact"
    native = ("counts",)

    layers: tuple[int, ...] = param((1, 10, 20), "image tokens leave behind these layers, of 32", low=0)
    counts: tuple[int, ...] = param((290, 72, 18), "image tokens left behind each, of 576", low=0, high=576)
    sharpness: float = param(1.0, "λ: 1 weighs every word by itself, 0 all words alike", low=0, high=1)

    def stages(self, shape, knob):
        """k of 576, never all that are there; 0 lets all of them leave."""
        self.check_pairs("layers", "counts")
        power = 1.0 if knob is None else exponent(knob)
        left, alive = [], shape.tokens
        for count in self.counts:
            alive = min(round(shape.tokens * (count / 576) ** power), alive - 1 if knob is None else alive)
            left.append(max(0, alive))
        return staircase([layer + 1 for layer in self.layers], left, 32, shape.depth)

    def reduce(self, site, view, count, memory):
        """T = A[text, text], w = column sums of T + Tᵀ - diag T, score = Σ_h w · A[text, image]."""
        rows, said = select.places(view.text)
        attention = view.attention.rows(rows) * said[:, None, :, None]  # [B, H, R, N]
        words = (
            attention.gather(3, rows[:, None, None].expand(*attention.shape[:3], -1)) * said[:, None, None]
        )
        mutual = words + words.transpose(2, 3) - torch.diag_embed(words.diagonal(dim1=2, dim2=3))
        if self.sharpness < 1:
            number = (said.sum(1) ** 2 * words.shape[1]).clamp_min(1)[:, None, None, None]
            even = mutual.sum((1, 2, 3), keepdim=True) / number * said[:, None, :, None] * said[:, None, None]
            mutual = self.sharpness * mutual + (1 - self.sharpness) * even
        score = (mutual.sum(2).unsqueeze(2) @ attention).sum((1, 2))  # [B, N]
        index, valid = select.keep_prunable_top(score, count, view.prunable)
        return Reduction.keep(index, view.hidden.shape[1], valid)
