"""Zero-TPrune ranks tokens by weighted page rank on the attention graph, then drops similar and unimportant ones.

Each pruning layer runs I'-S-I: one vote gives a ranking, the similarity stage drops duplicates from the less important
half, and the importance stage drops the lowest ranks of what remains.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import torch

from tprune.core import score, select
from tprune.core.budget import Site, Stage, scale_layer
from tprune.core.reduction import Reduction, gather_tokens
from tprune.methods.base import Paper, param
from tprune.methods.tokens import TokenMethod


@dataclass(frozen=True)
class ZeroTPrune(TokenMethod):
    """Training-free pruning between blocks, from the attention map and keys of the block before."""

    paper = Paper(
        title="Zero-TPrune: Zero-Shot Token Pruning through Leveraging of the Attention Graph in Pre-Trained "
        "Transformers",
        venue="CVPR",
        year=2024,
        arxiv="2305.17328",
        checked="paper",
        notes="No public code. The head filter's range is applied to scores scaled to mean 1, since the variance of a "
        "distribution over 197 tokens never reaches the paper's 0.01 unscaled.",
    )

    layers: tuple[int, ...] = param((1, 3, 6, 9, 11), "blocks before which tokens leave, of 12", low=1)
    keep: tuple[float, ...] = param(
        (1.0, 0.9, 0.8, 0.7, 1.0), "fraction each importance stage keeps", low=0, high=1
    )
    similar: int = param(10, "tokens each similarity stage drops, of 196", low=0)
    iterations: tuple[int, ...] = param(
        (30, 5, 1), "votes in the first, middle and last quarter of blocks", low=1
    )
    variance: tuple[float, ...] = param(
        (0.01, 0.7), "heads outside this range of score variance are left out", low=0
    )
    cls_boost: bool = param(True, "start the class token at sqrt(N) times the others")

    def stages(self, shape, knob):
        """Both stages scaled alike: importance ratios to the power t, similarity counts times t; t = 1 is native."""
        strength = 1.0 if knob is None else (1 - knob) / max(knob, 1e-9)
        stages, alive = [], shape.tokens
        for layer, ratio in zip(self.layers, self.keep, strict=False):
            dropped = min(alive // 2, round(self.similar * strength * shape.tokens / 196))
            alive = max(1, ceil(ratio**strength * (alive - dropped)))
            # The block before must have run: its attention map is what is read.
            stages.append(Stage(Site(max(1, scale_layer(layer, 12, shape.depth))), alive))
        return stages

    def reduce(self, site, view, count, memory):
        """I', S and I on the patches; `duplicates` of the tokens that leave do so for being similar."""
        batch, length = view.hidden.shape[:2]
        prefix, alive = view.prefix, length - view.prefix
        if count >= alive:
            return Reduction.identity(batch, length, view.hidden.device)
        attention = view.attention.rows()  # [B, H, N, N]
        duplicates = self.duplicates(site.layer / view.depth, alive, count)
        present = torch.ones(batch, length, device=attention.device)
        if duplicates:
            ranking = self.importance(attention, present, prefix, 1, whole=True).argsort(
                dim=1, descending=True, stable=True
            )
            similar = self.most_similar(view.attention.key, ranking + prefix, duplicates)
            present = present.scatter(1, similar, 0.0)
        if duplicates == alive - count:
            worth = present[:, prefix:]
        else:
            worth = self.importance(attention, present, prefix, self.votes(site.layer / view.depth))
            worth = worth.masked_fill(present[:, prefix:] == 0, -1.0)
        return Reduction.keep(select.keep_prefix_and_top(worth, count, prefix), length)

    def duplicates(self, depth, alive, count):
        """How many of the `alive - count` tokens that leave are the similarity stage's, by the native proportions."""
        place = min(range(len(self.layers)), key=lambda i: abs(self.layers[i] / 12 - depth))
        by_importance = (1 - self.keep[place]) * 196
        share = self.similar / max(self.similar + by_importance, 1e-9)
        return min(round(share * (alive - count)), alive // 2)

    def votes(self, depth):
        """30, 5 or 1 votes, by depth."""
        return self.iterations[0 if depth <= 0.25 else 2 if depth >= 0.75 else 1]

    def importance(self, attention, present, prefix, votes, whole=False):
        """Weighted page rank per head, heads filtered by variance, root mean square over those left: [B, n].

        With `whole` all tokens are present.
        """
        batch, heads, length, _ = attention.shape
        start = present.clone()
        if self.cls_boost and prefix:
            start[:, 0] *= length**0.5
        start = (start / start.sum(1, keepdim=True)).unsqueeze(1).expand(-1, heads, -1)
        graph = None if whole else present.unsqueeze(1)
        worth = score.page_rank(attention, start, votes, graph)[..., prefix:]  # [B, H, n]
        patches = present[:, None, prefix:]
        total = patches.sum(-1, keepdim=True)
        scaled = worth / (worth.sum(-1, keepdim=True) / total).clamp_min(1e-12)
        spread = (((scaled - 1) * patches) ** 2).sum(-1) / total[..., 0]  # [B, H]
        low, high = self.variance
        use = ((spread >= low) & (spread <= high)).float()
        use = torch.where(use.sum(1, keepdim=True) > 0, use, torch.ones_like(use)).unsqueeze(-1)
        return ((use * worth**2).sum(1) / use.sum(1)).sqrt()

    def most_similar(self, key, ranking, count):
        """The `count` tokens of the less important half whose keys are nearest to one of the other half: [B, count]."""
        feature = score.cosine_normalise(key.transpose(1, 2).flatten(2))  # [B, N, H·d]
        half = ranking.shape[1] - ranking.shape[1] // 2
        important, others = ranking[:, :half], ranking[:, half:]
        near = gather_tokens(feature, others) @ gather_tokens(feature, important).mT
        return others.gather(1, select.top(near.amax(2), count))
