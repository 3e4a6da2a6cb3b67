"""EET keeps the patches the class token attends to, with heads that read much at a patch counting more there.

Three cuts after complete blocks; the rule has no parameters. A model that is to be searched by short codes learns with
it from its own whole self.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log
from typing import Any, ClassVar

import torch

from tprune.core import score, select
from tprune.core.budget import Site, Stage, knob_at, scale_layer
from tprune.core.reduction import Reduction
from tprune.errors import UserError
from tprune.methods.base import Paper, param
from tprune.methods.tokens import TokenMethod
from tprune.methods.vit._eet_fit import Distilled

DEPTH, PATCHES = 12, 196
"""The paper's model."""


@dataclass(frozen=True)
class EET(TokenMethod):
    """Content-based token selection after blocks 3, 7 and 9; with a fit, the paper's distillation."""

    paper = Paper(
        title="Rethinking Vision Transformer for Large-Scale Fine-Grained Image Retrieval",
        venue="arXiv",
        year=2025,
        arxiv="2504.16691",
        code="WhiteJiang/EET",
        checked="code",
        notes="Distillation and register tokens are protected. In a fit teacher and student share their weights, the "
        "authors train two copies of one checkpoint; codes are per class, theirs per image, from its class; and the "
        "patches that are hidden are the ones attended to, theirs with row and column exchanged. On the built-in "
        "scenes the model learns 30 times slower than its new heads; with one rate for all it forgets its classes.",
    )
    needs_cls = True
    native = ("counts",)
    learns = "optional"
    built_in: ClassVar[dict[str, Any]] = {"epochs": 1.0, "batch": 16, "lr": 3e-4, "head_lr": 0.01}

    layers: tuple[int, ...] = param(
        (3, 7, 9), "blocks after which tokens leave, of 12", low=0, high=DEPTH - 2
    )
    counts: tuple[int, ...] = param(
        (98, 49, 12), "patches left after each of them, of 196", low=1, high=PATCHES - 1
    )
    bits: int = param(16, "length of the codes in a fit", low=1)
    hidden: int = param(4, "patches hidden from the student in a fit", low=0)
    epochs: float = param(90.0, "of a fit", low=0)
    batch: int = param(64, "images per step of a fit", low=1)
    lr: float = param(0.01, "of a fit, at its peak", low=1e-12)
    head_lr: float | None = param(None, "of the heads that make codes, where it is another", low=1e-12)
    momentum: float = param(0.9, "of its SGD", low=0, high=1)
    warmup: float = param(0.06, "fraction of the steps: 500 of CUB's 8,460", low=0, high=1)
    task: float = param(0.1, "weight of the student's cross-entropies in a fit", low=0)
    distillation: float = param(1.0, "weight of the codes' distance in a fit", low=0)

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
        best = select.top_ranked(self.worth(view), count) + view.prefix
        head = torch.arange(view.prefix, device=best.device).expand(len(best), -1)
        return Reduction.keep(torch.cat([head, best], dim=1), view.hidden.shape[1])

    def worth(self, view):
        """What the class token attends to, heads weighed by the norm of their output there: [B, patches]."""
        patches = slice(view.prefix, None)
        row = view.attention.rows(slice(0, 1))[:, :, 0, patches]
        return score.cls_times_head_norm(row, view.attention.output[:, :, patches])

    def fit(self, shape, keep, seed):
        """The model itself, pruned as at inference, and a head that makes codes of its logits."""
        if shape.classes == 0:
            raise UserError("eet is fitted to classes, and this model has none; use one with a head")

        knob = knob_at(keep, lambda knob: self.stages(shape, knob), shape.tokens, shape.depth)
        return Distilled(self, shape, self.stages(shape, knob), seed)
