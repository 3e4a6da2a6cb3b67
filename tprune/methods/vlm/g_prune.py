"""G-Prune lets information flow between similar image tokens and keeps those where most of it gathers.

Tokens are the nodes of a graph whose edges are similarities above a threshold. Each begins with the norm of its
features; after a few steps along the edges, what a node holds, divided by its degree, says how well it represents
foreground or background alike.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tprune.core import graph, score, select
from tprune.core.budget import PROJECTOR, Stage
from tprune.core.reduction import Reduction
from tprune.methods.base import Paper, param
from tprune.methods.tokens import TokenMethod


@dataclass(frozen=True)
class GPrune(TokenMethod):
    """Graph-based pruning of the thumbnail and of the crops around it, each a graph of its own."""

    paper = Paper(
        title="What Kind of Visual Tokens Do We Need? Training-free Visual Token Pruning for Multi-modal Large "
        "Language Models from the Perspective of Graph",
        venue="AAAI",
        year=2025,
        arxiv="2501.02268",
        code="jytmelon/G-Prune",
        checked="code",
        notes="Newline tokens stay and count as kept; the authors keep theirs beside the ratio. A degree counts the "
        "edges, the authors' the probabilities that half precision does not round to zero. Images of one crop are "
        "one graph; the authors' code takes only cut ones.",
    )
    reads = ()
    native = ("ratio",)

    ratio: float = param(0.5, "fraction of the image tokens that stays", low=0, high=1)
    threshold: float = param(0.5, "cosine from which two tokens are joined", low=1e-6, high=1)
    temperature: float = param(0.03, "what cosines are divided by before the softmax", low=1e-4)
    steps: int = param(5, "n: how many steps information flows", low=1)

    def stages(self, shape, knob):
        """k = round(r · N), at least one."""
        keep = self.ratio if knob is None else knob
        return [Stage(PROJECTOR, max(1, round(keep * shape.tokens)))]

    def reduce(self, site, view, count, memory):
        """The same fraction of thumbnail and crops stays, and every newline token."""
        thumbnail = view.signal("thumbnail") & view.prunable
        newlines = view.signal("newlines") & view.prunable
        crops = view.prunable & ~thumbnail & ~newlines
        worth = self.worth(view, thumbnail, newlines)
        room = torch.as_tensor(count, device=worth.device) - newlines.sum(1)
        room = room.clamp_min(0)
        small = room * thumbnail.sum(1) // (thumbnail | crops).sum(1).clamp_min(1)
        stays = (
            newlines | select.best_of(worth, thumbnail, small) | select.best_of(worth, crops, room - small)
        )
        index, valid = select.keep_prunable_top(stays.float(), count, view.prunable)
        return Reduction.keep(index, view.hidden.shape[1], valid)

    def worth(self, view, thumbnail, newlines):
        """‖z‖ Pⁿ / degree, [B, N]: P walks within the thumbnail, or within the crops."""
        group = torch.where(newlines, 2, thumbnail.long()).masked_fill(~view.prunable, 3)
        walk, degree = graph.similarity_walk(view.hidden, self.threshold, self.temperature, group)
        return score.page_rank(walk, view.hidden.float().norm(dim=2), self.steps) / degree
