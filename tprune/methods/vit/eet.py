"""EET keeps the patches the class token attends to, with heads that read much at a patch counting more there.

Three cuts after complete blocks; the rule has no parameters. In the paper a retrieval model is distilled with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log

import torch

from tprune.core import score, select
from tprune.core.budget import Site, Stage, scale_layer
from tprune.core.reduction import Reduction
from tprune.errors import UserError
from tprune.methods.base import Paper, TokenMethod, param

DEPTH, PATCHES = 12, 196
"""The paper's model."""


@dataclass(frozen=True)
class EET(TokenMethod):
    """Content-based token selection after blocks 3, 7 and 9; training-free here, the paper distils with it."""

    paper = Paper(
        title="Rethinking Vision Transformer for Large-Scale Fine-Grained Image Retrieval",
        venue="arXiv",
        year=2025,
        arxiv="2504.16691",
        code="WhiteJiang/EET",
        checked="code",
        notes="The pruning alone, without the paper's hashing head and its distillation from the dense model. "
        "Distillation and register tokens are protected.",
    )
    needs_cls = True
    native = ("counts",)

    layers: tuple[int, ...] = param(
        (3, 7, 9), "blocks after which tokens leave, of 12", low=0, high=DEPTH - 2
    )
    counts: tuple[int, ...] = param(
        (98, 49, 12), "patches left after each of them, of 196", low=1, high=PATCHES - 1
    )

    def check(self, shape):
        """Every block has its count."""
        super().check(shape)
        if len(self.layers) != len(self.counts):
            raise UserError(
                f"--set counts: {len(self.counts)} numbers for {len(self.layers)} blocks; give one for each"
            )

    def stages(self, shape, knob):
        """The paper's fractions, all to one power under a budget; the last one is then the knob."""
        fractions = [count / PATCHES for count in self.counts]
        if knob is not None:
            smallest = log(min(fractions))
            fractions = [knob ** (log(fraction) / smallest) for fraction in fractions]
        stages, alive = {}, shape.tokens
        for layer, fraction in zip(self.layers, fractions, strict=True):
            count = max(1, round(fraction * shape.tokens))
            if count < alive:
                alive = count
                site = Site(scale_layer(layer + 1, DEPTH, shape.depth))
                stages[site] = Stage(site, count)
        return list(stages.values())

    def reduce(self, site, view, count, memory):
        """The best patches in descending order, as the authors have them."""
        patches = slice(view.prefix, None)
        row = view.attention.rows(slice(0, 1))[:, :, 0, patches]
        worth = score.cls_times_head_norm(row, view.attention.output[:, :, patches])
        best = select.top_ranked(worth, count) + view.prefix
        head = torch.arange(view.prefix, device=best.device).expand(len(best), -1)
        return Reduction.keep(torch.cat([head, best], dim=1), view.hidden.shape[1])
