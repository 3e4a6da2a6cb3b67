"""FlowCut lets patches leave on their way through the vision tower, by how much information still flows through them.

Every block scores the patches: by the class token's attention, by how alike its value and theirs are, by the size of
their values. Scores add up from block to block; every second block drops as many as its attention is concentrated. Of
images with more tokens some leave the decoder early, scored alike by the last token of the instruction.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from tprune.core import attending, select
from tprune.core.budget import PROJECTOR, Site, Stage, exponent, scale_layer
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
        "for Qwen2-VL. The authors have the stage inside the decoder with LLaVA-NeXT, where to T tokens of five crops "
        "belong ratio = T / 1152 and late = 0.4, and with Qwen2-VL (late = 0.5); --keep then raises both fractions to "
        "one power.",
    )
    positions = "compact"
    native = ("ratio",)
    unit = "crop"

    ratio: float = param(0.2223, "fraction of every crop's tokens that stays: 128 of 576", low=0, high=1)
    decay: float = param(0.5, "what earlier scores count beside a block's own", low=0, high=1)
    late: float | None = param(
        None, "fraction of what the tower leaves that stays inside the decoder; none: all", low=0, high=1
    )
    layer: int = param(1, "the decoder's layer, of 32, behind which the others leave", low=0)

    @property
    def reads(self):
        """The decoder's attention only where tokens leave there."""
        return ("encoder",) if self.late is None else ("encoder", "attention")

    def tower_blocks(self, depth, projected):
        """All before the projected one: each scores, every second one drops."""
        return range(projected)

    def stages(self, shape, knob):
        """k = round(r · N), at least one, and round(late · k) of them inside the decoder."""
        if self.late is None:
            return [Stage(PROJECTOR, max(1, round((self.ratio if knob is None else knob) * shape.tokens)))]
        power = 1.0 if knob is None else exponent(knob)
        count = max(1, round(self.ratio**power * shape.tokens))
        inside = Site(min(scale_layer(self.layer, 32, shape.depth) + 1, shape.depth - 1))
        return [Stage(PROJECTOR, count), Stage(inside, max(1, round(self.late**power * count)))]

    def reduce(self, site, view, count, memory):
        """Inside the tower what this block drops; at the projector what is left of it; then what the text asks for."""
        if "remaining" in view.signals:
            return self.drop(view, count, memory)
        if site != PROJECTOR:
            index, valid = select.keep_prunable_top(self.asked(view), count, view.prunable)
            return Reduction.keep(index, view.hidden.shape[1], valid)
        left = (
            view.signal("left").float() if "left" in view.signals else view.pool(self.flow(view.encoder)[1])
        )
        index, valid = select.keep_prunable_top(left, count, view.prunable)
        return Reduction.keep(index, view.hidden.shape[1], valid)

    def drop(self, view, count, memory):
        """Add the block's scores up; behind every second one the worst leave, behind the last one down to `count`."""
        paid, worth = self.flow(view.encoder)
        if "score" in memory:
            worth = self.decay * memory["score"].gather(1, view.position) + (1 - self.decay) * worth
            memory["score"] = memory["score"].scatter(1, view.position, worth)
        else:
            memory["score"] = worth
        remaining = view.signal("remaining")
        if remaining % 2:
            return Reduction.identity(*view.prunable.shape, view.hidden.device)
        number = view.prunable.sum(1).cpu()
        left = torch.as_tensor(count).expand(len(number))
        if remaining:
            left = left.maximum(number - self.surplus(paid, view.prunable, number - left, remaining))
        index, valid = select.keep_prunable_top(worth, left.minimum(number), view.prunable)
        return Reduction.keep(index, view.hidden.shape[1], valid)

    def surplus(self, paid, prunable, over, remaining):
        """How many leave: (N - t) / sqrt(r) · (1 - H²), H the entropy of the attention over its maximum: int64 [B]."""
        share = paid * prunable
        share = share / share.sum(1, keepdim=True)
        entropy = torch.special.entr(share).sum(1) / prunable.sum(1).clamp_min(2).log()
        return (over / remaining**0.5 * (1 - entropy.cpu().square())).round().long()

    def asked(self, view):
        """(attention of the last token + likeness to its value) · size of the value, both over images alone: [B, N]."""
        attention, value = view.attention, view.attention.value.float()
        last = view.last[:, None, :, None]
        query = attention.query.gather(2, last.expand(-1, attention.query.shape[1], -1, value.shape[3]))
        said = value.gather(2, last.expand(-1, value.shape[1], -1, value.shape[3]))
        paid = attending.attention_logits(query, attention.key, attention.scale)[:, :, 0]
        alike = attending.attention_logits(said, value, value.shape[3] ** -0.5)[:, :, 0]
        hidden = ~view.prunable.unsqueeze(1)
        flow = sum(part.masked_fill(hidden, -torch.inf).softmax(2).mean(1) for part in (paid, alike))
        return flow * value.mean(1).abs().sum(2)

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
