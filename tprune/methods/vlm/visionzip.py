"""VisionZip keeps the patches that the class token attends to, and folds the others into a few contextual tokens.

Both happen behind the vision tower, before the projector: dominant tokens carry most of what the tower has to say, and
tokens merged by the similarity of their keys carry the rest.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tprune.core import select
from tprune.core.budget import PROJECTOR, Stage
from tprune.core.reduction import Reduction, gather_tokens
from tprune.core.score import cosine_normalise
from tprune.methods.base import Paper, param
from tprune.methods.tokens import TokenMethod


@dataclass(frozen=True)
class VisionZip(TokenMethod):
    """Dominant tokens, the class token among them, then contextual ones, of every crop."""

    paper = Paper(
        title="VisionZip: Longer is Better but Not Necessary in Vision Language Models",
        venue="CVPR",
        year=2025,
        arxiv="2412.04467",
        code="dvlab-research/VisionZip",
        checked="code",
        notes="The class token is one of the tokens that are kept, where the projector can take it; without one, the "
        "mean attention that patches receive ranks them. The tokens of a crop stay together, contextual ones last; the "
        "authors put those of all crops of an image behind the last crop. The tuned projector is not part of this.",
    )
    reads = ("encoder", "projector")
    positions = "compact"
    native = ("ratio",)
    unit = "crop"
    projects = True

    ratio: float = param(0.1112, "fraction of every crop's tokens that stays: 64 of 576", low=0, high=1)
    contextual: float = param(
        0.15625, "fraction of these that is contextual, 10 of 64; the rest is dominant", low=0, high=1
    )

    def stages(self, shape, knob):
        """k = round(r · N), at least one."""
        keep = self.ratio if knob is None else knob
        return [Stage(PROJECTOR, max(1, round(keep * shape.tokens)))]

    def reduce(self, site, view, count, memory):
        """Step 1: the class token and the best patches; step 2: of the rest every n-th, with all most like it."""
        total, there = torch.as_tensor(count).expand(len(view.prunable)), view.prunable.sum(1).cpu()
        whole = bool((total == there).all())
        few = torch.zeros_like(total) if whole else (total * self.contextual).round().long()
        patches = total if whole else (total - few - view.prefix).clamp_min(0)
        best, real = select.keep_prunable_top(
            self.behind(view, view.encoder.saliency()), patches, view.prunable
        )
        dominant = select.mark(best, real, view.prunable.shape[1]) & view.prunable
        dominant[:, : view.prefix] = not whole
        if not bool(few.any()):
            index, valid = select.keep_where(dominant)
            return Reduction.keep(index, view.hidden.shape[1], valid)
        return self.merge(view, dominant, few.to(dominant.device))

    def behind(self, view, x):
        """What patches have [B, P, ...] for the tokens of the view, 0 for its prefix: [B, prefix + N, ...]."""
        pooled = view.pool(x)
        return torch.cat([pooled.new_zeros(len(pooled), view.prefix, *pooled.shape[2:]), pooled], dim=1)

    def merge(self, view, dominant, few):
        """Every n-th of the tokens behind the dominant ones is a target, `few` [B] in all; each other token joins the
        target whose keys are most like its own, and the mean of those that join is added to the target."""
        rest = view.prunable & ~dominant
        rank = rest.cumsum(1) - 1
        step = (rest.sum(1) // few.clamp_min(1)).clamp_min(1).unsqueeze(1)
        aim = rest & (rank % step == 0) & (rank // step < few.unsqueeze(1))
        (kept, here), (target, real) = placed(dominant), placed(aim)
        keys = view.encoder.attention.key.mean(1)[:, view.encoder.prefix :]
        unit = cosine_normalise(self.behind(view, keys))
        likeness = (unit @ gather_tokens(unit, target).transpose(1, 2)).masked_fill(
            ~real.unsqueeze(1), -torch.inf
        )
        into, joins = likeness.argmax(2), rest & ~aim & real.any(1, keepdim=True)
        members = torch.zeros(target.shape, device=unit.device).scatter_add(1, into, joins.float())
        return Reduction(
            torch.cat([kept, target], dim=1),
            rest.shape[1],
            source=torch.arange(rest.shape[1], device=unit.device).expand(rest.shape),
            into=torch.where(joins, kept.shape[1] + into, -1),
            weight=joins / members.gather(1, into).clamp_min(1),
            valid=torch.cat([here, real], dim=1),
        )


def placed(marked):
    """The places that are marked, ascending, [B, K] and which of them are real [B, K]."""
    index, valid = select.keep_where(marked)
    return index, torch.ones_like(index, dtype=torch.bool) if valid is None else valid
