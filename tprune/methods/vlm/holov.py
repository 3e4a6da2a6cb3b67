"""HoloV spreads the budget over bands of the image, so that highlights do not take all of it.

A band gets tokens for the attention that its patches receive from the class token and for how much they differ among
themselves; inside a band attention alone decides.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tprune.core import ranks, select
from tprune.core.budget import PROJECTOR, Stage
from tprune.core.reduction import Reduction, gather_tokens
from tprune.methods.base import Paper, param
from tprune.methods.tokens import TokenMethod


@dataclass(frozen=True)
class HoloV(TokenMethod):
    """Quotas for contiguous bands of all tokens of an image."""

    paper = Paper(
        title="Don't Just Chase “Highlighted Tokens” in MLLMs: Revisiting Visual Holistic Context Retention",
        venue="NeurIPS",
        year=2025,
        arxiv="2510.02912",
        code="obananas/HoloV",
        checked="code",
        notes="Tokens stay in their order; the authors leave each band in the order of attention "
        "(--set order=attention). Where a quota exceeds its band, the best tokens of the others fill the budget up; "
        "the authors' code appends zero vectors. Newline tokens leave first, as in its layout. Its code for Qwen2.5-VL "
        "compares scores in the order of windows with tokens in the order of the image; here both are the image's.",
    )
    reads = ("encoder",)
    positions = "compact"
    native = ("ratio",)

    ratio: float = param(0.1112, "fraction of the image tokens that stays: 64 of 576", low=0, high=1)
    beta: float = param(0.09, "weight of diversity beside attention", low=0)
    bands: int | None = param(None, "P, how many bands; none: int(1024 / 576 · N / k)", low=1)
    order: str = param("position", "order of what stays", choices=("position", "attention"))

    def stages(self, shape, knob):
        """k = round(r · N), at least one."""
        keep = self.ratio if knob is None else knob
        return [Stage(PROJECTOR, max(1, round(keep * shape.tokens)))]

    def reduce(self, site, view, count, memory):
        """Score bands, give them quotas, keep the most attended tokens of each."""
        score, there = self.attention(view)
        total = torch.as_tensor(count, device=score.device).expand(len(score))
        place, real = bands(there, self.number(there, total))  # [B, P, c], each band's tokens
        inside = score.gather(1, place.flatten(1)).view(place.shape)
        features = gather_tokens(view.hidden, place.flatten(1)).unflatten(1, place.shape[1:])
        quota = ranks.apportion(self.worth(inside, features, real), total)
        rank = ranks.rank(inside.masked_fill(~real, -1))
        within = real & (rank < quota.unsqueeze(2))
        first = torch.zeros_like(score).scatter_reduce(1, place.flatten(1), within.flatten(1).float(), "amax")
        # What quotas leave over goes by attention, to newlines last.
        index, valid = select.keep_prunable_top(score + 2 * first + there, count, view.prunable)
        if self.order == "attention":
            index = self.by_attention(index, place, rank, real, score.shape[1])
        return Reduction.keep(index, view.hidden.shape[1], valid)

    def attention(self, view):
        """What each token receives from the class token, or from all, [B, N]; and which tokens are patches, bool."""
        row = view.encoder.saliency()
        return view.pool(row), (view.pool(torch.ones_like(row)) > 0) & view.prunable

    def number(self, there, total):
        """P of each row, int64 [B]."""
        if self.bands is not None:
            return torch.full_like(total, self.bands)
        return (1024 / 576 * there.sum(1) / total).long().clamp_min(1)

    def worth(self, attention, features, real):
        """A band's mean of 1000 a + beta v', v' the variance of a token's cosines scaled to the attention: [B, P]."""
        size = real.sum(2)
        others = (size - 1).clamp_min(1)[:, :, None]
        features = features.float()
        likeness = features @ features.transpose(2, 3)
        # What is there of long vectors is read once: their lengths stand on the diagonal.
        scale = real / (likeness.diagonal(dim1=2, dim2=3).clamp_min(0).sqrt() + 1e-6)
        likeness = likeness * scale.unsqueeze(2) * scale.unsqueeze(3)
        likeness.diagonal(dim1=2, dim2=3).zero_()
        mean = likeness.sum(3) / others
        # The squares of all c entries of a row, the diagonal's included, which is 0.
        variance = (
            likeness.square().sum(3) - 2 * mean * likeness.sum(3) + size.unsqueeze(2) * mean.square()
        ) / others
        scaled, variance = 1000 * attention * real, variance * real
        average = size.clamp_min(1)
        lift = (scaled.sum(2) / average) / (variance.sum(2) / average + 1e-6)
        found = (scaled + self.beta * variance * lift.unsqueeze(2)).sum(2) / average
        return torch.where(size > 1, found, (attention * real).sum(2))

    def by_attention(self, index, place, rank, real, length):
        """What stays in the order of the authors' code: band by band, most attended first."""
        width, last = place.shape[2], place.shape[1] * place.shape[2]
        key = torch.arange(place.shape[1], device=place.device)[:, None] * width + rank
        keys = torch.full((len(index), length), last, device=index.device)
        keys = keys.scatter_reduce(1, place.flatten(1), torch.where(real, key, last).flatten(1), "amin")
        return index.gather(1, keys.gather(1, index).argsort(dim=1, stable=True))


def bands(there, number):
    """The marked tokens (bool [B, N]) in `number` [B] contiguous bands, the first of which get one more token each.

    Returns:
        the places of their tokens, int64 [B, P, c], and which of them are real.
    """
    tokens = there.sum(1, keepdim=True)
    most, number = int(number.max()), number.unsqueeze(1)
    band = torch.arange(most, device=there.device)
    size = (tokens // number + (band < tokens % number)) * (band < number)
    start = size.cumsum(1) - size
    step = torch.arange(int(size.max()), device=there.device)
    real = step < size.unsqueeze(2)
    order = there.to(torch.int8).argsort(dim=1, descending=True, stable=True)
    rank = torch.where(real, start.unsqueeze(2) + step, 0)
    return order.gather(1, rank.flatten(1)).view(rank.shape), real
