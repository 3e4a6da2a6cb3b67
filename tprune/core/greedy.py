"""Sets that are good together, built token by token: diverse, covering, or of large determinant.

Each function returns its picks in the order it made them, int64 [B, count]; ties go to the lower index, and a longer
choice begins with the shorter one. Where `allowed` (bool [B, N]) is given, nothing else is picked until all of it is.
"""

from __future__ import annotations

import numpy as np
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

    Args:
        gains: [B, R, N], none below 0: how well token n covers row r.
        count: how many picks, at most N.
        allowed: see above.
    """
    gains = gains.detach().float()
    bar = _barred((len(gains), gains.shape[2]), allowed, gains)
    if gains.device.type == "cpu":
        order = [_cover(*one, count) for one in zip(gains.numpy(), bar.numpy(), strict=True)]
        return torch.tensor(order, dtype=torch.int64).view(len(gains), count)
    return _cover_together(gains, bar, count)


def _cover(gains: np.ndarray, bar: np.ndarray, count: int) -> list[int]:
    """The picks for one sample, gains [R, N] and bar [N].

    A pick changes what others would add in the rows alone that it covers better than all before, ever fewer of them.
    """
    covered, order, room = np.zeros((len(gains), 1), np.float32), [], np.empty_like(gains)
    adds = gains.sum(0, dtype=np.float64)  # as losses add up over the picks
    nothing = 1e-5 * adds  # what rounding leaves of a token whose rows are all covered
    while len(order) < count:
        pick = int((adds + bar).argmax())
        order.append(pick)
        bar[pick] = -np.inf
        level = gains[:, pick : pick + 1]
        raised = np.flatnonzero(level > covered)
        before, now = covered[raised], level[raised]
        lost = np.take(gains, raised, axis=0, out=room[: len(raised)], mode="clip")
        # Two passes, each of which numpy does eight at a time: clip takes three times as long.
        np.minimum(lost, now, out=lost)
        np.maximum(lost, before, out=lost)
        lost -= before
        adds -= lost.sum(0)  # row by row, so that equal tokens stay equal
        adds[adds < nothing] = 0
        covered[raised] = now
    return order


def _cover_together(gains: Tensor, bar: Tensor, count: int) -> Tensor:
    """The same for all samples, gains [B, R, N] and bar [B, N], where a look at everything costs a kernel's start."""
    rows = torch.arange(len(gains), device=gains.device)
    covered = torch.zeros_like(gains[..., :1])
    order = torch.empty(len(gains), count, dtype=torch.int64, device=gains.device)
    for place in range(count):
        pick = ((gains - covered).clamp_min_(0).sum(1) + bar).argmax(dim=1)
        order[:, place] = pick
        bar[rows, pick] = -torch.inf
        covered = torch.maximum(covered, gains[rows, :, pick].unsqueeze(2))
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
