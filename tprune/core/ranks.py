"""Choosing by ranks and by the curve that sorted scores make."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def rank(score: Tensor) -> Tensor:
    """Every entry's place in the descending order of score, lower index first: [..., N] -> int64 [..., N]."""
    order = score.argsort(dim=-1, descending=True, stable=True)
    place = torch.arange(score.shape[-1], device=score.device).expand_as(order)
    return torch.empty_like(order).scatter(-1, order, place)


def ranking_loss(score: Tensor, relevance: Tensor) -> Tensor:
    """How far an order by `score` is from that by `relevance`, both [B, N]: float [B], 0 where all gaps are wide.

    Σ (r_i - r_j) · log2(1 + exp(s_j - s_i)) over the pairs with r_i > r_j (the second ARP loss of LambdaLoss,
    Wang et al., CIKM 2018).
    """
    gap = (relevance.unsqueeze(2) - relevance.unsqueeze(1)).clamp_min(0)
    lead = score.unsqueeze(2) - score.unsqueeze(1)
    return (gap * torch.nn.functional.softplus(-lead)).sum((1, 2)) / math.log(2)


def apportion(weight: Tensor, total: Tensor) -> Tensor:
    """Whole numbers in proportion to `weight`: floors, and one more each for the largest until there are enough.

    Args:
        weight: [B, P], not negative.
        total: int64 [B], what is shared out.

    Returns:
        int64 [B, P]; rows sum to `total` but for rounding (weights are divided by their sum and 1e-6).
    """
    weight = weight / (weight.sum(1, keepdim=True) + 1e-6)
    shares = (weight * total.unsqueeze(1)).floor().long()
    return shares + (rank(weight) < (total - shares.sum(1)).unsqueeze(1))


def prefer_early(score: Tensor, allowed: Tensor, candidates: Tensor, early: Tensor, count: Tensor) -> Tensor:
    """Of the best, the early ones first, then the others, until there are enough: bool [B, N] (BTP, rebalancing).

    Attention favours late tokens; taking more candidates than are needed and the early ones first makes up for it.

    Args:
        score: [B, N].
        allowed: bool [B, N], what may be chosen; early is counted among these.
        candidates: int64 [B], how many of the best are looked at.
        early: int64 [B], how many of the allowed places are early.
        count: int64 [B], how many are chosen.
    """
    best = rank(score.masked_fill(~allowed, -torch.inf))
    late = allowed.cumsum(1) > early.unsqueeze(1)
    turn = torch.where(
        allowed & (best < candidates.unsqueeze(1)), best + score.shape[1] * late, 2 * score.shape[1]
    )
    return (rank(-turn) < count.unsqueeze(1)) & (turn < 2 * score.shape[1])


def beyond_knee(score: Tensor, allowed: Tensor) -> Tensor:
    """Which scores are above that at the knee of their sorted curve: bool [B, N]; where none is, the largest.

    The knee is the point farthest from the chord between the largest and the smallest, places and scores unscaled.

    Args:
        score: [B, N].
        allowed: bool [B, N], the scores that form the curve.
    """
    curve = score.double().masked_fill(~allowed, -torch.inf).sort(dim=1, descending=True).values
    place = torch.arange(score.shape[1], device=score.device)
    last = (allowed.sum(1, keepdim=True) - 1).clamp_min(0)
    first, end = curve[:, :1], curve.gather(1, last)
    away = (place * (end - first) - last * (curve - first)).abs().masked_fill(place > last, -1)
    value = curve.gather(1, away.nan_to_num(-1).argmax(1, keepdim=True))
    above = allowed & (score.double() > value)
    return torch.where(above.any(1, keepdim=True), above, allowed & (score.double() == first))
