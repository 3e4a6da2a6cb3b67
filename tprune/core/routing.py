"""Experts in groups, of each of which a router takes one."""

from __future__ import annotations

import torch
from torch import Tensor


def groups_of(count: int, groups: int) -> Tensor:
    """Which of `count` experts each group has, bool [groups, count]: runs whose sizes differ by one at most."""
    return torch.arange(count) * groups // count == torch.arange(groups).unsqueeze(1)


def top_of_groups(logits: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """The expert of the largest logit in every group, the first among equals, and how the router's softmax has it.

    Args:
        logits: [..., E].
        groups: bool [G, E], as `groups_of` gives it; every expert is in one.

    Returns:
        Both [..., E] in the dtype of `logits`: 1 for an expert that is taken, 0 for others; the softmax in each group.
    """
    apart = logits.unsqueeze(-2).masked_fill(~groups, -torch.inf)
    taken = torch.zeros_like(apart).scatter(-1, apart.argmax(-1, keepdim=True), 1)
    return taken.sum(-2), apart.softmax(-1).sum(-2)
