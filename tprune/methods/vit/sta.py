"""STA drops the tokens of a video that were seen before and mean little, frame group by frame group.

A token's redundancy is the similarity it accumulates from the group before it, handed on along time, and what its
activation says of its importance is taken off. Three stages, each on half as many groups of twice the frames.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from tprune.core import score, select
from tprune.core.budget import Site, Stage
from tprune.core.reduction import Reduction, gather_tokens
from tprune.errors import UserError
from tprune.methods.base import Paper, param
from tprune.methods.tokens import TokenMethod


@dataclass(frozen=True)
class STA(TokenMethod):
    """Semantic-aware temporal accumulation, between blocks, from the keys of the block before."""

    paper = Paper(
        title="Prune Spatio-temporal Tokens by Semantic-aware Temporal Accumulation",
        venue="ICCV",
        year=2023,
        arxiv="2308.04549",
        code="Mark12Ding/STA",
        checked="code",
        notes="The authors fix 8, 4 and 2 groups (16 frames, two per token); here the model says how many its tokens "
        "hold, or `frames` does. A single group, an image, only loses the tokens most similar to another of it. --keep "
        "spreads a fractional r over the stages.",
    )
    native = ("r",)

    r: int = param(64, "tokens dropped per group and stage, at 196 tokens per frame", low=0)
    frames: int | None = param(
        None, "frames that the tokens hold, one after the other; none: the model's (VideoMAE: 8 pairs)", low=1
    )

    def check(self, shape):
        """The frames divide the tokens."""
        super().check(shape)
        if shape.tokens % self.groups(shape.video):
            raise UserError(
                f"--set frames={self.frames}: {shape.tokens} tokens do not divide into as many frames; "
                "give the number of frames the model was built for"
            )

    def groups(self, video: tuple[int, int, int] | None) -> int:
        """How many groups the tokens are in at first, one per frame; `video` as `Shape` has it."""
        return self.frames or (1 if video is None else video[0])

    def places(self, depth: int, frames: int) -> list[tuple[int, int]]:
        """(block, groups) of the stages: after the first block, a third and two thirds of the depth."""
        blocks = [block for block in dict.fromkeys((0, depth // 3, 2 * depth // 3)) if block + 1 < depth]
        groups = [frames]
        for _ in blocks[1:]:
            groups.append(groups[-1] // 2 if groups[-1] % 2 == 0 else groups[-1])
        return list(zip(blocks, groups, strict=True))

    def stages(self, shape, knob):
        """Every stage drops r tokens of every group, of which there are ever fewer."""
        frames = self.groups(shape.video)
        places, alive, stages = self.places(shape.depth, frames), shape.tokens, []
        each = self.r * shape.tokens / frames / 196
        if knob is not None:
            each = (1 - knob) * shape.tokens / frames
        # What rounding leaves over is due in the next stage.
        due = [int(sum_ + 0.5) for sum_ in accumulate([each] * len(places), initial=0.0)]
        for (block, groups), (before, after) in zip(places, pairwise(due), strict=True):
            alive -= groups * min(after - before, alive // groups - 1)
            stages.append(Stage(Site(block + 1), alive))
        return stages

    def reduce(self, site, view, count, memory):
        """One stage; the second runs through time backwards."""
        batch, length = view.hidden.shape[:2]
        prefix, alive = view.prefix, length - view.prefix
        if count >= alive:
            return Reduction.identity(batch, length, view.hidden.device)
        stage, (_, groups) = next(
            (place, found)
            for place, found in enumerate(self.places(view.depth, self.groups(view.video)))
            if found[0] + 1 == site.layer
        )
        metric = score.cosine_normalise(view.attention.key.mean(1)[:, prefix:]).unflatten(1, (groups, -1))
        meaning = score.min_max(view.hidden[:, prefix:].float().abs().sum(-1).unflatten(1, (groups, -1)))
        kept = accumulate_over_time(metric, meaning, count // groups, backwards=stage == 1)
        first = torch.arange(groups, device=kept.device).unsqueeze(1) * (alive // groups)
        return Reduction.keep(select.with_prefix((kept + first + prefix).flatten(1), prefix), length)


def accumulate_over_time(metric: Tensor, meaning: Tensor, count: int, backwards: bool) -> Tensor:
    """The tokens that every group keeps (section 3.2): int64 [B, T, count], the least redundant first.

    The first group keeps its odd tokens, then the even ones least similar to any odd one.

    Args:
        metric: [B, T, N, d], unit rows.
        meaning: [B, T, N], 0 to 1, how much each token means.
        count: how many each group keeps.
        backwards: begin with the last group.
    """
    groups = range(metric.shape[1])[::-1] if backwards else range(metric.shape[1])
    kept: list[Tensor] = []
    for group in groups:
        now = metric[:, group]
        if not kept:
            similar = (now[:, ::2] @ now[:, 1::2].transpose(1, 2)).amax(2)
            evens = 2 * similar.argsort(dim=1, stable=True)
            odds = torch.arange(1, now.shape[1], 2, device=now.device).expand(len(now), -1)
            kept.append(torch.cat([odds, evens], dim=1)[:, :count])
            before, share = now, torch.ones_like(now[..., 0])
            continue
        seen = (now @ before.transpose(1, 2)).softmax(dim=1) @ share.unsqueeze(2)  # [B, N, 1]
        redundancy = seen.squeeze(2) * (1 - meaning[:, group])
        chosen = redundancy.argsort(dim=1, stable=True)[:, :count]
        kept.append(chosen)
        share = seen.squeeze(2).gather(1, chosen)
        before, share = gather_tokens(now, chosen), share / share.sum(1, keepdim=True)
    return torch.stack(kept[::-1] if backwards else kept, dim=1)
