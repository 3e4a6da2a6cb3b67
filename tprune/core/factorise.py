"""A matrix as a sparse core between two block-diagonal matrices, W ≈ A S B (ARMOR, arXiv 2510.05528).

A [R, R] and B [C, C] are held as their blocks, [R / b, b, b] and [C / b, b, b]: a few numbers per weight, with which
the core, whatever its pattern, comes nearer to W. What is near is said by the inputs: Σ_rc d_c (A S B - W)²_rc.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

PATIENCE = 100
"""Iterations in a row without progress that end the optimisation."""
PROGRESS = (1e-6, 1e-8)
"""What counts as progress: the loss falls by so much, relatively and absolutely."""


def largest_divisor(width: int, most: int, multiple: int = 1) -> int:
    """The largest divisor of `width` that is at most `most` and a multiple of `multiple`, which divides `width`."""
    sizes = range(multiple, min(width, max(most, multiple)) + 1, multiple)
    return max(size for size in sizes if width % size == 0)


def unit_norms(weight: Tensor, least: float = 1e-5) -> tuple[Tensor, Tensor, Tensor]:
    """`weight` [R, C] with columns, then rows, of about unit norm, and the norms of rows [R] and columns [C]."""
    columns = weight.norm(dim=0) + least
    weight = weight / columns
    rows = weight.norm(dim=1) + least
    return weight / rows.unsqueeze(1), rows, columns


def blockwise(blocks: Tensor, x: Tensor) -> Tensor:
    """The block-diagonal matrix of `blocks` [n, b, b] times each vector of `x` [..., n · b]."""
    return torch.einsum("nij,...nj->...ni", blocks, x.unflatten(-1, blocks.shape[:2])).flatten(-2)


def between(outward: Tensor, core: Tensor, inward: Tensor) -> Tensor:
    """A S B [R, C], of the blocks of A and B and the core [R, C]."""
    return blockwise(outward, blockwise(inward.mT, core).t()).t()


@dataclass(eq=False)
class Factors:
    """A matrix in factors.

    Attributes:
        outward, inward: blocks of A [R / b, b, b] and of B [C / b, b, b]; the sizes may differ.
        core: S [R, C]; only what `stays` marks counts.
        stays: bool [R, C].
    """

    outward: Tensor
    core: Tensor
    inward: Tensor
    stays: Tensor

    @classmethod
    def start(cls, weight: Tensor, stays: Tensor, sizes: tuple[int, int]) -> Factors:
        """Identities around the weights [R, C] that stay, with blocks of `sizes` for A and B."""
        eyes = (
            torch.eye(size, device=weight.device).repeat(width // size, 1, 1)
            for width, size in zip(weight.shape, sizes, strict=True)
        )
        outward, inward = eyes
        return cls(outward, weight.clone(), inward, stays.clone())

    def sparse(self) -> Tensor:
        """S with its zeros, [R, C]."""
        return self.core * self.stays


def relative_error(factors: Factors, core: Tensor, target: Tensor, importance: Tensor) -> Tensor:
    """Σ d (A S B - W)² / Σ d W², with S = `core` [R, C], W = `target` [R, C] and d = `importance` [C]."""
    error = (between(factors.outward, core, factors.inward) - target).square() * importance
    return error.mean() / (target.square() * importance).mean()


def fit_factors(
    factors: Factors,
    target: Tensor,
    importance: Tensor,
    pattern: tuple[int, int] | None,
    iterations: int,
    rate: float,
    generator: torch.Generator,
) -> None:
    """Bring `factors` nearer to `target`: a step of Adam on all values, and one of the core's pattern, in turn.

    Args:
        factors: improved in place.
        target: W, [R, C].
        importance: d, [C].
        pattern: (n, m), n of m consecutive weights stay; None keeps the zeros where they are.
        iterations: at most.
        rate: Adam's learning rate.
        generator: on the CPU.
    """
    values = [factors.outward, factors.core, factors.inward]
    optimiser = torch.optim.Adam([value.requires_grad_() for value in values], lr=rate)
    latest, patience = relative_error(factors, factors.sparse(), target, importance).item(), PATIENCE
    for _ in range(iterations):
        optimiser.zero_grad()
        with torch.enable_grad():
            relative_error(factors, factors.sparse(), target, importance).backward()
        optimiser.step()
        if pattern is not None:
            choose_groups(factors, target, importance, pattern, generator)
        with torch.no_grad():
            loss = relative_error(factors, factors.sparse(), target, importance).item()
        patience = PATIENCE if loss <= min(latest * (1 - PROGRESS[0]), latest - PROGRESS[1]) else patience - 1
        latest = loss
        if patience == 0:
            break
    for value in values:
        value.requires_grad_(False)


def choose_groups(
    factors: Factors, target: Tensor, importance: Tensor, pattern: tuple[int, int], generator: torch.Generator
) -> None:
    """In every pair of a row block and a column block, choose one group of m weights anew, and their values.

    Groups are drawn by the L1 norm of the error's gradient. All choices of n of m are compared, each with its best
    values, so that the error does not grow. Pairs do not touch each other, since A and B are block-diagonal.

    Args:
        factors: changed in place.
        target, importance: as in `fit_factors`.
        pattern: (n, m); m divides the column blocks.
        generator: on the CPU.
    """
    keep, size = pattern
    core = factors.sparse().detach().requires_grad_()
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(relative_error(factors, core, target, importance), core)
    with torch.no_grad():
        row, column = _draw(gradient, factors, size, generator)
        core = core.detach().clone()
        core[row.unsqueeze(1), column] = 0.0
        root = importance.sqrt()
        residual = (between(factors.outward, core, factors.inward) - target) * root
        height, width = factors.outward.shape[1], factors.inward.shape[1]
        residual = _pairs(residual, height, width)  # [P, b, b']
        pairs = torch.arange(len(residual), device=core.device)
        across = len(factors.inward)
        a = factors.outward[pairs // across, :, row % height]  # [P, b]
        b = (
            factors.inward[(pairs % across).unsqueeze(1), column % width]
            * root.view(across, 1, width)[pairs % across]
        )
        pull = (b @ (residual.mT @ a.unsqueeze(2))).squeeze(2)  # [P, m]
        choices = torch.combinations(torch.arange(size, device=core.device), keep)  # [K, n]
        chosen = b[:, choices]  # [P, K, n, b']
        curvature = chosen @ chosen.mT + 1e-9 * torch.eye(keep, device=core.device)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky_ex(curvature)[0])
        force = pull[:, choices].unsqueeze(3)  # [P, K, n, 1]
        step = inverse @ force
        best = (force * step).sum((2, 3)).argmax(1)
        value = -step[pairs, best].squeeze(2) / (a.square().sum(1, keepdim=True) + 1e-8)
        places = column.gather(1, choices[best])
        factors.stays[row.unsqueeze(1), column] = False
        factors.stays[row.unsqueeze(1), places] = True
        factors.core[row.unsqueeze(1), places] = value


def _pairs(x: Tensor, height: int, width: int) -> Tensor:
    """[R, C] as its blocks of height × width, row by row of them: [P, height, width]."""
    return x.unflatten(0, (-1, height)).unflatten(2, (-1, width)).transpose(1, 2).flatten(0, 1)


def _draw(gradient: Tensor, factors: Factors, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """One group of `size` weights in every pair, by its gradient [R, C]: rows int64 [P] and columns int64 [P, size]."""
    height, width = factors.outward.shape[1], factors.inward.shape[1]
    groups = width // size  # in a row of a pair
    mass = _pairs(gradient, height, width).flatten(1).unflatten(1, (-1, size)).abs().sum(2).cpu()
    mass += mass.sum(1, keepdim=True) == 0  # where nothing is to be gained, any group
    drawn = torch.multinomial(mass, 1, generator=generator).squeeze(1).to(gradient.device)
    pairs, across = torch.arange(len(drawn), device=gradient.device), len(factors.inward)
    row = pairs // across * height + drawn // groups
    column = pairs % across * width + drawn % groups * size
    return row, column.unsqueeze(1) + torch.arange(size, device=gradient.device)
