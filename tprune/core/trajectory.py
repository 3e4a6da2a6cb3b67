"""How far what a network computes on its way is from what it computed before something left it (OPTIN)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize


def relations_changed(dense: Tensor, other: Tensor) -> Tensor:
    """How much the likeness of tokens to each other changed: the summed squared differences of all their cosines, [].

    Args:
        dense, other: features of the same tokens [T, D].
    """
    dense, other = normalize(dense, dim=-1), normalize(other, dim=-1)
    return (dense @ dense.T - other @ other.T).square().sum()


def balanced(first: Tensor, second: Tensor, ratio: float) -> Tensor:
    """Sums of two errors of several candidates, the second brought near the size of the first: float64 [U].

    Where the first is larger, the second is multiplied by the power of ten, cut to a whole one, that makes the first
    `ratio` times as large; elsewhere, and where the second is zero, by the mean of the factors of the candidates
    before, or by 1 if there are none.

    Args:
        first, second: [U], not negative.
        ratio: above 0.
    """
    first, second = first.double(), second.double()
    own = (first > second) & (second > 0)
    power = (first / second / ratio).log10().trunc()
    factor = torch.where(own, 10.0**power, 0.0)
    before = (factor.cumsum(0) - factor) / (own.cumsum(0) - own.long()).clamp_min(1)
    before = torch.where(own.cumsum(0) == 0, 1.0, before)
    return first + torch.where(own, factor, before) * second
