"""Optimal Brain Surgeon, Kronecker-factored: the loss rises by ½ tr(Gᵀ Δ A Δᵀ) with the change Δ [R, C].

G [R, R] is the second moment of the loss's gradients at a layer's outputs, A [C, C] that of its inputs (K-FAC), so that
the inverse of the curvature is G⁻¹ ⊗ A⁻¹ (The LLM Surgeon, arXiv 2312.17244).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def live_inverse(moment: Tensor, live: Tensor, damp: float) -> Tensor:
    """(M + damp · mean(diag M) · I)⁻¹ of the `live` rows and columns of M, zero elsewhere: float32 [C, C].

    Args:
        moment: M, [C, C].
        live: bool [C].
        damp: as a fraction of the mean of the live diagonal.

    Raises:
        ValueError: `moment` is not finite, or not positive definite.
    """
    places = live.nonzero().squeeze(1)
    inner = moment[places][:, places].double()
    inner.diagonal().add_(damp * inner.diagonal().mean())
    lower, failed = torch.linalg.cholesky_ex(inner)
    if bool(failed) or not bool(lower.isfinite().all()):
        raise ValueError("the curvature is not finite, or not positive definite; raise the damping")
    found = torch.zeros(moment.shape, dtype=torch.float32, device=moment.device)
    found[places.unsqueeze(1), places] = torch.cholesky_inverse(lower).float()
    return found


def removal_costs(weight: Tensor, outer: Tensor, inner: Tensor) -> Tensor:
    """What the loss rises by when a weight goes alone, ½ w² / ([G⁻¹]_rr [A⁻¹]_cc); 0 where an inverse is 0.

    Args:
        weight: [R, C].
        outer, inner: the diagonals of G⁻¹ [R] and A⁻¹ [C].
    """
    diagonal = torch.outer(outer, inner)
    return torch.where(diagonal > 0, weight.square() / (2 * diagonal), 0.0)


def row_costs(weight: Tensor, outer: Tensor, inner: Tensor) -> Tensor:
    """What the loss rises by when a row goes alone, ½ w_r A w_rᵀ / [G⁻¹]_rr: [R]; 0 where the inverse is 0.

    Of a column the same of Wᵀ, with the parts of G and A exchanged.

    Args:
        weight: [R, C].
        outer: the diagonal of G⁻¹ [R].
        inner: A [C, C].
    """
    return torch.where(outer > 0, ((weight @ inner) * weight).sum(1) / (2 * outer), 0.0)


def remove_lines(weight: Tensor, rows: Tensor, columns: Tensor, outer: Tensor, inner: Tensor) -> Tensor:
    """The weights [R, C] without whole `rows` and `columns`, the others updated for the ones and for the others.

    Removed together, rows change the weights by -G⁻¹_:R (G⁻¹_RR)⁻¹ W_R, columns by -W_C (A⁻¹_CC)⁻¹ A⁻¹_C:; both are of
    the weights as they were, and add up.

    Args:
        weight: float32 [R, C].
        rows, columns: bool [R] and [C].
        outer, inner: G⁻¹ [R, R] and A⁻¹ [C, C]; what they are zero at is removed without an update.
    """
    change = _lines_change(weight, rows, outer) + _lines_change(weight.t(), columns, inner).t()
    return (weight + change).masked_fill_(rows.unsqueeze(1) | columns, 0.0)


def _lines_change(weight: Tensor, rows: Tensor, outer: Tensor) -> Tensor:
    """What all weights [R, C] change by when `rows` go."""
    going = (rows & (outer.diagonal() > 0)).nonzero().squeeze(1)
    force = torch.linalg.solve(outer[going][:, going], weight[going])
    return -outer[:, going] @ force


def remove_together(weight: Tensor, mask: Tensor, outer: Tensor, inner: Tensor, most: int) -> Tensor:
    """The weights [R, C] without those in `mask`, the others updated for what is removed together.

    Whole rows of the mask are taken together as long as they hold at most `most` weights (a row alone may hold more),
    one set after the other, each with the updates of those before it: with w the weights of a set, u solves
    (G⁻¹ ⊗ A⁻¹)_QQ u = w, and all weights change by -G⁻¹ U A⁻¹.

    Args:
        weight: float32 [R, C].
        mask: bool [R, C].
        outer, inner: G⁻¹ [R, R] and A⁻¹ [C, C]; what they are zero at is removed without an update.
        most: how many weights are removed together.
    """
    live = torch.outer(outer.diagonal() > 0, inner.diagonal() > 0)
    updated, going = weight.clone(), mask & live
    for rows in _together(going.sum(1), most):
        row, column = going[rows].nonzero(as_tuple=True)
        place = rows.start + row
        system = outer[place][:, place] * inner[column][:, column]
        force = torch.zeros_like(updated[rows])
        force[row, column] = torch.linalg.solve(system, updated[place, column])
        updated -= outer[:, rows] @ (force @ inner)
    return updated.masked_fill_(mask, 0.0)


def _together(counts: Tensor, most: int) -> Iterator[slice]:
    """Consecutive rows with at most `most` weights between them, or a single one, of `counts` int64 [R]."""
    first = total = 0
    for row, count in enumerate(counts.tolist()):
        if total and total + count > most:
            yield slice(first, row)
            first, total = row, 0
        total += count
    if total:
        yield slice(first, len(counts))
