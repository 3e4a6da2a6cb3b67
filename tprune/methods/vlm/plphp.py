"""PLPHP: layers differ in how much they look at the image, and heads in where, so each keeps image tokens of its own.

The attention that the last prompt token pays to the image says which of three levels of pruning a layer gets; every
key-value head of it then keeps, in the cache, the image tokens it attends to most.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tprune.core.allocate import share_out
from tprune.core.attending import mean_over_group
from tprune.core.budget import Site, Stage, scale_layer
from tprune.methods.base import Paper, param
from tprune.methods.tokens import TokenMethod


@dataclass(frozen=True)
class PLPHP(TokenMethod):
    """Keep r ± Δr of the image tokens per layer, and in every head its own, behind the prompt."""

    paper = Paper(
        title="PLPHP: Per-Layer Per-Head Vision Token Pruning for Efficient Large Vision-Language Models",
        venue="arXiv",
        year=2025,
        arxiv="2502.14504",
        checked="abstract",
        notes="Neither code nor full text was at hand: three levels of layers and a choice per head are the paper's; "
        "r, Δr, α, β and the first layer are not confirmed. Query heads that share a key-value head are averaged, "
        "all images of a prompt are ranked together. The prompt runs in full, and so the first token of an answer is "
        "the dense model's: the budget counts cache entries. --keep solves r for every prompt.",
    )
    native = ("rate",)

    rate: float = param(0.4, "r: fraction of the image tokens that a layer keeps", low=0, high=1)
    step: float = param(0.3, "Δr: what attentive layers keep more, and indifferent ones less", low=0, high=1)
    attentive: float = param(0.25, "α: a layer is attentive beyond this mass on the image", low=0, high=1)
    indifferent: float = param(0.1, "β: a layer is indifferent below this mass", low=0, high=1)
    first: int = param(2, "layers before this one, of 32, keep all", low=0)

    def evicts(self):
        """Nothing leaves before the answer."""
        return True

    def stages(self, shape, knob):
        """r of the image tokens from the first layer on: what a layer of the middle level keeps."""
        keep = self.rate if knob is None else knob
        return [Stage(Site(scale_layer(self.first, 32, shape.depth)), max(1, round(keep * shape.tokens)))]

    def worth(self, attention, image, last):
        """A[last, j] per key-value head, and the mass γ = mean over heads of Σ_image A[last, j]."""
        paid = attention.rows(last)[:, :, 0]  # [B, H, T]
        mass = (paid.mean(1) * image).sum(1)
        return mean_over_group(paid, attention.key.shape[1]), mass

    def counts(self, facts, images, wanted):
        """floor(r_l V) with r_l = r + Δr, r or r - Δr; with --keep r is what leaves as many as are wanted."""
        depth = len(facts)
        first = scale_layer(self.first, 32, depth)
        level = (facts > self.attentive).double() - (facts < self.indifferent).double()
        shift = self.step * level[first:]
        if wanted is None:
            counts = ((self.rate + shift).clamp(0, 1) * images + 1e-9).long()
        else:
            counts = share_out(shift * images, images, wanted * (depth - first))
        return torch.cat([images.expand(first, -1), counts])
