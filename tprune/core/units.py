"""Which inputs of a projection go, in whole groups, and what the rest becomes so that its outputs change least.

For y = W z with H ∝ Σ z zᵀ, removing a group G of inputs and updating the rest minimises tr((W - Ŵ) H (W - Ŵ)ᵀ)
(Optimal Brain Surgeon, for structures).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from tprune.core.select import top
from tprune.core.solve import dead_inputs

PENDING = 64
"""So many single inputs are removed before the matrices follow."""


def damped_gram(gram: Tensor, damp: float) -> Tensor:
    """H [C, C] with a diagonal of 1 for dead inputs, and damp · mean(diag H) · I added."""
    found = gram.clone()
    diagonal = found.diagonal()
    diagonal += dead_inputs(gram).to(gram.dtype)
    diagonal += damp * diagonal.mean()
    return found


def columns_of(units: Tensor, width: int) -> Tensor:
    """The inputs of `units` [K], `width` consecutive ones each, in the order of the units: int64 [K · width]."""
    return (units.unsqueeze(1) * width + torch.arange(width, device=units.device)).flatten()


def remove_greedily(
    weight: Tensor, inverse: Tensor, width: int, stops: Sequence[int]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Remove units one after the other, each the one whose removal costs least, and update the rest (ZipLM).

    The cost of unit G is Σ W_G [H⁻¹]_GG⁻¹ ∘ W_G; then W -= W_G [H⁻¹]_GG⁻¹ H⁻¹_G and H⁻¹ loses what G explains.

    Args:
        weight: float32 [R, U · width].
        inverse: H⁻¹ [U · width, U · width].
        width: inputs of a unit.
        stops: how many units are gone when the state is asked for, ascending, each at most U.

    Yields:
        For each stop the units that are left, int64 ascending, and their weights [R, left · width].
    """
    if width == 1:
        yield from _remove_columns(weight.clone(), inverse.clone(), stops)
        return
    weight, inverse = weight.clone(), inverse.clone()
    count = weight.shape[1] // width
    gone = torch.zeros(count, dtype=torch.bool, device=weight.device)
    removed = 0
    for stop in stops:
        while removed < stop:
            blocks = inverse.view(count, width, count, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
            inner = _inverses(blocks)
            scaled = weight.view(-1, count, width).transpose(0, 1) @ inner  # [U, R, width]
            cost = (scaled * weight.view(-1, count, width).transpose(0, 1)).sum((1, 2))
            unit = cost.masked_fill(gone, torch.inf).argmin().unsqueeze(0)
            columns = columns_of(unit, width)
            rows = inverse[columns]
            weight -= scaled[unit].squeeze(0) @ rows
            inverse -= rows.t() @ (inner[unit].squeeze(0) @ rows)
            gone[unit] = True
            # What is gone is exactly zero, and apart from the rest.
            weight[:, columns] = 0
            inverse[columns], inverse[:, columns] = 0, 0
            inverse[columns, columns] = 1
            removed += 1
        left = (~gone).nonzero().flatten()
        yield left, weight[:, columns_of(left, width)]


def _remove_columns(weight: Tensor, inverse: Tensor, stops: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
    """As `remove_greedily` for single inputs, in place; a removal reads the weights once and writes vectors alone.

    What `PENDING` removals change is held as outer products, e vᵀ of the weights and v vᵀ of H⁻¹, and carried out
    together. Costs need the lengths of the weights' columns and the diagonal alone, which are brought up to date.
    """
    rows, count = weight.shape
    gone = torch.zeros(count, dtype=torch.bool, device=weight.device)
    across, along = weight.new_empty(PENDING, count), weight.new_empty(PENDING, rows)  # v and e
    # Where rounding has eaten all of it, what is left of the diagonal is still above 0.
    floor = inverse.diagonal() * torch.finfo(inverse.dtype).eps
    removed = 0
    for stop in stops:
        while removed < stop:
            lengths, diagonal = weight.square().sum(0), inverse.diagonal().clone()
            some = min(PENDING, stop - removed)
            for done in range(some):
                v, e = across[:done], along[:done]
                unit = (lengths / diagonal.maximum(floor)).masked_fill(gone, torch.inf).argmin()
                column = weight[:, unit] - v[:, unit] @ e
                row = inverse[unit] - v[:, unit] @ v
                root = row[unit].maximum(floor[unit]).sqrt()
                across[done], along[done] = (row / root).masked_fill(gone, 0), column / root
                new, old = across[done], along[done]
                lengths += new * (new * old.square().sum() - 2 * (old @ weight - (e @ old) @ v))
                diagonal -= new.square()
                gone[unit] = True
            v, e = across[:some], along[:some]
            weight.addmm_(e.t(), v, alpha=-1)
            inverse.addmm_(v.t(), v, alpha=-1)
            # What is gone is exactly zero, and apart from the rest.
            weight[:, gone] = 0
            inverse[gone], inverse[:, gone] = 0, 0
            inverse.diagonal()[gone] = 1
            removed += some
        left = (~gone).nonzero().flatten()
        yield left, weight[:, left]


def _inverses(blocks: Tensor) -> Tensor:
    """The inverses of symmetric matrices [U, w, w]."""
    if blocks.shape[-1] == 1:
        return 1 / blocks
    lower, failed = torch.linalg.cholesky_ex(blocks)
    if bool(failed.any()):
        return torch.linalg.pinv(blocks, hermitian=True)
    return torch.cholesky_inverse(lower)


def remove_in_rounds(
    weight: Tensor, gram: Tensor, width: int, counts: Sequence[int], rounds: int, products: bool = True
) -> Iterator[tuple[Tensor, Tensor]]:
    """Remove units in a few rounds, those that cost least; at the end solve what is left exactly (Týr).

    With B = Wᵀ and G = H B (of the dense B) the cost of unit g is Σ ½ B_g ∘ [H⁻¹]_gg⁻¹ B_g + B_g ∘ G_g; after a round
    the rest is updated as Optimal Brain Surgeon does, and in the end B_K = H_KK⁻¹ G_K for the kept K. Units that are
    zero go before the first round.

    Args:
        weight: float32 [R, U · width].
        gram: H [U · width, U · width], damped.
        width: inputs of a unit.
        counts: how many units go, in each of several versions, less than U.
        rounds: at most so many, of equal shares; the first ones are larger by one where it does not divide.
        products: whether the cost has its second term, which is not in Optimal Brain Surgeon but in Týr's code.

    Yields:
        For each count the units that are left, int64 ascending, and their weights [R, left · width].
    """
    dense = weight.t().contiguous()
    product, inverse = gram @ dense, torch.cholesky_inverse(torch.linalg.cholesky(gram))
    for count in counts:
        left = _left_after_rounds(dense, product, inverse, width, count, rounds, products)
        kept = columns_of(left, width)
        lower = torch.linalg.cholesky(gram[kept][:, kept])
        yield left, torch.cholesky_solve(product[kept], lower).t()


def _left_after_rounds(
    now: Tensor, product: Tensor, inverse: Tensor, width: int, count: int, rounds: int, products: bool
) -> Tensor:
    """Which units are left of `remove_in_rounds`, int64 ascending; of B, G and H⁻¹."""
    units = now.shape[0] // width
    gone = torch.zeros(units, dtype=torch.bool, device=now.device)
    empty = now.abs().view(units, -1).sum(1) <= 1e-12
    first = min(int(empty.sum()), count)
    for share in filter(None, [first, *_shares(count - first, rounds)]):
        blocks = inverse.view(units, width, units, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        apart = torch.eye(width, device=now.device, dtype=now.dtype) * gone.view(-1, 1, 1)
        half = (_inverses(blocks + apart) @ now.view(units, width, -1)).view_as(now) / 2
        cost = (now * (half + product if products else half)).view(units, -1).sum(1)
        cost = cost.masked_fill(empty, -torch.inf).masked_fill(gone, torch.inf)
        picked = top(-cost, share)
        columns = columns_of(picked, width)
        across = inverse[:, columns] @ torch.linalg.inv(inverse[columns][:, columns])
        now = now - across @ now[columns]
        inverse = inverse - across @ inverse[columns]
        gone[picked] = True
        now[columns], inverse[columns], inverse[:, columns] = 0, 0, 0
    return (~gone).nonzero().flatten()


def _shares(count: int, rounds: int) -> list[int]:
    rounds = min(rounds, count)
    return [count // rounds + (place < count % rounds) for place in range(rounds)]
