"""SpAtten: what no head looks at, and heads that read little, leave from layer to layer and never come back.

Tokens collect the attention that all heads and queries pay them, heads the size of what they read, over the layers so
far; both are cut to a part that falls linearly with depth.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tprune.core.attending import attend
from tprune.core.budget import Site, Stage, exponent
from tprune.core.progressive import largest_of_rows, leading_bits, sharpened
from tprune.core.reduction import Reduction
from tprune.core.select import keep_prunable_top
from tprune.errors import UserError
from tprune.methods.attention import Attention
from tprune.methods.base import Paper, param
from tprune.methods.tokens import TokenMethod

ROWS = 128
"""Rows of the attention map that are there at a time."""


@dataclass(frozen=True)
class SpAtten(TokenMethod):
    """Cascade pruning of tokens and heads; pruning of values and progressive quantisation where asked for."""

    paper = Paper(
        title="SpAtten: Efficient Sparse Attention Architecture with Cascade Token and Head Pruning",
        venue="HPCA",
        year=2021,
        arxiv="2012.09852",
        code="mit-han-lab/spatten",
        checked="paper",
        notes="The paper's cascade, in prefill; what is generated all stays. The authors' LLM code is another method "
        "(raw logits, no cascade, no heads), and their schedules per task are not published: this one is that of "
        "LTP's code, which leaves the first max(3, 15%) of 12 or more layers alone. --keep raises the parts of tokens "
        "and of heads to one power. Heads that left are zeroed and still computed. Quantisation is emulated, with one "
        "scale per head.",
    )
    native = ("final", "heads_final")
    cascades = True

    final: float = param(0.1, "part of the prompt to which it falls, behind the last layer", low=0, high=1)
    heads_final: float = param(
        0.9, "part of the heads to which they fall, behind the last layer", low=0, high=1
    )
    values: float = param(1.0, "part of the values that each head reads for each token", low=0, high=1)
    bits: tuple[int, ...] = param(
        (),
        "bits of queries and keys that are read first, and further ones for flat rows (8,4); none: no quantisation",
    )
    flat: float = param(0.1, "a row of attention is flat where no entry reaches this", low=0, high=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bits and (len(self.bits) != 2 or self.bits[0] < 2 or self.bits[1] < 0):
            shown = ",".join(map(str, self.bits))
            raise UserError(
                f"--set bits={shown}: expected two numbers, leading bits (2 or more) and further ones"
            )

    def stages(self, shape, knob):
        """After every layer a part of the prompt is left, which falls linearly behind the first layers."""
        power = 1.0 if knob is None else exponent(knob)
        parts = falling(self.final, shape.depth)
        return [
            Stage(Site(layer + 1), round(shape.tokens * part**power)) for layer, part in enumerate(parts[:-1])
        ]

    def heads(self, shape, stages):
        """The same staircase for heads, at the power to which that for tokens is raised; at least one is left."""
        if not stages:
            return [shape.heads] * shape.depth
        part = max(stages[-1].count, 0.5) / shape.tokens
        power = 1.0 if self.final == 1 else math.log(part) / math.log(falling(self.final, shape.depth)[-2])
        parts = [1.0, *falling(self.heads_final, shape.depth)[:-1]]
        return [max(1, round(shape.heads * part**power)) for part in parts]

    def reduce(self, site, view, count, memory):
        """Tokens collect s_j += sum over the heads that are left and all queries of A[h, q, j]; the best go on."""
        paid = view.attention.column_sums(counted=view.real)  # [B, H, N]
        received = (paid * memory["heads"].unsqueeze(2)).sum(1) + memory.get("received", 0)
        index, valid = keep_prunable_top(received, count, view.prunable)
        memory["received"] = received.gather(1, index)
        return Reduction.keep(index, view.hidden.shape[1], valid)

    def attend(self, attention: Attention) -> Tensor | None:
        """Attention from few bits where they suffice, to the largest entries of each row alone."""
        if self.values == 1 and not self.bits:
            return None
        rough, fine, visible = attention, attention, attention.visible()
        seen = None if visible is None else visible.any(-2)
        if self.bits:
            rough, fine = (self.quantised(attention, dropped, seen) for dropped in (self.bits[1], 0))
        parts = []
        for first in range(0, attention.query.shape[2], ROWS):
            rows = slice(first, first + ROWS)
            paid = rough.rows(rows)
            if self.bits:
                paid = sharpened(paid, fine.rows(rows), self.flat)
            if visible is not None:  # padding sees nothing, and reads nothing
                paid = paid.masked_fill(~visible[..., rows, :].any(-1, keepdim=True), 0)
            parts.append(attend(largest_of_rows(paid, self.values, seen), attention.value))
        return torch.cat(parts, dim=2)

    def quantised(self, attention: Attention, dropped: int, seen: Tensor | None) -> Attention:
        """The same queries and keys without the `dropped` lowest bits; `seen` is bool [B, H or 1, N], of the keys."""
        asking = None if seen is None else seen[..., -attention.query.shape[2] :]
        query = leading_bits(attention.query, sum(self.bits), dropped, asking)
        return replace(attention, query=query, key=leading_bits(attention.key, sum(self.bits), dropped, seen))


def falling(final: float, depth: int) -> list[float]:
    """What is left behind each of `depth` layers: 1 for the first max(3, 15%), then linear to `final` at the last.

    Of models with less than 12 layers a quarter is left alone.
    """
    first = min(max(3, math.ceil(0.15 * depth)), depth // 4)
    return [1 - (1 - final) * max(0, layer - first + 1) / (depth - first) for layer in range(depth)]
