"""The value at a place of the ascending order, without sorting."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

LONG = 1 << 13  # entries from which on a sample pays


def kth_smallest(score: Tensor, place: int) -> Tensor:
    """The value at `place` (1 is the smallest) along the last axis: [..., N] -> [..., 1].

    On the CPU by numpy, which is ten times faster than torch.
    """
    if score.device.type != "cpu" or score.dtype not in (torch.float32, torch.float64):
        return score.kthvalue(place, dim=-1, keepdim=True).values
    values = score.detach().numpy()
    if values.shape[-1] < LONG:
        return torch.from_numpy(np.ascontiguousarray(_partitioned(values, place - 1)[..., None]))
    rows = values.reshape(-1, values.shape[-1])
    found = np.array([_selected(row, place - 1) for row in rows], values.dtype)
    return torch.from_numpy(found).view(*score.shape[:-1], 1)


def largest_of_each(score: Tensor, count: Tensor) -> Tensor:
    """Mark the largest of every row, as many as it says, of equals the lower index first: bool, shaped like `score`.

    Args:
        score: [..., N].
        count: int64, 0 to N, shaped like `score` but for its last axis of 1, or broadcastable to that.
    """
    on_cpu = score.device.type == "cpu" and score.dtype in (torch.float32, torch.float64)
    # Values alone are sorted, not their places, and by numpy: three times as fast as a stable argsort.
    ordered = torch.from_numpy(np.sort(score.detach().numpy(), axis=-1)) if on_cpu else score.sort(-1).values
    place = (score.shape[-1] - count).clamp_max(score.shape[-1] - 1)
    least = ordered.gather(-1, place.expand(*score.shape[:-1], 1))
    above, tied = score > least, score == least
    left = count - above.sum(-1, keepdim=True, dtype=torch.int32)
    if on_cpu and bool((tied.sum(-1, keepdim=True, dtype=torch.int32) == left).all()):
        return above | tied
    return above | tied & (tied.cumsum(-1, dtype=torch.int32) <= left)


def keep_largest(attention: Tensor, fraction: float) -> Tensor:
    """A map [B, H, N, N] without its smallest entries per head: int(N² · (1 - fraction)) - 1 of them become 0.

    What equals the entry at that place of the ascending order stays (GTP's code). Nothing is normalised again. Where
    no gradient is wanted the map itself may be changed.
    """
    flat = attention.flatten(2)
    place = min(int(flat.shape[2] * (1 - fraction)), flat.shape[2])
    if place == 0:
        return attention
    least = kth_smallest(flat, place).unsqueeze(3)
    if torch.is_grad_enabled() and attention.requires_grad:
        return attention * (attention >= least)
    return attention.mul_(attention >= least)


def _partitioned(values: np.ndarray, place: int) -> np.ndarray:
    return np.partition(values, place, axis=-1)[..., place]


def _selected(row: np.ndarray, place: int) -> np.ndarray:
    """The value at `place` (0 is the smallest) of `row` [N]: exact, three times as fast as a partition of a long row.

    A sample says between which values it lies, three standard deviations to either side; the rows' entries below are
    counted and those between partitioned (Floyd and Rivest's SELECT). Where the sample errs, the row itself is.
    """
    if len(row) < LONG:
        return _partitioned(row, place)
    sample = np.sort(row[::32])
    middle, slack = place * len(sample) // len(row), int(1.5 * len(sample) ** 0.5)
    least, most = sample[max(middle - slack, 0)], sample[min(middle + slack, len(sample) - 1)]
    lower = row < least
    between = row.take(np.flatnonzero((row <= most) & ~lower))
    left = place - int(np.count_nonzero(lower))
    return _partitioned(between, left) if 0 <= left < len(between) else _partitioned(row, place)
