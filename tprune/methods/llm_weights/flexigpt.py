"""FlexiGPT: a block that would be removed runs on, with the weights of another and a small difference of its own.

The blocks of least influence give up their weights. Each borrows from the kept block that it is most like once both are
seen through a low rank, plus the best low-rank difference; what it adds to the residual stream is made small.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tprune.core.low_rank import LowRankMap, gap
from tprune.core.weights import Shared, StructureEdit
from tprune.errors import BudgetError, UserError
from tprune.methods.base import Paper, param
from tprune.methods.llm_weights._depth import least_influential
from tprune.methods.weight_view import BlockView, ModelView
from tprune.methods.weights import WeightBudget, WeightMethod


@dataclass(frozen=True)
class FlexiGPT(WeightMethod):
    """Whole blocks by influence, shared instead of removed."""

    paper = Paper(
        title="FlexiGPT: Pruning and Extending Large Language Models with Low-Rank Weight Sharing",
        venue="NAACL",
        year=2025,
        arxiv="2501.14713",
        checked="paper",
        notes="Pruning alone, not the extension of a model. What the differences cost is in the budget. The scale of "
        "what a block adds begins at 0.01, the paper's is small and not told. Its training on a billion tokens is "
        "--recover full, which trains differences and scales too.",
    )
    kind = "calibrated"
    scope = "model"
    stats = ("similarity",)
    units = ("heads", "channels")
    propagate = "dense"
    uniform = False
    patterns = False

    rank: int | None = param(
        None, "Of the differences; none: a sixteenth of the width, as 256 of 4,096", low=1
    )
    scale: float | None = param(0.01, "Of the normalised output of a sharing block, at first; none: as it is")

    def plan(self, model: ModelView, budget: WeightBudget) -> list[StructureEdit]:
        """The least influential blocks, and whom each borrows from.

        Raises:
            BudgetError: as `least`.
            UserError: a block is like none that stays.
        """
        width = next(iter(model.blocks[0].units.values())).weight.shape[0]
        rank = self.rank or max(1, width // 16)
        gone = self.least(model.blocks, budget.sparsity, rank)
        if not gone:
            return []
        factors = [[LowRankMap.best(weight, rank) for weight in weights(block)] for block in model.blocks]
        shapes = [[(one.up.shape, one.down.shape) for one in found] for found in factors]
        edits = []
        for place in gone:
            alike = [
                base for base in range(len(factors)) if base not in gone and shapes[base] == shapes[place]
            ]
            if not alike:
                raise UserError(
                    f"no block that stays has the shape of block {place}, which can then not borrow; let flexigpt go "
                    "before what leaves blocks of different shapes"
                )
            gaps = [
                sum(gap(one, other, rank) for one, other in zip(factors[place], factors[base], strict=True))
                for base in alike
            ]
            base = alike[int(torch.stack(gaps).argmin())]
            edits.append(StructureEdit(place, shared=Shared(base, rank, self.scale)))
        return edits

    def least(self, blocks: Sequence[BlockView], sparsity: float, rank: int) -> list[int]:
        """As many blocks of the smallest influence as come nearest to the budget, ascending.

        Raises:
            BudgetError: so many cannot share, or sharing saves nothing.
        """
        total = sum(block.parameters for block in blocks)
        saved = blocks[0].parameters - sum(rank * sum(weight.shape) for weight in weights(blocks[0]))
        most = (len(blocks) - 1) * saved / total
        count = round(sparsity * total / saved) if saved > 0 else len(blocks)
        if count >= len(blocks) or (sparsity > 0 and count == 0):
            raise BudgetError(
                f"--sparsity {sparsity:g}: blocks that share with differences of rank {rank} save "
                f"{max(saved, 0) / total:.4g} to {max(most, 0):.4g}",
                saved / total,
                most,
            )
        return least_influential(blocks, count)


def weights(block: BlockView) -> list[torch.Tensor]:
    """All matrices of a block, [rows, columns]; those that read units are transposed."""
    return [member.weight.flatten(0, 1) for unit in block.units.values() for member in unit.members()]
