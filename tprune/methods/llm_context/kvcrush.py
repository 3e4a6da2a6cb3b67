"""KVCrush: a part of the cache is for tokens that stand for those that left.

Which heads would keep a token is a pattern of bits. A base method keeps the important tokens; the others are sorted
by how far their pattern is from an anchor, and at equal steps one of them stays, so that every kind of token that
was thrown out is still represented.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from tprune.core.attending import mean_over_group, pool_neighbours, sum_over_group
from tprune.core.cache import Evict
from tprune.core.score import uniform
from tprune.core.select import keep_ends_and_top, representatives, top
from tprune.errors import UserError
from tprune.methods.base import Paper, param
from tprune.methods.cache import CacheMethod
from tprune.methods.cache_view import LayerView

WINDOW, KERNEL = 32, 5
"""SnapKV's, as base method."""


@dataclass(frozen=True)
class KVCrush(CacheMethod):
    """Representatives beside the important entries of H2O or SnapKV; nothing leaves while decoding."""

    paper = Paper(
        title="KVCrush: Key value cache size-reduction using similarity in head-behaviour",
        venue="ACML",
        year=2025,
        arxiv="2503.00022",
        code="openvinotoolkit/openvino.genai",
        checked="paper",
        notes="The paper's variant for single tokens, with a bit per query head. The public code is one for pages, of "
        "which a bit tells for each token whether it is in the better half; anchors, distances and the choice at "
        "equal steps agree with it.",
    )
    reads = ("seeds",)
    takes = ("interval",)
    base: str = param("h2o", "the method that keeps important entries", choices=("h2o", "snapkv"))
    share: float = param(0.25, "part of the budget for representatives", low=0, high=1)
    recent: float = param(0.5, "with h2o, part of the important entries for the latest", low=0, high=1)
    anchor: str = param(
        "random", "the pattern to measure from", choices=("random", "zeros", "ones", "mean", "alternating")
    )

    def check_length(self, length: int, count: int) -> None:
        """SnapKV's window must fit."""
        important, _ = self.parts(count)
        if self.base == "snapkv" and important <= WINDOW:
            raise UserError(
                f"kvcrush: {important} important entries of {length} leave no room beside SnapKV's window of {WINDOW}; "
                "raise --keep, or lower --set share=…"
            )

    def parts(self, count: int) -> tuple[int, int]:
        """How many of `count` entries are important ones and representatives."""
        return count - int(self.share * count), int(self.share * count)

    def start(self, layer: LayerView, count: int) -> Evict:
        """What the base method keeps of its part, and representatives of all else."""
        if count == layer.length:
            return Evict.nothing(*layer.key.shape[:3], layer.key.device)
        important, spoken = self.parts(count)
        paid, score, recent = self._scores(layer, important)  # [B, H, T], [B, G, T]
        kept = keep_ends_and_top(score, important, 0, recent)
        if spoken == 0:
            return Evict(kept)
        bits = torch.zeros_like(paid, dtype=torch.bool).scatter(2, top(paid, important), True)
        bits = bits.transpose(1, 2).unsqueeze(1)  # [B, 1, T, H]
        free = torch.ones_like(score, dtype=torch.bool).scatter(2, kept, False)
        anchor = anchor_of(self.anchor, bits.squeeze(1), layer.seeds, layer.layer).unsqueeze(1)
        picked = representatives(bits, anchor, free, spoken)
        return Evict(torch.cat([kept, picked], dim=-1).sort(dim=-1).values)

    def _scores(self, layer: LayerView, important: int) -> tuple[Tensor, Tensor, int]:
        """Per query head and per key-value head, and how many of the latest stay; the window scores highest."""
        if self.base == "h2o":
            paid = layer.attention.column_sums()
            return paid, sum_over_group(paid, layer.groups), int(self.recent * important)
        votes = pad(
            pool_neighbours(layer.attention.window(WINDOW), KERNEL, "avg"), (0, WINDOW), value=torch.inf
        )
        return votes, mean_over_group(votes, layer.groups), WINDOW


def anchor_of(kind: str, bits: Tensor, seeds: Tensor | None, layer: int) -> Tensor:
    """A pattern bool [B, F] to measure those of `bits` [B, N, F] from; "mean" is what most of them have."""
    rows, width = bits.shape[0], bits.shape[2]
    if kind == "random":
        return (uniform((width,), seeds + layer) < 0.5).to(bits.device)
    if kind == "mean":
        return bits.float().mean(1) > 0.5
    pattern = {"zeros": 0, "ones": 1, "alternating": torch.arange(width) % 2}[kind]
    return torch.as_tensor(pattern).bool().expand(rows, width).to(bits.device)
