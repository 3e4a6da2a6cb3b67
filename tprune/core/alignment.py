"""Whether two gradients of a matrix pull its weights the same way."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

LEAST = 1e-8
"""Of a gradient's norm; below it there is no direction."""


def agreement(one: Tensor, other: Tensor) -> Tensor:
    """The terms that the cosine of two gradients [R, C] is the sum of: float32 [R, C], 0 where either vanishes."""
    norms = one.norm(), other.norm()
    found = (one / (norms[0] + LEAST)) * (other / (norms[1] + LEAST))
    return torch.where(torch.minimum(*norms) > LEAST, found, 0.0)


def neighbourhood_mean(x: Tensor) -> Tensor:
    """The mean of every entry [R, C] and those around it, 3 x 3, zeros beyond the edges."""
    return avg_pool2d(x[None, None], 3, stride=1, padding=1)[0, 0]
