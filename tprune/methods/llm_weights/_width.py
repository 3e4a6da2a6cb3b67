"""What methods that remove heads and channels share: scores of units, and the same share of them in every block."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tprune.core.select import floor_count, top
from tprune.core.weights import StructureEdit
from tprune.errors import BudgetError
from tprune.methods.views import BlockView, UnitView


def sums(columns: Tensor, unit: UnitView) -> Tensor:
    """Scores of the output projection's inputs [in], summed over each unit's: [U]."""
    return columns.view(-1, unit.width).sum(1)


def same_share(
    blocks: Sequence[BlockView], scores: dict[tuple[int, str], Tensor], sparsity: float, total: int
) -> list[StructureEdit]:
    """Keep the best units of every block, equally many of a kind in all of them.

    Of each kind the same fraction goes, rounded down; what rounding leaves of the budget goes from the last kind, so
    that few and large heads do not spoil what channels can meet. One unit of each kind stays.

    Args:
        blocks: those that are pruned, of one shape.
        scores: [U], larger is better, by block and kind.
        sparsity: of the whole model.
        total: its prunable weights.

    Raises:
        BudgetError: so much cannot go.
    """
    kinds = list(blocks[0].units)
    units = [[block.units[kind] for block in blocks] for kind in kinds]
    costs = [sum(unit.cost for unit in found) for found in units]
    counts = [found[0].count for found in units]
    check_reach(sparsity, sum(cost * (count - 1) for cost, count in zip(costs, counts, strict=True)) / total)
    left = sparsity * total
    share = left / sum(cost * count for cost, count in zip(costs, counts, strict=True))
    removed = {}
    for kind, cost, count in zip(kinds, costs, counts, strict=True):
        last = kind == kinds[-1]
        removed[kind] = min(round(left / cost) if last else floor_count(count, share), count - 1)
        left -= removed[kind] * cost
    return [
        keep_best(
            block, scores, {kind: count - removed[kind] for kind, count in zip(kinds, counts, strict=True)}
        )
        for block in blocks
    ]


def keep_best(
    block: BlockView, scores: dict[tuple[int, str], Tensor], counts: dict[str, int]
) -> StructureEdit:
    """The edit that keeps so many units of each kind in a block, the best ones."""
    keep = {kind: top(scores[block.index, kind], count) for kind, count in counts.items()}
    return StructureEdit(block.index, keep=keep)


def check_reach(sparsity: float, most: float) -> None:
    """Refuse more than a method can remove.

    Raises:
        BudgetError: that.
    """
    if sparsity > most:
        raise BudgetError(
            f"--sparsity {sparsity:g}: this model can lose at most {most:.4g} (a unit of each kind stays)",
            0.0,
            most,
        )
