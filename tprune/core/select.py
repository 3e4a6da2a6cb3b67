"""Choosing under a count: exact, stable, lower index first among equals.

Scores are float, larger is better unless said otherwise; NaN is refused by the callers that make scores.
"""

from __future__ import annotations

import torch
from torch import Tensor


def top(score: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest scores along the last axis, ascending by index: [..., N] -> [..., count].

    Ties go to the lower index, on every device.
    """
    order = score.argsort(dim=-1, descending=True, stable=True)
    return order[..., :count].sort(dim=-1).values


def top_ranked(score: Tensor, count: int) -> Tensor:
    """As `top`, but in descending order of score."""
    return score.argsort(dim=-1, descending=True, stable=True)[..., :count]


def keep_prefix_and_top(score: Tensor, count: int, prefix: int) -> Tensor:
    """Indices [B, prefix + count]: the first `prefix` tokens, and the `count` best of the rest, ascending.

    Args:
        score: [B, N - prefix], the scores of the tokens behind the prefix.
        count: how many of them stay.
        prefix: how many leading tokens (CLS, distillation, registers) are never touched.
    """
    head = torch.arange(prefix, device=score.device).expand(*score.shape[:-1], prefix)
    return torch.cat([head, top(score, count) + prefix], dim=-1)


def keep_protected_and_top(score: Tensor, drop: Tensor, prunable: Tensor) -> tuple[Tensor, Tensor | None]:
    """Drop the `drop[b]` worst prunable tokens of every row; all others stay, in ascending order.

    Args:
        score: [B, N]; only the prunable entries are read.
        drop: int64 [B] on the CPU, how many prunable tokens leave each row.
        prunable: bool [B, N].

    Returns:
        index [B, K] and valid [B, K]; rows that keep fewer than K tokens are padded on the left with
        their first token, valid is then False there, and None where all rows keep K.
    """
    length = score.shape[1]
    score = torch.where(prunable, score.float(), torch.inf)
    order = score.argsort(dim=1, descending=True, stable=True)
    kept = length - drop
    widest = int(kept.max())
    rank = torch.arange(widest, device=score.device)
    if bool((kept == widest).all()):
        return order[:, :widest].sort(dim=1).values, None
    valid = rank < kept.to(score.device)[:, None]
    index = torch.where(valid, order[:, :widest], -1).sort(dim=1).values
    return index.clamp_min(0), index >= 0


def smallest_mask(score: Tensor, count: int) -> Tensor:
    """Mark exactly the `count` smallest along the last axis, lower index first: bool, shaped like `score`."""
    if count <= 0:
        return torch.zeros_like(score, dtype=torch.bool)
    order = score.argsort(dim=-1, stable=True)
    return torch.zeros_like(score, dtype=torch.bool).scatter_(-1, order[..., :count], True)


def inclusive_mask(score: Tensor, count: int) -> Tensor:
    """Mark everything up to and including the value at place `count` of the ascending order.

    The rule of the authors of Wanda's magnitude baseline and SparseGPT: `count + 1` entries, more with ties,
    over the whole tensor at once.
    """
    threshold = score.flatten().kthvalue(min(count, score.numel() - 1) + 1).values
    return score <= threshold


def nm_mask(score: Tensor, keep: int, group: int) -> Tensor:
    """Mark the `group - keep` smallest of every `group` consecutive entries along the last axis (n:m).

    Raises:
        ValueError: the last axis is not a multiple of `group`.
    """
    if score.shape[-1] % group:
        raise ValueError(f"{score.shape[-1]} inputs do not divide into groups of {group}")
    grouped = score.unflatten(-1, (-1, group))
    return smallest_mask(grouped, group - keep).flatten(-2)
