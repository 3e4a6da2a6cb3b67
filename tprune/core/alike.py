"""Dropping what resembles much else."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from tprune.core import cosine, select
from tprune.core.reduction import Reduction, gather_tokens
from tprune.core.score import cosine_normalise, redundancy


def redundancy_of_evens(
    metric: Tensor, real: Tensor, threshold: float, gamma: float
) -> tuple[Tensor, Tensor]:
    """How redundant the tokens at even places are beside those at odd places (SAINT).

    Args:
        metric: [B, N, d], unit rows.
        real: bool [B, N].
        threshold, gamma: see `redundancy`.

    Returns:
        The score [B, ceil(N / 2)], float32, -inf where the even token is not real; and how many odd ones are like it,
        int64, 0 there.
    """
    worth, alike = redundancy(
        metric[:, ::2] @ metric[:, 1::2].transpose(1, 2), real[:, 1::2], threshold, gamma
    )
    even = real[:, ::2]
    return worth.masked_fill(~even, -torch.inf), alike.masked_fill(~even, 0)


def drop_central(features: Tensor, rounds: Tensor, stays: Tensor) -> Tensor:
    """In every round the tokens most similar to all that are left, in sum, leave (SAINT inside a vision tower).

    Inherently sequential over the rounds; one matrix-vector product each. Of equals the lower index leaves.

    Args:
        features: [B, N, D], compared by cosine; a token counts itself.
        rounds: int64 [B, R], how many leave in each.
        stays: bool [B, N], what is there at first.

    Returns:
        bool [B, N], what is left.
    """
    similarity = cosine.among(features, eps=1e-12)
    rank = torch.arange(features.shape[1], device=features.device)
    for count in rounds.to(features.device).unbind(1):
        score = (similarity @ stays.to(similarity.dtype).unsqueeze(2)).squeeze(2)
        order = score.masked_fill(~stays, -torch.inf).argsort(dim=1, descending=True, stable=True)
        stays = stays & ~torch.zeros_like(stays).scatter(1, order, rank < count.unsqueeze(1))
    return stays


def suppress(
    features: Tensor, weight: Tensor, count: int, bound: float, step: float, allowed: Tensor
) -> Tensor:
    """Always the largest weight among tokens whose cosines to all picks are within a bound (GreedyPrune).

    Where none is, the row's bound rises by `step` until one is. With a bound of 1 this is the order of the weights.

    Args:
        features: [B, N, D].
        weight: [B, N].
        count: how many picks, at most N.
        bound, step: see above.
        allowed: bool [B, N]; nothing else is picked until all of it is.

    Returns:
        int64 [B, count], the picks in their order; ties go to the lower index.
    """
    unit = cosine_normalise(features)
    rows = torch.arange(len(unit), device=unit.device)
    order = torch.empty(len(unit), count, dtype=torch.int64, device=unit.device)
    closeness = torch.full(weight.shape, -2.0, device=unit.device)
    bar = torch.where(allowed, 0.0, 4.0)
    limit = torch.full((len(unit), 1), bound, device=unit.device)
    for place in range(count):
        near = closeness + bar
        nearest = near.amin(1, keepdim=True)
        # A little more than the steps that are needed, against rounding.
        raised = limit + step * ((nearest - limit) / step).ceil()
        limit = torch.where(nearest > limit, torch.maximum(raised, nearest), limit)
        pick = weight.masked_fill(near > limit, -torch.inf).argmax(dim=1)
        order[:, place] = pick
        bar[rows, pick] = torch.inf
        closeness = torch.maximum(closeness, (unit @ unit[rows, pick].unsqueeze(2)).squeeze(2))
    return order


def crowded(features: Tensor, there: Tensor, similar: float, fraction: float) -> Tensor:
    """Which tokens have enough that are like them (Token-level Correlation-guided Compression): bool [B, N].

    Args:
        features: [B, N, D].
        there: bool [B, N]; others count nowhere.
        similar: cosine from which two tokens are alike; a token is like itself.
        fraction: of the tokens that are there.
    """
    number = ((cosine.among(features, eps=1e-6) > similar) & there.unsqueeze(1)).sum(2)
    return there & (number >= fraction * there.sum(1, keepdim=True))


def join_nearest(features: Tensor, index: Tensor, valid: Tensor | None, there: Tensor) -> Reduction:
    """Every other token joins the kept one it resembles most; means weighted by cosine, none below 0.

    Args:
        features: [B, N, D], compared by cosine.
        index, valid: [B, K], what is kept, and which of it is real (None: all).
        there: bool [B, N], what may join or be joined.
    """
    unit = cosine_normalise(features)
    batch, length = there.shape
    likeness = unit @ gather_tokens(unit, index).transpose(1, 2)  # [B, N, K]
    target = there.gather(1, index) if valid is None else there.gather(1, index) & valid
    best, into = likeness.masked_fill(~target.unsqueeze(1), -torch.inf).max(2)
    kept = select.mark(index, valid, length)
    joins = there & ~kept & (best > 0)
    weight = best.clamp_min(0).masked_fill(~joins, 0)
    total = 1 + torch.zeros(index.shape, device=index.device).scatter_add(1, into, weight)
    source = torch.arange(length, device=index.device).expand(batch, -1)
    merged = Reduction.merge(
        index,
        length,
        source,
        into.masked_fill(~joins, -1),
        weight=weight / total.gather(1, into),
        own=total.reciprocal(),
    )
    return replace(merged, valid=valid)
