"""Cosines of many vectors with many: all of them against others, or against each other."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tprune.core.score import cosine_normalise


def between(rows: Tensor, columns: Tensor, eps: float = 1e-8) -> Tensor:
    """The cosine of each of `rows` [B, R, D] with each of `columns` [B, N, D]: float32 [B, R, N].

    The products are divided by the norms, not the vectors, which are larger; norms below `eps` count as it.
    """
    rows, columns = rows.float(), columns.float()
    high, wide = (x.norm(dim=-1).clamp_min(eps) for x in (rows, columns))
    return _products(rows, columns).div_(high.unsqueeze(2)).div_(wide.unsqueeze(1))


def among(x: Tensor, eps: float = 1e-8) -> Tensor:
    """The cosine of each of `x` [B, N, D] with each: float32 [B, N, N]."""
    unit = cosine_normalise(x, eps)
    return _products(unit, unit)


def _products(rows: Tensor, columns: Tensor) -> Tensor:
    """Each of `rows` [B, R, D] times each of `columns` [B, N, D]: [B, R, N].

    On a CPU by numpy's BLAS, which computes half of a matrix times its own transpose.
    """
    if rows.device.type == "cpu" and not (
        torch.is_grad_enabled() and (rows.requires_grad or columns.requires_grad)
    ):
        return torch.from_numpy(np.matmul(rows.detach().numpy(), columns.detach().numpy().swapaxes(1, 2)))
    return rows @ columns.transpose(1, 2)
