"""MSTM keeps the tokens that the class token attends to; every other token flows to the most similar of them.

Merged tokens are means weighted by importance, so that a crucial token is hardly moved by what joins it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from tprune.core import match, select
from tprune.core.budget import ratio_stages
from tprune.core.reduction import Reduction
from tprune.methods.base import Paper, param
from tprune.methods.fit import Plan
from tprune.methods.tokens import TokenMethod
from tprune.methods.vit._tuned import Tuned


@dataclass(frozen=True)
class MSTM(TokenMethod):
    """Token mergence between attention and MLP at three blocks; a fit is the authors' fine-tuning."""

    paper = Paper(
        title="Multi-Scale And Token Mergence: Make Your ViT More Efficient",
        venue="arXiv",
        year=2023,
        arxiv="2306.04897",
        code="changingbz/mtvit",
        checked="code",
        notes="As the authors fine-tune a given model: token mergence alone. Their multi-scale features are another "
        "architecture in front of it, a second embedding of the image at half its size with weights of its own, "
        "trained from the start, and none in their base model. Tokens keep their order, theirs is that of attention; "
        "nothing depends on it. Distillation and register tokens are protected. A fit has no mixup and no "
        "augmentation; on the built-in scenes it gains where much is lost (--keep 0.35), and nothing at 0.5 and above.",
    )
    needs_cls = True
    native = ("ratio",)
    learns = "optional"
    built_in: ClassVar[dict[str, Any]] = {"epochs": 1.0, "batch": 16, "lr": 2e-5}

    layers: tuple[int, ...] = param(
        (3, 6, 9), "blocks between whose attention and MLP tokens merge, of 12", low=0
    )
    ratio: float = param(0.7, "fraction of the remaining tokens that each of them keeps", low=0, high=1)
    smoothing: float = param(0.1, "of the labels in a fit", low=0, high=1)
    epochs: float = param(30.0, "of a fit", low=0)
    batch: int = param(2048, "images per step of a fit", low=1)
    lr: float = param(8e-5, "of a fit, at its peak", low=1e-12)
    min_lr: float = param(1e-6, "of a fit, at its end", low=0)
    weight_decay: float = param(1e-6, "of matrices in a fit", low=0)

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

    def fit(self, shape, keep, seed):
        """The model itself, pruned as at inference."""
        floor = min(1.0, self.min_lr / self.lr)
        plan = Plan(self.epochs, self.batch, self.lr, floor, weight_decay=self.weight_decay)
        return Tuned(self, shape, keep, plan, self.smoothing)
