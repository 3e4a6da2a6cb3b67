"""Which weights go: masks of the smallest scores, per row, per layer or n:m; True where a weight is removed."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tprune.core.select import floor_count
from tprune.core.threshold import kth_smallest


def count_true(mask: Tensor) -> int:
    """How many entries of a bool tensor are True; on the CPU by numpy, which counts forty times faster than torch."""
    if mask.device.type == "cpu":
        return int(np.count_nonzero(mask.numpy()))
    return int(mask.count_nonzero())


def smallest_mask(score: Tensor, count: int) -> Tensor:
    """Mark exactly the `count` smallest along the last axis, lower index first: bool, shaped like `score`."""
    if count <= 0:
        return torch.zeros_like(score, dtype=torch.bool)
    if count >= score.shape[-1]:
        return torch.ones_like(score, dtype=torch.bool)
    threshold = kth_smallest(score, count)
    mask = score <= threshold
    if count_true(mask) == count * (mask.numel() // mask.shape[-1]):
        return mask
    # Rows where several are equal to the threshold: of these the lower indices go.
    flat, rows = mask.reshape(-1, mask.shape[-1]), score.reshape(-1, mask.shape[-1])
    surplus = flat.sum(-1, dtype=torch.int32) - count
    many = surplus.nonzero().squeeze(1)
    tied = rows[many] == threshold.reshape(-1, 1)[many]
    last = tied.sum(-1, dtype=torch.int32) - surplus[many]
    flat[many] &= ~tied | (tied.cumsum(-1, dtype=torch.int32) <= last.unsqueeze(1))
    return flat.view_as(mask)


def layer_mask(score: Tensor, count: int) -> Tensor:
    """Mark exactly the `count` smallest of the whole matrix, lower index (row by row) first: bool [R, C]."""
    return smallest_mask(score.flatten(), count).view_as(score)


def inclusive_mask(score: Tensor, count: int) -> Tensor:
    """Mark everything up to and including the value at place `count` of the ascending order.

    The rule of the authors of Wanda's magnitude baseline and SparseGPT: `count + 1` entries, more with ties,
    over the whole tensor at once.
    """
    return score <= kth_smallest(score.flatten(), min(count, score.numel() - 1) + 1)


def cumulative_mask(score: Tensor, fraction: float, tolerance: float = 1e-3) -> Tensor:
    """Mark in every row [R, C] the smallest scores that together make up a share α of the row's sum.

    α is bisected in [0, 0.8] from 0.4 until the whole matrix loses `fraction` within `tolerance`, or the bracket
    is narrower than `tolerance`: rows lose different numbers (the variant in Wanda's appendix). Rows whose
    smallest score exceeds the share lose nothing.
    """
    ordered = score.sort(dim=-1).values
    sums = ordered.cumsum(-1)
    low, high, share = 0.0, 0.8, 0.4
    while True:
        count = (sums <= sums[:, -1:] * share).sum(-1, keepdim=True)
        threshold = ordered.gather(-1, (count - 1).clamp_min(0))
        mask = (score <= threshold) & (count > 0)
        found = mask.double().mean().item()
        if abs(found - fraction) <= tolerance or high - low < tolerance:
            return mask
        low, high, share = (
            (low, share, (share + low) / 2) if found > fraction else (share, high, (share + high) / 2)
        )


def nm_mask(score: Tensor, keep: int, group: int) -> Tensor:
    """Mark the `group - keep` smallest of every `group` consecutive entries along the last axis (n:m).

    Entries are ranked by comparing all pairs of a group, which for small groups is much faster than sorting.

    Raises:
        ValueError: the last axis is not a multiple of `group`.
    """
    if score.shape[-1] % group:
        raise ValueError(f"{score.shape[-1]} inputs do not divide into groups of {group}")
    grouped = score.unflatten(-1, (-1, group)).movedim(-1, 0).contiguous()
    rank = torch.zeros_like(grouped, dtype=torch.int16)
    for later in range(1, group):
        before = grouped[:later] <= grouped[later]
        rank[later] += before.sum(0, dtype=torch.int16)
        rank[:later] += ~before
    return (rank < group - keep).movedim(0, -1).flatten(-2)


def weight_mask(
    score: Tensor, fraction: float, pattern: tuple[int, int] | None = None, group: str = "row"
) -> Tensor:
    """Mark the weights [R, C] that go: n:m along the inputs where there is a pattern, else the fraction.

    Args:
        score: float32 [R, C].
        fraction: floor(C · fraction) go in every row, or floor(R · C · fraction) in the whole layer.
        pattern: (n, m), n kept of m.
        group: what is compared, "row" or "layer".
    """
    if pattern is not None:
        return nm_mask(score, *pattern)
    if group == "layer":
        return layer_mask(score, floor_count(score.numel(), fraction))
    return smallest_mask(score, floor_count(score.shape[-1], fraction))
