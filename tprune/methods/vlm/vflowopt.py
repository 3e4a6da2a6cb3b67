"""VFlowOpt keeps what the hubs of the vision tower look at, folds the rest into cells of the image, and prunes on.

Few patches gather most of the attention; what these hubs attend to carries the information on. What falls below is not
lost: neighbours become one token. Inside the decoder more of it leaves twice, by the same scores.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from math import prod
from operator import mul

import torch

from tprune.core import fold, ranks, score, select
from tprune.core.budget import PROJECTOR, Stage, exponent, scale_layer, staircase
from tprune.core.reduction import Reduction
from tprune.errors import UserError
from tprune.methods.base import Paper, param
from tprune.methods.tokens import TokenMethod


@dataclass(frozen=True)
class VFlowOpt(TokenMethod):
    """Pruning and recycling of an image's tokens behind the projector, pruning by the carried scores in the decoder."""

    paper = Paper(
        title="VFlowOpt: A Token Pruning Framework for LMMs with Visual Information Flow-Guided Optimization",
        venue="ICCV",
        year=2025,
        arxiv="2508.05211",
        code="sihany077/VFlowOpt",
        checked="code",
        notes="The defaults are what the authors' Bayesian optimisation found for a quarter of the tokens on "
        "LLaVA-OneVision-7B; tprune tune looks for others, by the quality of answers (the authors: by the cosine of "
        "the prompt's last token behind the last layer). --keep raises the three fractions to one power, which leaves "
        "their proportions to be set, and recycles as many of the lowest as make the count exact (ours). Cells scale "
        "with the side of a crop (27 patches), layers with the depth. Pixels are brought back to 0 .. 1 before their "
        "entropy is taken (the authors wrap normalised ones). Where no patch is a hub all are.",
    )
    reads = ("encoder", "attention")
    positions = "compact"
    positions_inside = "original"
    under_keep = {"counts": "keep"}

    vision: float = param(
        0.2651, "r_v: fraction of an image's tokens that stays before cells are added", low=0, high=1
    )
    decoder: tuple[float, ...] = param(
        (0.9833, 0.8773), "fractions of these that stay at the layers", low=0, high=1
    )
    layers: tuple[int, ...] = param((9, 18), "before these decoder layers image tokens leave, of 28", low=1)
    hubs: float = param(34.76, "t: patches are hubs that receive so many times the mean attention", low=0)
    cell: float = param(15.58, "a: side of a cell in patches, of 27 a side", low=1)
    entropy: float = param(0.0, "alpha: weight of the entropy of a patch's pixels", low=-1, high=1)
    counts: str = param(
        "cells", "how many stay: as many as cells are taken, or as --keep says", choices=("cells", "keep")
    )

    def stages(self, shape, knob):
        """round(r · n) at the projector and at the layers, beside cells; --keep takes powers of the fractions."""
        self.check_pairs("decoder", "layers")
        self.check_budget(knob)
        counts = [shape.tokens] * (1 + len(self.layers))
        if knob is not None:
            if not all((self.vision, *self.decoder)):
                raise UserError(
                    "vision or decoder of 0 cannot be scaled to a budget: give more, or leave --keep out"
                )
            kept = accumulate((fraction ** exponent(knob) for fraction in (self.vision, *self.decoder)), mul)
            counts = [max(1, round(share * shape.tokens)) for share in kept]
        return [Stage(PROJECTOR, counts[0]), *staircase(self.layers, counts[1:], 28, shape.depth)]

    def reduce(self, site, view, count, memory):
        """Score, prune and recycle; in the decoder prune by what was scored."""
        if site == PROJECTOR:
            worth = self.importance(view)
            memory.setdefault("worth", []).append((view.signal("rows"), view.position, worth))
            return self.recycled(view, worth, count)
        last = max(int(position.max()) for _, position, _ in memory["worth"])
        known = torch.zeros(len(view.prunable), 1 + last, device=view.hidden.device)
        for rows, position, worth in memory["worth"]:
            known[rows.unsqueeze(1), position] = worth
        worth = known.gather(1, view.position.clamp_max(last))
        if self.varies():
            alive = view.prunable.sum(1)
            count = (alive - (alive.double() * (1 - self.share(site, view.depth))).round().long()).cpu()
        index, valid = select.keep_prunable_top(worth, count, view.prunable)
        return Reduction.keep(index, view.hidden.shape[1], valid)

    def share(self, site, depth):
        """The fraction that stays before a layer of a decoder of `depth`: of all that fall on it."""
        places = [max(1, scale_layer(layer, 28, depth)) for layer in self.layers]
        return prod(
            fraction for place, fraction in zip(places, self.decoder, strict=True) if place == site.layer
        )

    def importance(self, view):
        """What hubs pay to every token, mean over heads and hubs, and the entropy of its pixels; 1 for newlines."""
        tower = view.encoder
        patches = slice(tower.prefix, None)
        others = tower.attention.rows(slice(0, tower.prefix)).sum(2)
        received = (tower.attention.column_sums() - others).mean(1)[:, patches]  # from patches alone
        hub = received > self.hubs * received.mean(1, keepdim=True)
        rows, real = select.places(hub)
        paid = tower.attention.rows(rows + tower.prefix).mean(1)[:, :, patches]
        paid = (paid * real.unsqueeze(2)).sum(1) / real.sum(1, keepdim=True).clamp_min(1)
        worth = torch.where(hub.any(1, keepdim=True), paid, received / received.shape[1])
        if self.entropy:
            worth = worth + self.entropy * score.patch_entropy(view.signal("patches")).softmax(1)
        return view.pool(worth).masked_fill(view.signal("newlines"), 1.0)

    def recycled(self, view, worth, count):
        """The lowest tokens become one per cell, the mean of its members by their scores."""
        cells, length = self.cells(view), worth.shape[1]
        if not self.varies():
            total = torch.as_tensor(count, device=worth.device).expand(len(worth))
            return fold.fold(worth, cells, fold.enough(worth, cells, total), total)
        number = round(length * (1 - self.vision)) + int(length / self.cell**2)
        low = ranks.rank(-worth) < number
        return fold.fold(worth, cells, low, torch.full_like(worth[:, 0], length, dtype=torch.int64))

    def cells(self, view):
        """The cell of every token, int64 [B, N], below N: of each crop, and of the mosaic that newlines tell."""
        newline, length = view.signal("newlines"), view.prunable.shape[1]
        crop = view.signal("thumbnail").sum(1, keepdim=True)
        place = torch.arange(length, device=crop.device).expand_as(newline)
        side = crop**0.5
        width = torch.full_like(crop, view.grid[1]) if view.grid is not None else side.round().long()
        mosaic = newline.any(1, keepdim=True) & (place >= crop)
        inside = torch.where(mosaic, place - crop, place % crop)
        width = torch.where(mosaic, newline.int().argmax(1, keepdim=True) - crop + 1, width)
        size = (self.cell * side / 27).clamp_min(1)
        row, column = ((part / size).floor().long() for part in (inside // width, inside % width))
        return place - inside + row * width + column
