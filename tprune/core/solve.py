"""Weight reconstruction: what the surviving weights become so that a layer's outputs change least.

For a layer y = W x with the Gram matrix H ∝ Σ x xᵀ, removing weights and updating the rest of each row
minimises (w - ŵ) H (w - ŵ)ᵀ (Optimal Brain Surgeon).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

BLOCK = 128
"""Columns whose weights are chosen together (SparseGPT's block size)."""
STRIP = 32
"""Columns that are solved one by one before the rest of their block is brought up to date."""
NEARLY_SINGULAR = 1e-5
"""Of a Cholesky factor's diagonal, the smallest entry to the largest; the condition is at least the inverse square."""


def invert_upper(upper: Tensor, leaf: int = 128) -> None:
    """Put the inverse of an upper triangular matrix [C, C] in its place, by halves: nearly all is matrix products."""
    size = upper.shape[0]
    if size <= leaf:
        eye = torch.eye(size, dtype=upper.dtype, device=upper.device)
        upper.copy_(torch.linalg.solve_triangular(upper, eye, upper=True))
        return
    half = size // 2
    top, corner, bottom = upper[:half, :half], upper[:half, half:], upper[half:, half:]
    invert_upper(top, leaf)
    invert_upper(bottom, leaf)
    torch.mm(top, (corner @ bottom).neg_(), out=corner)


def _turn(matrix: Tensor, rows: int = BLOCK) -> None:
    """Reverse a square matrix's rows and columns in its place."""
    size = matrix.shape[0]
    for first in range(0, size // 2, rows):
        last = min(first + rows, size // 2)
        upper, lower = slice(first, last), slice(size - last, size - first)
        above = matrix[upper].flip(0, 1)
        matrix[upper] = matrix[lower].flip(0, 1)
        matrix[lower] = above
    if size % 2:
        matrix[size // 2] = matrix[size // 2].flip(0)


def dead_inputs(gram: Tensor) -> Tensor:
    """Inputs that were always zero: bool [C]."""
    return gram.diagonal() == 0


def inverse_factor(gram: Tensor, damp: float, *, replace: bool = False) -> Tensor:
    """The upper triangular U [C, C] with UᵀU = (H + damp · mean(diag H) · I)⁻¹, for H = `gram`.

    Dead inputs get a diagonal of 1 first, as in SparseGPT's code. U is the inverse of the upper factor of
    H = V Vᵀ, which one Cholesky decomposition of the reversed matrix gives. Where it fails, the damping is
    raised tenfold. With `replace` it takes the place of `gram` in memory.

    Raises:
        ValueError: `gram` is not finite, or no damping makes it positive definite.
    """
    diagonal = gram.diagonal() + dead_inputs(gram).to(gram.dtype)
    mean, info = diagonal.mean(), torch.empty(0, dtype=torch.int32, device=gram.device)
    for _ in range(8):
        damped = gram.flip(0, 1).t()  # symmetric; LAPACK works in place on columns
        damped.diagonal().copy_((diagonal + damp * mean).flip(0))
        lower, failed = torch.linalg.cholesky_ex(damped, out=(damped, info))
        if not bool(failed) and bool(lower.diagonal().isfinite().all()):
            _turn(lower)
            invert_upper(lower)
            return gram.t().copy_(lower) if replace else lower
        damp = 10 * max(damp, 1e-6)
    raise ValueError("the Gram matrix is not finite, or not positive definite at any damping")


def obs_prune(
    weight: Tensor,
    factor: Tensor,
    choose: Callable[[Tensor], Tensor],
    *,
    dead: Tensor | None = None,
    group: int | None = None,
    block: int = BLOCK,
) -> tuple[Tensor, Tensor]:
    """Remove weights column by column from the left, and let those to the right make up for the error.

    A block of columns at a time: `choose` marks what goes by the scores w² / U_cc² of the weights as they then
    stand (with `group`, again for every group of columns, when it is reached); a removed weight w in column c
    is an error e = w / U_cc, and every column j > c of its row loses e · U_cj. Inside a block the updates are
    gathered when a column is reached, behind it they are one matrix product.

    Args:
        weight: float32 [R, C].
        factor: U of `inverse_factor`, [C, C].
        choose: from scores [R, columns] to the mask of what goes, bool [R, columns].
        dead: bool [C], inputs whose weights count as zero.
        group: m of an n:m pattern; divides `block`.
        block: columns that `choose` sees at once.

    Returns:
        The new weight [R, C] (not contiguous) and the mask of what was removed, bool [R, C].
    """
    if group is not None and block % group:
        raise ValueError(f"a block of {block} columns does not divide into groups of {group}")
    # [C, R]: a column of the weight is a contiguous row
    work = weight.t().clone(memory_format=torch.contiguous_format)
    if dead is not None:
        work.masked_fill_(dead.unsqueeze(1), 0.0)
    removed = torch.zeros_like(work, dtype=torch.bool)
    width, diagonal = weight.shape[1], factor.diagonal()
    step, chunk = group or STRIP, group or block
    for first in range(0, width, block):
        last = min(first + block, width)
        error = torch.zeros_like(work[first:last])
        for start in range(first, last, step):
            stop = min(start + step, last)
            if (start - first) % chunk == 0:
                chosen = slice(start, min(start + chunk, last))
                score = (work[chosen] / diagonal[chosen, None]).square_()
                removed[chosen] = choose(score.t().contiguous()).t()
            part = error[start - first : stop - first]
            _solve_strip(work[start:stop], removed[start:stop], part, factor[start:stop, start:stop])
            work[stop:last].addmm_(factor[start:stop, stop:last].t(), part, alpha=-1)
        work[last:].addmm_(factor[first:last, last:].t(), error, alpha=-1)
    return work.masked_fill_(removed, 0.0).t(), removed.t().contiguous()


def _solve_strip(work: Tensor, removed: Tensor, error: Tensor, factor: Tensor) -> None:
    """Solve the columns of one strip in turn.

    Args:
        work: the strip's columns as rows [c, R], up to date with all columns before the strip; updated.
        removed: bool [c, R].
        error: [c, R], filled.
        factor: the strip's corner of U, [c, c].
    """
    share = removed / factor.diagonal().unsqueeze(1)  # [c, R], 1 / U_cc where a weight goes, else 0
    incoming = factor.t().contiguous()  # row j: what column j takes from each column before it
    for column in range(work.shape[0]):
        if column:
            work[column].addmv_(error[:column].t(), incoming[column, :column], alpha=-1)
        torch.mul(work[column], share[column], out=error[column])


def least_squares(gram: Tensor, cross: Tensor) -> Tensor:
    """X [C, R] with the least |A X - B|², and of those the least |X|²: of AᵀA = `gram` [C, C] and AᵀB = `cross`.

    By a Cholesky decomposition where the Gram matrix is far from singular, else by a pseudo-inverse, which is slow.
    """
    lower, failed = torch.linalg.cholesky_ex(gram)
    low, high = lower.diagonal().aminmax()
    if bool(failed) or not bool(low > NEARLY_SINGULAR * high):
        return torch.linalg.pinv(gram, hermitian=True) @ cross
    return torch.cholesky_solve(cross, lower)
