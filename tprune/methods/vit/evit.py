"""EViT keeps the tokens the class token attends to and fuses the others into one, at three blocks.

The fused token is the attention-weighted sum of what leaves, and an ordinary token from then on.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import torch

from tprune.core import select
from tprune.core.budget import Site, Stage, scale_layer
from tprune.core.reduction import Reduction
from tprune.methods.base import Paper, param
from tprune.methods.tokens import TokenMethod


@dataclass(frozen=True)
class EViT(TokenMethod):
    """Token reorganization between attention and MLP; here training-free, the paper fine-tunes with it."""

    paper = Paper(
        title="Not All Patches are What You Need: Expediting Vision Transformers via Token Reorganizations",
        venue="ICLR",
        year=2022,
        arxiv="2202.07800",
        code="youweiliang/evit",
        checked="code",
        notes="Used without the paper's fine-tuning. Distillation and register tokens are protected; the "
        "authors' code treats a distillation token as a patch.",
    )
    needs_cls = True
    native = ("ratio",)

    layers: tuple[int, ...] = param(
        (3, 6, 9), "blocks between whose attention and MLP tokens leave, of 12", low=0
    )
    ratio: float = param(0.7, "fraction of the remaining tokens that each of them keeps", low=0, high=1)
    fuse: bool = param(True, "fuse the tokens that leave into one")

    def stages(self, shape, knob):
        """k = ceil(ratio · n) and the fused token on top; a stage that nothing leaves is none."""
        ratio = self.ratio if knob is None else knob
        stages, alive = [], shape.tokens
        for layer in self.layers:
            kept = max(1, ceil(ratio * alive))
            if kept < alive:
                alive = kept + self.fuse
                stages.append(Stage(Site(scale_layer(layer, 12, shape.depth), between=True), alive))
        return stages

    def reduce(self, site, view, count, memory):
        """Kept tokens in descending order of attention (as the authors have it), then the fused one."""
        batch, length = view.hidden.shape[:2]
        cls_attention = view.attention.rows(slice(0, 1)).mean(1)[:, 0, view.prefix :]  # [B, n]
        order = select.top_ranked(cls_attention, length - view.prefix)
        head = torch.arange(view.prefix, device=order.device).expand(batch, -1)
        index = torch.cat([head, order[:, :count] + view.prefix], dim=1)
        if not self.fuse:
            return Reduction.keep(index, length)
        # The last slot is the fused token; the best of those that leave stands for it.
        rest = order[:, count:] + view.prefix
        weight = cls_attention.gather(1, order)[:, count - 1 :]
        own = torch.cat([torch.ones_like(index[:, :-1], dtype=weight.dtype), weight[:, :1]], dim=1)
        into = torch.full_like(rest, index.shape[1] - 1)
        return Reduction.merge(index, length, rest, into, weight=weight[:, 1:], own=own)
