"""FlowCut lets patches leave on their way through the vision tower, by how much information still flows through them.

Every block scores the patches: by the class token's attention, by how alike its value and theirs are, by the size of
their values. Scores add up from block to block; every second block drops as many as its attention is concentrated.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from tprune.core import select
from tprune.core.budget import PROJECTOR, Stage
from tprune.core.reduction import Reduction
from tprune.methods.base import Paper, param
from tprune.methods.tokens import TokenMethod


@dataclass(frozen=True)
class FlowCut(TokenMethod):
    """Progressive pruning inside the vision tower."""

    paper = Paper(
        title="FlowCut: Rethinking Redundancy via Information Flow for Efficient Vision-Language Models",
        venue="NeurIPS",
        year=2025,
        arxiv="2505.19536",
        code="TungChintao/FlowCut",
        checked="code",
        notes="How many leave at a block is decided for each crop; the authors take the largest number of a batch. "
        "Towers that merge patches run in full, and the projected block's scores alone decide behind them; without a "
        "class token the mean query takes its place, and values count by their size alone, as in the authors' code "
        "for Qwen2-VL. Their second stage for cut images, inside the decoder, is not part of this.",
    )
    reads = ("encoder",)
    positions = "compact"
    native = ("ratio",)
    unit = "crop"

    ratio: float = param(0.2223, "fraction of every crop's tokens that stays: 128 of 576", low=0, high=1)
    decay: float = param(0.5, "what earlier scores count beside a block's own", low=0, high=1)

    def tower_blocks(self, depth, projected):
        """All before the projected one: each scores, every second one drops."""
        return range(projected)

    def stages(self, shape, knob):
        """k = round(r · N), at least one."""
        keep = self.ratio if knob is None else knob
        return [Stage(PROJECTOR, max(1, round(keep * shape.tokens)))]

    def reduce(self, site, view, count, memory):
        """Inside the tower what this block drops; at the projector what is left of the tower."""
        if "remaining" in view.signals:
            return self.drop(view, count, memory)
        score = (
            view.signal("left").float() if "left" in view.signals else view.pool(self.flow(view.encoder)[1])
        )
        index, valid = select.keep_prunable_top(score, count, view.prunable)
        return Reduction.keep(index, view.hidden.shape[1], valid)

    def drop(self, view, count, memory):
        """Add the block's scores up; behind every second one the worst leave, behind the last one down to `count`."""
        paid, score = self.flow(view.encoder)
        if "score" in memory:
            score = self.decay * memory["score"].gather(1, view.position) + (1 - self.decay) * score
            memory["score"] = memory["score"].scatter(1, view.position, score)
        else:
            memory["score"] = score
        remaining = view.signal("remaining")
        if remaining % 2:
            return Reduction.identity(*view.prunable.shape, view.hidden.device)
        number = view.prunable.sum(1).cpu()
        left = torch.as_tensor(count).expand(len(number))
        if remaining:
            left = left.maximum(number - self.surplus(paid, view.prunable, number - left, remaining))
        index, valid = select.keep_prunable_top(score, left.minimum(number), view.prunable)
        return Reduction.keep(index, view.hidden.shape[1], valid)

    def surplus(self, paid, prunable, over, remaining):
        """How many leave: (N - t) / sqrt(r) · (1 - H²), H the entropy of the attention over its maximum: int64 [B]."""
        share = paid * prunable
        share = share / share.sum(1, keepdim=True)
        entropy = torch.special.entr(share).sum(1) / prunable.sum(1).clamp_min(2).log()
        return (over / remaining**0.5 * (1 - entropy.cpu().square())).round().long()

    def flow(self, tower):
        """What the class token (or the mean query) pays to every patch, and the patches' scores, both [B, P]."""
        attention, prefix = tower.attention, tower.prefix
        size = attention.value.float().mean(1).abs().sum(2)
        if not prefix:
            bias = attention.bias if attention.bias is not None and attention.bias.shape[-2] == 1 else None
            query = attention.query.mean(2, keepdim=True)
            paid = replace(attention, query=query, bias=bias).rows().mean(1)[:, 0]
            return paid, paid * size
        paid = attention.rows(slice(0, 1)).mean(1)[:, 0, prefix:]
        value = attention.value.float()
        alike = (value[:, :, :1] @ value.transpose(2, 3))[:, :, 0]
        visible = tower.prunable | (torch.arange(value.shape[2], device=value.device) < prefix)
        alike = alike.masked_fill(~visible.unsqueeze(1), -torch.inf).softmax(2).mean(1)[:, prefix:]
        return paid, (paid / paid.sum(1, keepdim=True) + alike / alike.sum(1, keepdim=True)) * size[
            :, prefix:
        ]
