"""How much every column of a weight is needed to stand for itself among the others."""

from __future__ import annotations

import torch
from torch import Tensor


def representativeness(columns: Tensor, width: float, tolerance: float) -> Tensor:
    """The weight of each column in the mixture of all columns that comes nearest to it under a Gaussian kernel: [N].

    Kernel convex masking (arXiv 2303.04185, algorithm 1): with K_ij = exp(-‖w_i - w_j‖² / width²) and C = 1/N to begin
    with, C <- C ∘ sqrt(K / (K C)) until the sum of C changes by less than `tolerance` of itself; the diagonal of C.
    Columns that others can stand for have little of it. Where no column is near, K C may underflow to 0; C stays 0.

    Args:
        columns: [N, D], one row for each column of the weight.
        width: of the kernel, positive.
        tolerance: positive.
    """
    kernel = torch.cdist(columns.float(), columns.float()).square_().div_(-(width**2)).exp_()
    mixture = torch.full_like(kernel, 1 / len(kernel))
    total = mixture.sum()
    least = torch.finfo(kernel.dtype).tiny
    while True:
        mixture.mul_((kernel / (kernel @ mixture).clamp_min_(least)).sqrt_())
        before, total = total, mixture.sum()
        # A weight that is not a number ends it, too.
        if not bool((total - before).abs() >= tolerance * before):
            return mixture.diagonal().clone()
