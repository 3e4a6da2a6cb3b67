"""Where a list of scores has its few that stand out."""

from __future__ import annotations

import torch
from torch import Tensor


def local_outlier_factor(x: Tensor, neighbours: int, there: Tensor) -> Tensor:
    """Local outlier factors of numbers: about 1 among their like, larger where a number lies apart (Breunig et al.).

    As scikit-learn has it, its 1e-10 in the density included. Quadratic in N.

    Args:
        x: [B, N].
        neighbours: how many nearest others are looked at, cut to the number of others.
        there: bool [B, N]; others count nowhere.

    Returns:
        float64 [B, N], 0 where nothing is.
    """
    x = x.double()
    number = there.sum(1)
    near = (number - 1).clamp(1, neighbours)[:, None, None]
    distance = (x.unsqueeze(1) - x.unsqueeze(2)).abs()
    distance.diagonal(dim1=1, dim2=2).fill_(torch.inf)
    distance = distance.masked_fill(~there.unsqueeze(1), torch.inf)
    widest = max(1, min(neighbours, x.shape[1] - 1))
    found, place = distance.topk(widest, dim=2, largest=False)  # [B, N, k]
    counted = (torch.arange(widest, device=x.device) < near) & found.isfinite()
    found = found.masked_fill(~counted, 0)
    own = found.amax(2)  # distance to the last neighbour
    reach = torch.maximum(found, own.gather(1, place.flatten(1)).view(place.shape)) * counted
    size = counted.sum(2).clamp_min(1)
    density = 1 / (reach.sum(2) / size + 1e-10)
    theirs = density.gather(1, place.flatten(1)).view(place.shape) * counted
    return theirs.sum(2) / size / density * there


def outlier_share(x: Tensor, neighbours: int, there: Tensor, threshold: float = 1.5) -> Tensor:
    """The fraction of the numbers [B, N] whose local outlier factor exceeds `threshold`: float64 [B]."""
    apart = local_outlier_factor(x, neighbours, there) > threshold
    return (apart & there).sum(1) / there.sum(1).clamp_min(1).double()
