"""Tokens that later tokens drop for good: how far each still is there, softly while that is learned, and in the end.

u[n, j] = q_n · k_j / √r + b says whether token n leaves token j in its place; once dropped, always dropped.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 30
"""Halvings of [0, 1]: more than float32 can tell apart."""
ROWS = 256
"""Queries at once: their logits take memory."""


class _AlphaSigmoid(torch.autograd.Function):
    """p with (pᵃ - (1 - p)ᵃ) / a = x, where a = α - 1; p' = 1 / (p^(α - 2) + (1 - p)^(α - 2)), 0 at both ends."""

    @staticmethod
    def forward(ctx, x: Tensor, alpha: float) -> Tensor:
        ctx.alpha, power = alpha, max(alpha - 1, 1e-6)
        low, step = torch.zeros_like(x), 0.5
        for _ in range(ROUNDS):
            middle = low + step
            # As a goes to 0 this is log p - log(1 - p); differences of powers would be lost in rounding.
            found = ((power * middle.log()).expm1() - (power * (-middle).log1p()).expm1()) / power
            low = torch.where(found < x, middle, low)
            step /= 2
        found = torch.where(x * power >= 1, torch.ones_like(x), torch.where(x * power <= -1, 0.0, low))
        ctx.save_for_backward(found)
        return found

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        (p,) = ctx.saved_tensors
        slope = 1 / (p ** (ctx.alpha - 2) + (1 - p) ** (ctx.alpha - 2))
        return torch.where((p > 0) & (p < 1), gradient * slope, 0.0), None


def alpha_sigmoid(x: Tensor, alpha: float) -> Tensor:
    """The first of the two parts of α-entmax([x, 0]), in [0, 1], with a gradient; float32, the shape of `x`.

    The sigmoid at α = 1, steeper and exactly 0 or 1 beyond ±1 / (α - 1) above (arXiv 1905.05702).
    """
    return _AlphaSigmoid.apply(x, alpha)


def interaction(query: Tensor, key: Tensor, bias: Tensor) -> Tensor:
    """u [..., q, T], float32, of interaction queries [..., q, r] and keys [..., T, r]."""
    return query.float() @ key.float().mT * query.shape[-1] ** -0.5 + bias


def remaining(logits: Tensor, alpha: float) -> Tensor:
    """How far token j is there for token n, the product of α-sigmoid(u[m, j]) over j < m ≤ n: [..., N, N].

    1 for itself and those that are not there yet.
    """
    stays = alpha_sigmoid(logits, alpha)
    own = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).triu()
    return stays.masked_fill(own, 1).cumprod(-2)


def lasting(query: Tensor, key: Tensor, bias: Tensor) -> Tensor:
    """The least u of any token after it, per token: float32 [B, T]; infinite for the last, which nothing follows.

    With a step in place of the sigmoid a token is there as long as this is above 0.

    Args:
        query, key: [B, T, r].
        bias: scalar.
    """
    length = query.shape[1]
    least = torch.full(query.shape[:2], torch.inf, device=query.device)
    place = torch.arange(length, device=query.device)
    for first in range(0, length, ROWS):
        rows, before = place[first : first + ROWS], slice(0, min(first + ROWS, length) - 1)
        logits = interaction(query[:, rows], key[:, before], bias)
        logits = logits.masked_fill(place[before] >= rows.unsqueeze(1), torch.inf)
        least[:, before] = least[:, before].minimum(logits.amin(1))
    return least
