"""TNT ranks patches by linear heads that were trained to give the noise to the patches that matter least.

Where tokens leave at inference the head of the block before picks those that stay; a few of them leave for being like
others. One dot product per token, no attention map.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from tprune.core import score, select
from tprune.core.budget import Site, Stage, scale_layer
from tprune.core.reduction import Reduction, gather_tokens
from tprune.methods.base import Paper, param
from tprune.methods.tokens import TokenMethod
from tprune.methods.vit._tnt_fit import Noise

DEPTH, PATCHES, HEADS = 12, 196, 5
"""The paper's model, and after how many of its blocks noise is added."""


@dataclass(frozen=True)
class TNT(TokenMethod):
    """After some of the first blocks: the best patches by their head, then the most redundant of these leave."""

    paper = Paper(
        title="Training Noise Token Pruning",
        venue="arXiv",
        year=2024,
        arxiv="2411.18092",
        code="mx-ethan-rao/tnt",
        checked="code",
        notes="The authors draw one partition for a batch, here every image has its own. Tokens stay in their order, "
        "theirs is that of the scores; nothing depends on it. As in their code tokens are normalised where noise is "
        "added, in training only.",
    )
    kind = "trained"
    reads = ("seeds",)
    native = ("rate",)
    learns = "required"
    # The digits' tokens are far from unit size: normalised, they mean nothing to the blocks behind.
    built_in: ClassVar[dict[str, Any]] = {"epochs": 1.0, "batch": 16, "lr": 0.02, "norm": False}

    layers: tuple[int, ...] = param((2,), "blocks after which tokens leave, of 12", low=0, high=HEADS - 1)
    rate: float = param(0.6, "fraction of the remaining tokens that each of them keeps", low=0, high=1)
    similar: int = param(25, "tokens that leave for being like others, of 196", low=0)
    partition: str = param(
        "random",
        "what is compared: a random half with the rest, or the worse half with the better",
        choices=("random", "sequential"),
    )
    noise: float = param(0.02, "standard deviation of the noise in training", low=0)
    norm: bool = param(True, "normalise tokens where noise is added")
    epochs: float = param(40.0, "of a fit", low=0)
    batch: int = param(2048, "images per step of a fit", low=1)
    lr: float = param(2e-3, "of a fit, at its peak", low=1e-12)
    min_lr: float = param(1e-5, "of a fit, at its end", low=0)
    warmup: float = param(0.125, "fraction of the steps", low=0, high=1)
    weight_decay: float = param(0.05, "of a fit", low=0)

    def heads(self, depth):
        """How many blocks have a head."""
        return max(1, min(round(HEADS * depth / DEPTH), depth - 1))

    def sites(self, depth):
        """The places before the next block."""
        last = self.heads(depth)
        return [Site(min(scale_layer(layer, DEPTH, depth) + 1, last)) for layer in self.layers]

    def stages(self, shape, knob):
        """int(rate · n) at every site; with several the redundant leave before the first block, once."""
        rate = self.rate if knob is None else knob
        stages, alive = [], shape.tokens
        if len(self.layers) > 1:
            share = 1.0 if knob is None else (1 - knob) / max(1 - self.rate, 1e-9)
            alive -= min(round(share * self.redundant(shape.tokens)), alive // 2)
            stages.append(Stage(Site(0), alive))
        for site in self.sites(shape.depth):
            alive = max(1, select.floor_count(alive, rate))
            stages.append(Stage(site, alive))
        return stages

    def redundant(self, tokens):
        """How many leave for being like others, of so many."""
        return round(self.similar * tokens / PATCHES)

    def reduce(self, site, view, count, memory):
        """The `count` best, or with one site a few more of which the most redundant leave."""
        prefix = view.prefix
        batch, length = view.hidden.shape[:2]
        alive = length - prefix
        if site.layer == 0:
            worth, chosen = view.hidden.new_zeros(batch, alive), alive
        else:
            worth = view.hidden[:, prefix:].float() @ self.state["heads"][site.layer - 1]
            tokens = memory.setdefault("tokens", alive)
            spare = self.redundant(tokens) if len(self.layers) == 1 else 0
            chosen = count + min(spare, alive - count, count)
        best = select.top_ranked(worth, chosen) + prefix  # [B, chosen], best first
        if chosen > count:
            half = self.halves(best, view.seeds + site.layer)
            best = unlike(view.hidden, *half, chosen - count)
        return Reduction.keep(select.with_prefix(best.sort(1).values, prefix), length)

    def halves(self, ranked, seeds):
        """`ranked` [B, M], best first, as those that may leave and those they are compared with."""
        middle = ranked.shape[1] // 2
        if self.partition == "sequential":
            return ranked[:, middle:], ranked[:, :middle]
        drawn = score.uniform(ranked.shape[1:], seeds).to(ranked.device).argsort(1)
        ranked = ranked.gather(1, drawn)
        return ranked[:, :middle], ranked[:, middle:]

    def fit(self, shape, keep, seed):
        """Heads, from small random values; the budget plays no part."""
        return Noise(self, shape, seed)


def unlike(hidden, group, others, count):
    """The tokens of both, without the `count` of `group` that are most like one of `others`.

    Args:
        hidden: [B, N, D]; group, others: int64 [B, A] and [B, O].
        count: at most A.

    Returns:
        int64 [B, A + O - count].
    """
    unit = score.cosine_normalise(hidden)
    closeness = (gather_tokens(unit, group) @ gather_tokens(unit, others).transpose(1, 2)).amax(2)
    stays = select.top_ranked(-closeness, group.shape[1] - count)
    return torch.cat([group.gather(1, stays), others], 1)
