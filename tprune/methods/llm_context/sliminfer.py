"""SlimInfer: hidden states of whole blocks of a prompt leave inside the decoder, because others carry what they say.

Information spreads through the layers, so that later ones do with fewer and fewer blocks. A block is as relevant to
the last token as the most relevant of its small units, which stand in it as means of their keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tprune.core.ranks import rank
from tprune.core.reduction import Reduction
from tprune.core.select import keep_prunable_top
from tprune.errors import UserError
from tprune.methods.attention import Attention
from tprune.methods.base import Paper, param
from tprune.methods.llm_context._steps import Steps


@dataclass(frozen=True)
class SlimInfer(Steps):
    """Blocks by their best unit, at three layers, among those that are left."""

    paper = Paper(
        title="SlimInfer: Accelerating Long-Context LLM Inference via Dynamic Token Pruning",
        venue="AAAI",
        year=2026,
        arxiv="2508.06447",
        code="Longxmas/SlimInfer",
        checked="abstract",
        notes="A reconstruction: the code was not to be had here. Blocks, units, layers and rates are ours; the budget "
        "is exact, so that of the last block that stays only the best units may. Caches are not offloaded to the host.",
    )
    layers: tuple[int, ...] = param((10, 16, 22), "layers before which blocks leave, of 32", low=1)
    rates: tuple[float, ...] = param(
        (0.5, 0.25, 0.125), "fraction of the prompt left after each", low=0, high=1
    )
    block_size: int = param(64, "tokens of a block", low=1)
    unit_size: int = param(8, "tokens of a unit, which divides a block", low=1)

    def stages(self, shape, knob):
        """The staircase; blocks must be made of whole units."""
        if self.block_size % self.unit_size:
            raise UserError(f"sliminfer: units of {self.unit_size} do not divide blocks of {self.block_size}")
        return super().stages(shape, knob)

    def reduce(self, site, view, count, memory):
        """The best blocks of all that are left; the first and the last one before all others."""
        real = torch.ones_like(view.prunable) if view.real is None else view.real
        place = view.position - view.position.where(real, view.position.max()).amin(1, keepdim=True)
        unit = place.clamp_min(0) // self.unit_size  # [B, N]
        score = unit_scores(
            view.attention, view.last, unit.where(real, unit.amax(1, keepdim=True) + 1)
        )  # [B, U]
        per_block = self.block_size // self.unit_size
        blocks = torch.nn.functional.pad(score, (0, -score.shape[1] % per_block), value=-torch.inf)
        blocks = blocks.unflatten(1, (-1, per_block)).amax(2)  # [B, K]
        mine = unit // per_block
        latest = mine.gather(1, view.last)
        order = rank(blocks).gather(1, mine) * score.shape[1] + rank(score).gather(1, unit)
        ends = (mine == 0) | (mine == latest)
        index, valid = keep_prunable_top(ends * order.max() * 2 - order, count, view.prunable)
        return Reduction.keep(index, view.hidden.shape[1], valid)


def unit_scores(attention: Attention, last: Tensor, unit: Tensor) -> Tensor:
    """q · mean of the keys of a unit, mean over heads, scaled: float32 [B, U]; -inf for units that nothing is left of.

    Args:
        attention: of the layer before the site.
        last: int64 [B, 1], the token that asks.
        unit: int64 [B, N], of every token; the largest number in the batch may be padding's, which is nobody's own.
    """
    key, query = attention.key.float(), attention.query.float()
    batch, groups, _, width = key.shape
    asked = query.gather(2, last[:, None, :, None].expand(-1, query.shape[1], 1, width))  # [B, H, 1, d]
    asked = asked.view(batch, groups, -1, width).mean(2)  # the mean over a group's heads: [B, G, d]
    count = int(unit.max()) + 1
    paid = (key * asked.unsqueeze(2)).sum(3).mean(1) * attention.scale  # [B, N]
    sums = paid.new_zeros(batch, count).scatter_add_(1, unit, paid)
    sizes = paid.new_zeros(batch, count).scatter_add_(1, unit, torch.ones_like(paid))
    return torch.where(sizes > 0, sums / sizes.clamp_min(1), -torch.inf)
