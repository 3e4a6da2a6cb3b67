"""Cropr drops the same number of tokens after every block, by learned queries, and brings them back for the last one.

Auxiliary heads teach the queries which tokens tell the class; they are thrown away, and a score is one dot product.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, ClassVar

import torch

from tprune.core import select
from tprune.core.budget import Site, Stage, knob_at, whole_steps
from tprune.core.reduction import Reduction
from tprune.errors import UserError
from tprune.methods.base import Paper, param
from tprune.methods.tokens import TokenMethod
from tprune.methods.vit._cropr_fit import Croppers


@dataclass(frozen=True)
class Cropr(TokenMethod):
    """Cross-attention pruning after complete blocks, with last layer fusion."""

    paper = Paper(
        title="Token Cropr: Faster ViTs for Quite a Few Tasks",
        venue="CVPR",
        year=2025,
        arxiv="2412.00965",
        code="benbergner/cropr",
        checked="code",
        notes="Tokens come back in their first order, the authors' after those that stayed; only rounding differs. "
        "All prefix tokens are protected, the authors' class token alone. Fitted to classes, without the authors' "
        "mixup, augmentation and change of drop-path; queries learned for dense tasks can be given as state. "
        "--fit built-in lets tokens begin to leave slowly, the authors' leave from the first step on.",
    )
    reads = ()
    native = ("rate",)
    kind = "trained"
    learns = "required"
    built_in: ClassVar[dict[str, Any]] = {
        "epochs": 2.0,
        "batch": 16,
        "lr": 3e-4,
        "query_lr": 4e-3,
        "anneal": 0.6,
    }

    rate: int = param(8, "tokens that leave after each block, one more after the first", low=1)
    fusion: bool = param(True, "bring all tokens back for the last block (LLF)")
    tune: bool = param(True, "fit the model's own weights too")
    mlp_ratio: float = param(4.0, "hidden over outer width of the auxiliary MLPs", low=1e-3)
    smoothing: float = param(0.1, "of the labels in a fit", low=0, high=1)
    epochs: float = param(50.0, "of a fit", low=0)
    batch: int = param(1024, "images per step of a fit", low=1)
    lr: float = param(4e-3, "of a fit, at its peak, after the last block", low=1e-12)
    query_lr: float | None = param(None, "of queries and auxiliary heads, where it is another", low=1e-12)
    layer_decay: float = param(0.75, "learning rate of a block over that of the next", low=0, high=1)
    min_lr: float = param(1e-6, "of a fit, at its end", low=0)
    warmup: float = param(0.1, "fraction of the steps", low=0, high=1)
    anneal: float = param(0.0, "fraction of the steps until all leave that shall, from none", low=0, high=1)
    weight_decay: float = param(0.05, "of matrices in a fit", low=0)

    def check(self, shape):
        """There is a block to leave."""
        if self.scored(shape.depth) < 1:
            raise UserError(f"cropr needs more than {shape.depth} blocks")

    def scored(self, depth):
        """After how many blocks tokens are scored."""
        return depth - 1 - self.fusion

    def rejoins(self, shape):
        """Before the last block, with fusion."""
        return Site(shape.depth - 1) if self.fusion else None

    def counts(self, shape, knob):
        """Tokens left after each scored block, one at least; under a budget the same part of them leaves each."""
        blocks = self.scored(shape.depth)
        if knob is None:
            rates = [self.rate + 1] + [self.rate] * (blocks - 1)
        else:
            rates = whole_steps([(1 - knob) * shape.tokens] * blocks)
        return [max(1, shape.tokens - gone) for gone in accumulate(rates)]

    def stages(self, shape, knob):
        """After the blocks that something leaves; at the end all come back."""
        stages, alive = [], shape.tokens
        for layer, count in enumerate(self.counts(shape, knob)):
            if count < alive:
                alive = count
                stages.append(Stage(Site(layer + 1), count))
        if self.fusion and stages:
            stages.append(Stage(Site(shape.depth - 1), shape.tokens))
        return stages

    def reduce(self, site, view, count, memory):
        """By the queries of the block before."""
        return self.crop(view, self.state["queries"][site.layer - 1], count)

    def crop(self, view, queries, count):
        """The tokens with the largest sum of raw dot products with `queries` [Q, D], in descending order."""
        worth = view.hidden[:, view.prefix :].float() @ queries.float().sum(0)
        best = select.top_ranked(worth, count) + view.prefix
        head = torch.arange(view.prefix, device=best.device).expand(len(best), -1)
        return Reduction.keep(torch.cat([head, best], dim=1), view.hidden.shape[1])

    def neutral_state(self, shape, seed):
        """Queries as they are drawn, for a bare tower too."""
        return self.fit(replace(shape, classes=max(1, shape.classes)), 0.5, seed).state()

    def fit(self, shape, keep, seed):
        """Queries, auxiliary heads and the model itself, pruned as at inference."""
        if shape.classes == 0:
            raise UserError("cropr is fitted to classes, and this model has none; use one with a head")

        knob = knob_at(keep, lambda knob: self.stages(shape, knob), shape.tokens, shape.depth)
        return Croppers(self, shape, self.counts(shape, knob), seed)
