"""Agile-Quant's token pruning: what hardly looks at the first token leaves, late in the decoder.

Attention of each token to the first one grows with how little it finds elsewhere; that single column of the map is
cheap to have, and ranks tokens without summing the whole.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tprune.core.budget import exponent, staircase
from tprune.core.reduction import Reduction
from tprune.core.select import keep_prunable_top
from tprune.methods.attention import Attention
from tprune.methods.base import Paper, param
from tprune.methods.tokens import TokenMethod

ROWS = 256
"""Rows of the attention map that are there at a time."""


@dataclass(frozen=True)
class AgileQuant(TokenMethod):
    """Equal parts of what is left leave after a few layers, in prefill."""

    paper = Paper(
        title="Agile-Quant: Activation-Guided Quantization for Faster Inference of LLMs on the Edge",
        venue="AAAI",
        year=2024,
        arxiv="2312.05693",
        code="shawnricecake/agile-quant",
        checked="code",
        notes="The token pruning alone, without the quantisation it accompanies. The released configuration prunes "
        "nothing; its switch has 90% over layers 10 to 12 of 12, too late for most budgets, so the layers are ours. "
        "The last token of a prompt, which the authors may remove, always stays.",
    )
    native = ("total",)

    layers: tuple[int, ...] = param(
        (3, 6, 9), "layers behind which tokens leave, of 12, counted from 1", low=1
    )
    total: float = param(0.9, "part of the prompt that has left behind the last of them", low=0, high=1)
    conventional: bool = param(
        False, "go by the attention received, a mean over the queries that see a token, instead"
    )

    def stages(self, shape, knob):
        """int(p · n) of the n that are left leave behind each, 1 - (1 - p) to the number of layers being the total."""
        power = 1.0 if knob is None else exponent(knob)
        part = 1 - (1 - self.total) ** (power / len(self.layers))
        counts, alive = [], shape.tokens
        for _ in self.layers:
            alive -= int(alive * part)
            counts.append(alive)
        return staircase(self.layers, counts, 12, shape.depth)

    def reduce(self, site, view, count, memory):
        """s_i = sum over heads of A[i, first]; or of all A[:, i], over how many see it."""
        real = torch.ones_like(view.prunable) if view.real is None else view.real
        if self.conventional:
            seeing = real.flip(1).cumsum(1).flip(1).clamp_min(1)
            score = view.attention.column_sums(counted=view.real).sum(1) / seeing
        else:
            score = paid_to(view.attention, real.int().argmax(1, keepdim=True)).sum(1)
        index, valid = keep_prunable_top(score, count, view.prunable)
        return Reduction.keep(index, view.hidden.shape[1], valid)


def paid_to(attention: Attention, key: Tensor) -> Tensor:
    """What every query pays to one key, int64 [B, 1]: float32 [B, H, N]; the map is never whole."""
    parts = []
    for first in range(0, attention.query.shape[2], ROWS):
        rows = attention.rows(slice(first, first + ROWS))  # [B, H, R, N]
        column = key[:, None, None].expand(*rows.shape[:3], 1)
        parts.append(rows.gather(3, column).squeeze(3))
    return torch.cat(parts, dim=2)
