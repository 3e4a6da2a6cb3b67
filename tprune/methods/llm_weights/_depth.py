"""What methods that remove whole blocks share."""

from __future__ import annotations

from tprune.errors import BudgetError


def blocks_to_remove(sparsity: float, depth: int, kept: int = 1) -> int:
    """round(sparsity · depth), where `kept` blocks must stay.

    Raises:
        BudgetError: more than may go, or none although something was asked.
    """
    count, most = round(sparsity * depth), depth - kept
    if count > most or (count == 0 and sparsity > 0):
        raise BudgetError(
            f"--sparsity {sparsity:g} is {count} of {depth} blocks; reachable are {1 / depth:.4g} to "
            f"{most / depth:.4g}",
            1 / depth,
            most / depth,
        )
    return count
