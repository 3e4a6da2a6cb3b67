"""What methods that remove whole blocks, or halves of them, share."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tprune.core.weights import StructureEdit
from tprune.errors import BudgetError
from tprune.methods.views import ModelView


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


def remove_halves(model: ModelView, kinds: Sequence[str], budget: float) -> list[tuple[str, int]]:
    """Halves of blocks, greedily, until the removed weights come nearest to `budget`: (half, block) as they go.

    Each step takes the one without which the model's loss is lowest; of equals the attention, the earlier block.

    Raises:
        BudgetError: all halves of these kinds are less than asked.
    """
    sizes = {(kind, block.index): block.halves[kind] for kind in kinds for block in model.blocks}
    total = sum(block.parameters for block in model.blocks)
    most = (sum(sizes.values()) - min(sizes.values())) / total
    if budget > most * total:
        raise BudgetError(
            f"--sparsity {budget / total:g}: without all but one of these halves it is {most:.4g}", 0.0, most
        )
    gone: list[tuple[str, int]] = []
    left = budget
    while left > 0:
        alive = [half for half in sizes if half not in gone]
        if min(sizes[half] for half in alive) > 2 * left:
            break
        made = [StructureEdit(at, halves=(kind,)) for kind, at in gone]
        candidates = [[StructureEdit(at, halves=(kind,))] for kind, at in alive]
        losses = model.losses_with(made, candidates).nan_to_num(torch.inf)
        best = alive[int(losses.argmin())]
        if sizes[best] > 2 * left:
            break
        gone.append(best)
        left -= sizes[best]
    return gone
