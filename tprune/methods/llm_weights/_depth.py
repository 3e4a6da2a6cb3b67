"""What methods that remove whole blocks, or halves of them, share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from tprune.core.weights import StructureEdit
from tprune.errors import BudgetError
from tprune.methods.weight_view import BlockView, ModelView


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


def least_influential(blocks: Sequence[BlockView], count: int) -> list[int]:
    """The `count` blocks with the smallest 1 - mean cosine between what enters and what leaves, ascending by index."""
    influence = torch.tensor([1 - block.similarity for block in blocks], dtype=torch.float64)
    return influence.argsort(stable=True)[:count].sort().values.tolist()


def cheapest(model: ModelView, made: Sequence[StructureEdit], candidates: Sequence[StructureEdit]) -> int:
    """Which candidate leaves the lowest loss once `made` has been done; the first among equals."""
    losses = model.losses_with(made, [[candidate] for candidate in candidates])
    return int(losses.nan_to_num(torch.inf).argmin())


def halves_in_order(model: ModelView, kinds: Sequence[str]) -> Iterator[StructureEdit]:
    """Halves of blocks as they go, each the one without which, and without those before it, the loss is lowest.

    Of equals the attention goes first, then the earlier block. A step is measured when it is asked for.
    """
    gone: list[StructureEdit] = []
    alive = [StructureEdit(block.index, halves=(kind,)) for kind in kinds for block in model.blocks]
    while alive:
        gone.append(alive.pop(cheapest(model, gone, alive)))
        yield gone[-1]
