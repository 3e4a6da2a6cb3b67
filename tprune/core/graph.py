"""Graphs over patches: who is next to whom, who is like whom."""

from __future__ import annotations

import torch
from torch import Tensor

from tprune.core import cosine
from tprune.core.mask import smallest_mask


def neighbours_on_grid(rows: int, columns: int, device: torch.device | str = "cpu") -> Tensor:
    """Which patches of a grid touch, corners included, none itself: bool [rows · columns, rows · columns]."""
    place = torch.arange(rows * columns, device=device)
    row, column = place // columns, place % columns
    near = (row - row.unsqueeze(1)).abs() <= 1
    return near & ((column - column.unsqueeze(1)).abs() <= 1) & (place != place.unsqueeze(1))


def similar_neighbours(features: Tensor, count: int) -> Tensor:
    """Which tokens [B, N, D] are among the `count` most similar to each, by cosine: bool [B, N, N].

    Row i marks the neighbours of token i, never itself; the relation need not be mutual. Of equals the lower index.
    """
    similarity = cosine.among(features, eps=1e-6)
    similarity.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
    return smallest_mask(similarity.neg_(), min(count, features.shape[1] - 1))


def normalised(graph: Tensor) -> Tensor:
    """D^(-1/2) G D^(-1/2) with the row degrees D, of a graph bool [B, N, N]; zeros where there are no edges."""
    graph = graph.float()
    root = graph.sum(2).clamp_min(1).rsqrt()
    return root.unsqueeze(2) * graph * root.unsqueeze(1)


def similarity_walk(
    features: Tensor, threshold: float, temperature: float, group: Tensor
) -> tuple[Tensor, Tensor]:
    """A random walk between similar tokens of a group (G-Prune, section 3.2).

    A step goes to a token of the same group of cosine `threshold` or more, itself included, with a softmax of cosine
    over `temperature`; a token that is like none stays.

    Args:
        features: [B, N, D].
        threshold: above 0.
        temperature: what cosines are divided by.
        group: int64 [B, N].

    Returns:
        float32 [B, N, N], rows sum to 1; and how many tokens each can go to, int64 [B, N].
    """
    similarity = cosine.among(features, eps=1e-12)
    apart = (similarity < threshold) | (group.unsqueeze(1) != group.unsqueeze(2))
    # Rounding, or a token of zeros, must not leave a row empty.
    apart.diagonal(dim1=1, dim2=2).fill_(False)
    return similarity.div_(temperature).masked_fill_(apart, -torch.inf).softmax(2), (~apart).sum(2)
