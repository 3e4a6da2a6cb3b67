"""ZOO-Prune keeps image tokens whose projection is sensitive, and unlike what is kept already.

How much the projector changes around a token is estimated without gradients, by central differences along random
directions; the product of sensitivity and distance decides, pick by pick.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from tprune.core import greedy, score, select
from tprune.core.budget import PROJECTOR, Stage
from tprune.core.reduction import Reduction
from tprune.methods.base import Paper, param
from tprune.methods.tokens import TokenMethod


@dataclass(frozen=True)
class ZOOPrune(TokenMethod):
    """Zeroth-order sensitivity of the projector times diversity, for every crop."""

    paper = Paper(
        title="Training-Free Token Pruning via Zeroth-Order Gradient Estimation in Vision-Language Models",
        venue="CVPR",
        year=2026,
        arxiv="2509.24837",
        code="AIM-SKKU/ZOO-Prune",
        checked="code",
        notes="Directions have unit length as in the authors' code, which the paper's formula does not say, and are "
        "drawn per image. Where all tokens are equally sensitive up to rounding (a linear projector) diversity alone "
        "decides; with the authors they must be equal to the last bit.",
    )
    reads = ("projector", "seeds")
    positions = "compact"
    native = ("ratio",)
    unit = "crop"

    ratio: float = param(0.1112, "fraction of every crop's tokens that stays: 64 of 576", low=0, high=1)
    directions: int = param(64, "m: random directions, 16 to 160 in the paper", low=1)
    step: float = param(0.01, "h: how far along them, 1e-4 to 1 in the paper", low=1e-6)

    def stages(self, shape, knob):
        """k = round(r · N), at least one."""
        keep = self.ratio if knob is None else knob
        return [Stage(PROJECTOR, max(1, round(keep * shape.tokens)))]

    def reduce(self, site, view, count, memory):
        """S scaled to 0 .. 1; then always the largest S · (1 - cosine to the nearest pick)."""
        sensitivity = self.sensitivity(view)
        spread = sensitivity.masked_fill(~view.prunable, -torch.inf).amax(1, keepdim=True)
        low = sensitivity.masked_fill(~view.prunable, torch.inf).amin(1, keepdim=True)
        flat = spread - low <= 1e-4 * spread
        weight = torch.where(flat, 1.0, ((sensitivity - low) / (spread - low).clamp_min(1e-12)).clamp(0, 1))
        widest = int(torch.as_tensor(count).max())
        order = greedy.weighted_max_min(view.hidden, weight, widest, None if view.whole else view.prunable)
        index, valid = select.keep_first(order, count, view.prunable)
        return Reduction.keep(index, view.hidden.shape[1], valid)

    def sensitivity(self, view):
        """S_i: mean over directions u of length 1 of ‖M(x_i + h u) - M(x_i - h u)‖ / 2h, float32 [B, N]."""
        features, project = view.signal("features").float(), view.signal("projector")
        directions = score.gaussian((self.directions, features.shape[2]), view.seeds).to(features.device)
        directions = functional.normalize(directions, dim=2)
        total = torch.zeros(features.shape[:2], device=features.device)
        for place in range(self.directions):
            away = self.step * directions[:, place, None]
            total += (project(features + away) - project(features - away)).norm(dim=2)
        return total / (2 * self.step * self.directions)
