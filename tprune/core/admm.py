"""Sparse least squares by the alternating direction method of multipliers, and a refit on the support it finds.

For a layer with weights W [R, C] and inputs of Gram matrix H, both may be scaled so that H has a unit diagonal; then
the problem is to find B with few entries that are not zero and a small tr((W - B) H (W - B)ᵀ) (ALPS, arXiv 2406.07831).
Give float64: hundreds of iterations make rounding in float32 large enough to decide what goes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

EVERY = 3
"""Iterations between two looks at how the support changes."""
SETTLED = (30, 3e-4)
"""From this iteration on, so small a change of the support, as a fraction of what is kept, is the end."""


def unit_diagonal(gram: Tensor, damp: float) -> tuple[Tensor, Tensor]:
    """H = E⁻¹ (G + damp · mean(diag G) · I) E⁻¹ of unit diagonal, [C, C], and the scales, the diagonal of E [C].

    Raises:
        ValueError: `gram` is not finite.
    """
    diagonal = gram.diagonal()
    if not bool(diagonal.isfinite().all()):
        raise ValueError("the Gram matrix is not finite")
    damped = gram.clone()
    damped.diagonal().add_(damp * diagonal.mean())
    scale = damped.diagonal().sqrt() + 1e-8
    return damped.div_(scale).div_(scale.unsqueeze(1)), scale


def admm_support(
    target: Tensor,
    gram: Tensor,
    eigen: tuple[Tensor, Tensor],
    choose: Callable[[Tensor], Tensor],
    rho: float,
    iterations: int,
) -> tuple[Tensor, Tensor]:
    """Weights near `target` and which of them go.

    B ← (G - V + ρ D) (H + ρ I)⁻¹ with G = W H, D ← the projection of B + V / ρ, V ← V + ρ (B - D). ρ grows with the
    changes of the support; where there are none or few at the start, it is too large: it is divided by 5 (and what was
    found is forgotten, if there were some).

    Args:
        target: W, [R, C].
        gram: H, [C, C].
        eigen: its eigenvalues [C] and eigenvectors [C, C].
        choose: from magnitudes [R, C] to what goes, bool [R, C], always as many.
        rho: the first ρ.
        iterations: at most.

    Returns:
        B [R, C] with zeros, and what went, bool [R, C].
    """
    pull = target @ gram
    first = target.masked_fill(choose(target.abs()), 0.0)
    sparse, dual = first, torch.zeros_like(target)
    before, kept = first == 0, int((~choose(target.abs())).sum())
    inverse, grown = _shifted_inverse(eigen, rho), False
    current = target
    for step in range(1, iterations + 1):
        current = (pull - dual + rho * sparse) @ inverse
        moved = current + dual / rho
        sparse = moved.masked_fill_(choose(moved.abs()), 0.0)
        dual = dual + rho * (current - sparse)
        if step % EVERY:
            continue
        support = sparse == 0
        change = int((support != before).sum())
        before = support
        if change == 0 and grown:
            break
        if change == 0:
            rho /= 5
        elif change > 0.005 * kept or grown:
            rho *= 1.3 if change > 0.1 * kept else 1.2 if change > 0.005 * kept else 1.1
            grown = True
        else:
            rho /= 5
            sparse, dual, current = first, torch.zeros_like(target), target
        rho = min(rho, 1e6)
        inverse = _shifted_inverse(eigen, rho)
        if step > SETTLED[0] and change < SETTLED[1] * kept:
            break
    gone = choose(current.abs())
    return current.masked_fill(gone, 0.0), gone


def _shifted_inverse(eigen: tuple[Tensor, Tensor], rho: float) -> Tensor:
    """(H + ρ I)⁻¹, [C, C]."""
    values, vectors = eigen
    return (vectors / (values + rho)) @ vectors.t()


def refit(start: Tensor, target: Tensor, gram: Tensor, steps: int) -> Tensor:
    """Conjugate gradients for the entries of `start` that are not zero: tr((W - B) H (W - B)ᵀ) falls, the zeros stay.

    Every row has its own step sizes; denominators of 0 become 1e-8.

    Args:
        start: B, [R, C].
        target: W, [R, C].
        gram: H, [C, C].
        steps: how many.
    """
    support = start != 0
    residual = ((target - start) @ gram).mul_(support)
    found, direction = start, residual
    size = residual.square().sum(1, keepdim=True)
    for step in range(steps):
        if step:
            latest = residual.square().sum(1, keepdim=True)
            direction = residual + latest / torch.where(size == 0, 1e-8, size) * direction
            size = latest
        image = direction @ gram
        curvature = (direction * image).sum(1, keepdim=True)
        length = size / torch.where(curvature == 0, 1e-8, curvature)
        found = found + length * direction
        residual = (residual - length * image).mul_(support)
    return found
