"""Sets that are good together, built token by token: diverse, covering, or of large determinant.

Each function returns its picks in the order it made them, int64 [B, count]; ties go to the lower index, and a longer
choice begins with the shorter one. Where `allowed` (bool [B, N]) is given, nothing else is picked until all of it is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tprune.core.score import cosine_normalise


def _barred(shape: tuple[int, int], allowed: Tensor | None, like: Tensor) -> Tensor:
    """What is added to scores so that tokens that may not be picked come last, float32 [B, N]."""
    bar = torch.zeros(shape, device=like.device)
    return bar if allowed is None else bar.masked_fill_(~allowed, -torch.finfo(bar.dtype).max)


def weighted_max_min(features: Tensor, weight: Tensor, count: int, allowed: Tensor | None = None) -> Tensor:
    """First the largest weight, then always the largest weight · (1 - its largest cosine to what is picked).

    Args:
        features: [B, N, D].
        weight: [B, N], none below 0.
        count: how many picks, at most N.
        allowed: see above.
    """
    unit = cosine_normalise(features)
    batch, rows = len(unit), torch.arange(len(unit), device=unit.device)
    bar = _barred(weight.shape, allowed, unit)
    order = torch.empty(batch, count, dtype=torch.int64, device=unit.device)
    apart = torch.ones_like(bar)
    for place in range(count):
        pick = torch.addcmul(bar, weight, apart).argmax(dim=1)
        order[:, place] = pick
        bar[rows, pick] = -torch.inf
        away = 1 - (unit @ unit[rows, pick].unsqueeze(2)).squeeze(2)
        apart = away if place == 0 else torch.minimum(apart, away)
    return order


def max_sum(features: Tensor, first: Tensor, count: int, allowed: Tensor | None = None) -> Tensor:
    """From `first` (int64 [B]) on always the token whose cosines to all that is picked have the smallest sum.

    Args:
        features: [B, N, D].
        count: how many picks, at most N.
        allowed: see above.
    """
    unit = cosine_normalise(features)
    rows = torch.arange(len(unit), device=unit.device)
    bar = _barred(unit.shape[:2], allowed, unit)
    order = torch.empty(len(unit), count, dtype=torch.int64, device=unit.device)
    total, pick = torch.zeros_like(bar), first
    for place in range(count):
        order[:, place] = pick
        bar[rows, pick] = -torch.inf
        total = torch.baddbmm(total.unsqueeze(2), unit, unit[rows, pick].unsqueeze(2)).squeeze(2)
        pick = (bar - total).argmax(dim=1)
    return order


def coverage(gains: Tensor, count: int, allowed: Tensor | None = None) -> Tensor:
    """Picks that raise Σ_r max over picks of `gains`[r] the most: facility location (MMTok, eq. 5).

    Exact: only the rows that a pick changes are looked at again, which are fewer and fewer.

    Args:
        gains: [B, R, N], none below 0: how well token n covers row r.
        count: how many picks, at most N.
        allowed: see above.
    """
    gains = gains.float()
    batch, rows = len(gains), torch.arange(len(gains), device=gains.device)
    bar = _barred((batch, gains.shape[2]), allowed, gains).double()
    covered = gains.new_zeros(batch, gains.shape[1])
    worth = gains.sum(1, dtype=torch.float64)  # [B, N], what each token would add
    order = torch.empty(batch, count, dtype=torch.int64, device=gains.device)
    for place in range(count):
        pick = (worth + bar).argmax(dim=1)
        order[:, place] = pick
        bar[rows, pick] = -torch.inf
        better = gains[rows, :, pick]
        sample, row = (better > covered).nonzero(as_tuple=True)
        # In double precision differences of floats are exact, so that small gains stay right to the end.
        touched, before = gains[sample, row].double(), covered[sample, row].double().unsqueeze(1)
        after = better[sample, row].double().unsqueeze(1)
        lost = (touched.minimum(after) - before).clamp_min_(0)
        if batch == 1:
            worth[0] -= lost.sum(0)
        else:
            worth.index_add_(0, sample, lost, alpha=-1)
        covered = torch.maximum(covered, better)
    return order


def determinant(kernel: Tensor, count: int, allowed: Tensor | None = None) -> Tensor:
    """The greedy most probable subset of a determinantal point process: each pick raises det(L_S) the most.

    A row of the Cholesky factor per pick (Chen et al., NeurIPS 2018, algorithm 1). Where the rank of the kernel is
    used up the rest follows in the order of the index.

    Args:
        kernel: [B, N, N], symmetric and positive semi-definite.
        count: how many picks, at most N.
        allowed: see above.
    """
    kernel = kernel.float()
    batch, length = kernel.shape[:2]
    rows = torch.arange(batch, device=kernel.device)
    bar = _barred((batch, length), allowed, kernel)
    left = kernel.diagonal(dim1=1, dim2=2).clone()  # what each token would multiply the determinant by
    factor = kernel.new_zeros(batch, count, length)
    order = torch.empty(batch, count, dtype=torch.int64, device=kernel.device)
    for place in range(count):
        pick = (left.clamp_min(0) + bar).argmax(dim=1)
        order[:, place] = pick
        bar[rows, pick] = -torch.inf
        known = factor[:, :place]
        shared = (known[rows, :, pick].unsqueeze(1) @ known).squeeze(1)
        root = left[rows, pick].clamp_min(1e-12).sqrt().unsqueeze(1)
        row = (kernel[rows, pick] - shared) / root
        row = row.masked_fill(left[rows, pick].unsqueeze(1) <= 1e-10, 0.0)
        factor[:, place] = row
        left = left - row.square()
    return order


def remaining_variance(kernel: Tensor, count: int, allowed: Tensor | None = None) -> Tensor:
    """As `determinant`, but each pick takes from the others what it shares with them as if it were the only one.

    What several picks share is taken as often as they are (the code of Script, TMLR 2025).
    """
    kernel = kernel.float()
    batch, length = kernel.shape[:2]
    rows = torch.arange(batch, device=kernel.device)
    bar = _barred((batch, length), allowed, kernel)
    left = kernel.diagonal(dim1=1, dim2=2).clone()
    order = torch.empty(batch, count, dtype=torch.int64, device=kernel.device)
    for place in range(count):
        pick = (left + bar).argmax(dim=1)
        order[:, place] = pick
        worth = left[rows, pick].unsqueeze(1)
        bar[rows, pick] = -torch.inf
        shared = kernel[rows, pick] / (worth.clamp_min(0).sqrt() + 1e-6)
        left = torch.where(worth > 0, left - shared.square(), left)
    return order
