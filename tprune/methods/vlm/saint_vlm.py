"""SAINT for vision-language models drops image tokens that resemble many others, in vision tower and decoder.

In the tower the patches most similar to all that are left leave round by round. Inside the decoder tokens at even
places leave if enough of those at odd places are like them, layer after layer, so that each image loses what it has too
much of. Keys are compared; no attention map is needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import torch

from tprune.core import alike, ranks, select
from tprune.core.budget import PROJECTOR, Site, Stage, scale_layer
from tprune.core.reduction import Reduction
from tprune.core.score import cosine_normalise
from tprune.methods.base import Paper, param
from tprune.methods.tokens import TokenMethod

LAYER_SHARE = 0.22
"""A budget r keeps r of the patches in the tower and r^0.22 of the tokens at each decoder layer: with the authors'
0.651 that is 0.91, and a quarter of the tokens is left at the end, as they report."""


@dataclass(frozen=True)
class SaintVLM(TokenMethod):
    """Similarity-aware pruning; the part for vision-language models."""

    paper = Paper(
        title="Similarity-Aware Token Pruning: Your VLM but Faster",
        venue="arXiv",
        year=2025,
        arxiv="2503.11549",
        code="ArmenJeddi/saint",
        checked="code",
        notes="Blocks and layers are of 24 and 32 and scale with the depth. Towers that make one token of several "
        "patches run in full, and tokens leave behind them, by the same keys. --keep fixes how many leave each layer, "
        "in the same ratio. Decoding goes on at the prompt's full length; the authors leave out one position there.",
    )
    reads = ("attention", "encoder")
    unit = "crop"
    native = ("patches",)
    under_keep = {"counts": "keep"}

    where: str = param("hybrid", "where tokens leave", choices=("tower", "decoder", "hybrid"))
    patches: float = param(0.651, "fraction of the patches that the tower keeps: 375 of 576", low=0, high=1)
    block: int = param(
        19, "block of the tower whose keys are compared and behind which patches leave, of 24", low=0
    )
    divisor: int = param(16, "r: one in so many leaves in the first round in the tower", low=1)
    first: int = param(7, "first decoder layer behind which tokens leave, of 32", low=0)
    last: int = param(16, "last decoder layer behind which tokens leave, of 32", low=0)
    threshold: float = param(0.83, "cosine of keys from which two tokens are alike", low=-1, high=1)
    partners: int = param(5, "how many alike make a token redundant (K)", low=1)
    gamma: float = param(10.0, "how much the similarity of the partners counts beside their number", low=0)
    counts: str = param(
        "image", "who says how many leave a layer: each prompt, --keep", choices=("image", "keep")
    )

    def varies(self):
        """In the decoder, unless a budget fixes the numbers."""
        return super().varies() and self.where != "tower"

    def encoder_blocks(self, depth):
        """The block whose keys are compared."""
        return (scale_layer(self.block, 24, depth),)

    def tower_blocks(self, depth, projected):
        """Patches leave behind its attention."""
        return () if self.where == "decoder" else (scale_layer(self.block, 24, depth),)

    def stages(self, shape, knob):
        """A fraction in the tower; then at most half at every layer, any number or the same fraction."""
        if self.where != "tower":
            self.check_budget(knob)
        stages, alive = [], shape.tokens
        if self.where != "decoder":
            alive = max(1, round((self.patches if knob is None else knob) * alive))
            stages.append(Stage(PROJECTOR, alive))
        if self.where != "tower":
            layers = {
                max(1, scale_layer(layer, 32, shape.depth)) for layer in range(self.first + 1, self.last + 2)
            }
            for layer in sorted(layers):
                alive = alive if knob is None else ceil(alive * max(0.5, knob**LAYER_SHARE))
                stages.append(Stage(Site(layer), alive))
        return stages

    def reduce(self, site, view, count, memory):
        """Behind the tower round by round, in the decoder even tokens beside odd ones."""
        stays = self.central(view, count) if site == PROJECTOR else self.redundant(view, count)
        index, valid = select.keep_prunable_top(
            stays.float(), (stays & view.prunable).sum(1).cpu(), view.prunable
        )
        return Reduction.keep(index, view.hidden.shape[1], valid)

    def central(self, view, count):
        """Which patches are left: bool [B, N]; keys are averaged over heads."""
        [block] = self.encoder_blocks(view.encoder.depth)
        tower = view.encoders[block]
        keys = view.pool(tower.attention.key.mean(1)[:, tower.prefix :])
        number = view.prunable.sum(1).tolist()
        wanted = torch.as_tensor(count).expand(len(number)).tolist()
        rounds = [self.rounds(*pair) for pair in zip(number, wanted, strict=True)]
        longest = max(map(len, rounds))
        table = torch.tensor([row + [0] * (longest - len(row)) for row in rounds], dtype=torch.int64)
        return alike.drop_central(keys, table.view(len(rounds), longest), view.prunable)

    def rounds(self, tokens, count):
        """How many leave in each round: a part of those left, whose divisor is what left before (the authors' code)."""
        rounds, divisor = [], self.divisor
        while tokens > count:
            divisor = max(1, min(tokens - count, tokens // divisor))
            rounds.append(divisor)
            tokens -= divisor
        return rounds

    def redundant(self, view, count):
        """Which tokens are left: bool [B, N]; places are counted among the image tokens that are there."""
        place, valid = select.keep_where(view.prunable)
        real = torch.ones_like(place, dtype=torch.bool) if valid is None else valid
        keys = view.attention.key.mean(1)
        metric = cosine_normalise(keys.gather(1, place.unsqueeze(2).expand(-1, -1, keys.shape[2])))
        worth, partners = alike.redundancy_of_evens(metric, real, self.threshold, self.gamma)
        if self.counts == "keep":
            leaving = real.sum(1) - torch.as_tensor(count, device=place.device)
        else:
            leaving = (partners >= self.partners).sum(1)
        left = real.clone()
        left[:, ::2] &= ranks.rank(worth) >= leaving.unsqueeze(1)
        return torch.zeros_like(view.prunable).scatter(1, place, left)
