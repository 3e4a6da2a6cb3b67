"""What methods that remove heads and channels share: scores of units, and the same share of them in every block."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tprune.core.select import floor_count, keep_by_cost, top
from tprune.core.weights import StructureEdit
from tprune.errors import BudgetError
from tprune.methods.weight_view import BlockView, Place, UnitView


def sums(columns: Tensor, unit: UnitView) -> Tensor:
    """Scores of the output projection's inputs [in], summed over each unit's: [U]."""
    return columns.view(-1, unit.width).sum(1)


def score_units(
    blocks: Sequence[BlockView], score: Callable[[UnitView], Tensor]
) -> dict[tuple[int, str], Tensor]:
    """The `score` [U] of every kind of unit in every block, by block and kind."""
    return {(block.index, kind): score(unit) for block in blocks for kind, unit in block.units.items()}


def same_share(
    blocks: Sequence[BlockView], scores: dict[tuple[int, str], Tensor], sparsity: float, total: int
) -> list[StructureEdit]:
    """Keep the best units of every block, the same share of a kind in all of them.

    Of each kind the same fraction goes, rounded down; what rounding leaves of the budget goes from the last kind, so
    that few and large heads do not spoil what channels can meet. One unit of each kind stays.

    Args:
        blocks: those that are pruned.
        scores: [U], larger is better, by block and kind.
        sparsity: of the whole model.
        total: its prunable weights.

    Raises:
        BudgetError: so much cannot go.
    """
    kinds = list(blocks[0].units)
    units = {kind: [block.units[kind] for block in blocks] for kind in kinds}
    sizes = {kind: sum(unit.cost * unit.count for unit in found) for kind, found in units.items()}
    least = sum(unit.cost for found in units.values() for unit in found)
    check_reach(sparsity, (sum(sizes.values()) - least) / total)
    left = sparsity * total
    share = left / sum(sizes.values())
    kept: list[dict[str, int]] = [{} for _ in blocks]
    for kind in kinds:
        last = kind == kinds[-1]
        for counts, unit in zip(kept, units[kind], strict=True):
            gone = round(unit.count * left / sizes[kind]) if last else floor_count(unit.count, share)
            counts[kind] = unit.count - min(gone, unit.count - 1)
        if not last:
            left -= sum(
                (unit.count - counts[kind]) * unit.cost
                for counts, unit in zip(kept, units[kind], strict=True)
            )
    return [keep_best(block, scores, counts) for block, counts in zip(blocks, kept, strict=True)]


def one_budget(
    blocks: Sequence[BlockView],
    scores: dict[tuple[int, str], Tensor],
    sparsity: float,
    total: int,
    strict: bool = False,
) -> list[StructureEdit]:
    """Keep the best units of all blocks and kinds until the kept weights come nearest to the budget.

    Of every kind the best unit of each block stays.

    Args:
        blocks, scores, sparsity, total: as `same_share` takes them.
        strict: drop the unit at the threshold, too.

    Raises:
        BudgetError: so much cannot go.
    """
    units = {(block.index, kind): unit for block in blocks for kind, unit in block.units.items()}
    costs = [torch.full((unit.count,), unit.cost) for unit in units.values()]
    spent = sum(int(cost.sum()) for cost in costs)
    check_reach(sparsity, sum(int(cost[1:].sum()) for cost in costs) / total)
    pooled = torch.cat([scores[place] for place in units])
    keep = keep_by_cost(pooled.cpu(), torch.cat(costs), spent - sparsity * total, strict)
    return keep_marked({place: scores[place] for place in units}, keep.to(pooled.device))


def keep_marked(scores: dict[Place, Tensor], keep: Tensor) -> list[StructureEdit]:
    """The edits that keep what `keep` marks, or the best unit of a kind where it marks none in a block.

    Args:
        scores: [U], by block and kind.
        keep: bool, of the units of all places in turn.
    """
    edits: dict[int, StructureEdit] = {}
    for ((index, kind), score), part in zip(
        scores.items(), keep.split([len(score) for score in scores.values()]), strict=True
    ):
        best = score.argmax().unsqueeze(0)
        edit = edits.setdefault(index, StructureEdit(index))
        edit.keep[kind] = part.nonzero().flatten() if bool(part.any()) else best
    return list(edits.values())


def keep_best(
    block: BlockView, scores: dict[tuple[int, str], Tensor], counts: dict[str, int]
) -> StructureEdit:
    """The edit that keeps so many units of each kind in a block, the best ones."""
    keep = {kind: top(scores[block.index, kind], count) for kind, count in counts.items()}
    return StructureEdit(block.index, keep=keep)


def check_reach(sparsity: float, most: float, stays: str = "a unit of each kind") -> None:
    """Refuse more than a method can remove, since something `stays`.

    Raises:
        BudgetError: that.
    """
    if sparsity > most:
        raise BudgetError(
            f"--sparsity {sparsity:g}: this model can lose at most {most:.4g} ({stays} stays)",
            0.0,
            most,
        )
