"""MSTM keeps the tokens that the class token attends to; every other token flows to the most similar of them.

Merged tokens are means weighted by importance, so that a crucial token is hardly moved by what joins it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tprune.core import match, select
from tprune.core.budget import ratio_stages
from tprune.core.reduction import Reduction
from tprune.methods.base import Paper, TokenMethod, param


@dataclass(frozen=True)
class MSTM(TokenMethod):
    """Token mergence between attention and MLP at three blocks; the paper also fuses scales and fine-tunes."""

    paper = Paper(
        title="Multi-Scale And Token Mergence: Make Your ViT More Efficient",
        venue="arXiv",
        year=2023,
        arxiv="2306.04897",
        checked="abstract",
        notes="A reconstruction: no code is public and only the abstract was at hand. Its choice by importance and "
        "merging by similarity are here; the scores (class attention, cosine), blocks and rate are EViT's. Its "
        "fusion of multi-scale features needs training and is left out.",
    )
    needs_cls = True
    native = ("ratio",)

    layers: tuple[int, ...] = param(
        (3, 6, 9), "blocks between whose attention and MLP tokens merge, of 12", low=0
    )
    ratio: float = param(0.7, "fraction of the remaining tokens that each of them keeps", low=0, high=1)

    def stages(self, shape, knob):
        """k = ceil(ratio · n) at every stage."""
        ratio = self.ratio if knob is None else knob
        return ratio_stages(self.layers, ratio, shape.tokens, shape.depth, between=True)

    def reduce(self, site, view, count, memory):
        """The `count` crucial tokens in their order, each with its non-crucial ones: Σ w·x / Σ w."""
        length = view.hidden.shape[1]
        importance = view.attention.rows(slice(0, 1)).mean(1)[:, 0]  # [B, N]
        index = select.keep_prefix_and_top(importance[:, view.prefix :], count, view.prefix)
        rest = select.complement(index, length)
        if rest.shape[1] == 0:
            return Reduction.keep(index, length)
        _, into = match.nearest(view.hidden, rest, index, barred=view.prefix)
        weight = importance.clamp_min(torch.finfo(importance.dtype).tiny)
        return Reduction.average(index, length, rest, into, weight)
