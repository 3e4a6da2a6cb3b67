"""MultiPruner: first halves of blocks go, then channels of MLPs, then heads, each time what the loss misses least.

Removing whole halves alone leaves a model out of balance; three stages, from coarse to fine, share the budget. Inside a
block the order is fixed beforehand by the weights' magnitude, so that only how many stay has to be searched.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from tprune.core.weights import HALF_OF, HALVES, StructureEdit
from tprune.errors import BudgetError, UserError
from tprune.methods.base import Paper, param
from tprune.methods.llm_weights._depth import cheapest, halves_in_order
from tprune.methods.weight_view import BlockView, ModelView, UnitView
from tprune.methods.weights import WeightBudget, WeightMethod


@dataclass(frozen=True)
class MultiPruner(WeightMethod):
    """Greedy in three stages by perplexity; a stage ends when what is removed has reached its share."""

    paper = Paper(
        title="MultiPruner: Balanced Structure Removal in Foundation Models",
        venue="arXiv",
        year=2025,
        arxiv="2501.09949",
        code="IntelLabs/Hardware-Aware-Automated-Machine-Learning",
        checked="code",
        notes="The authors' ratio is of all parameters, ours of the blocks' weights; as theirs, a stage may end beyond "
        "its share by one step. They search on 256 rows of Alpaca for halves and on 128 for widths, here on the same "
        "sequences, and take 1,024 channels at a time of models with 11,008 to 18,944.",
    )
    kind = "calibrated"
    scope = "model"
    measures = True
    units = ("heads", "channels", "halves")
    uniform = False
    patterns = False

    distribution: tuple[float, ...] = param(
        (44.0, 52.0, 4.0), "Shares of the budget for halves, channels and heads", low=0, length=3
    )
    channels: int | None = param(
        None, "Channels that go at a time; none: a fourteenth, as 1,024 of Llama-3.1-8B's", low=1
    )
    groups: int = param(1, "Key-value groups (heads, where each has its own keys) that go at a time", low=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not sum(self.distribution):
            raise UserError("--set distribution=0,0,0: expected three shares, of which one is above 0")

    def plan(self, model: ModelView, budget: WeightBudget) -> list[StructureEdit]:
        """Three stages, each up to its share of the budget."""
        total = sum(block.parameters for block in model.blocks)
        asked = budget.sparsity * total
        search = Search(model)
        first, second, _ = (share / sum(self.distribution) for share in self.distribution)
        if first and asked and min(min(block.halves.values()) for block in model.blocks) > 2 * asked:
            return []
        search.remove_halves(first * asked)
        search.narrow("channels", self.step, (first + second) * asked)
        search.narrow("heads", lambda unit: self.groups, asked)
        if search.removed < asked:
            most = search.removed / total
            raise BudgetError(
                f"--sparsity {budget.sparsity:g}: in these steps at most {most:.4g} can go", 0.0, most
            )
        return search.edits()

    def step(self, unit: UnitView) -> int:
        """How many channels go at a time."""
        return self.channels or max(1, unit.count // 14)


class Search:
    """What has gone so far.

    Attributes:
        halves: edits that take halves out.
        widths: by block and kind, how many units stay.
        removed: weights that are gone.
    """

    def __init__(self, model: ModelView):
        self.model, self.halves, self.removed = model, [], 0
        self.widths: dict[tuple[int, str], int] = {}
        self.order: dict[tuple[int, str], Tensor] = {}

    def remove_halves(self, target: float) -> None:
        """Take halves out until `target` weights are gone."""
        sizes = [block.halves for block in self.model.blocks]
        if self.removed >= target:
            return
        for edit in halves_in_order(self.model, HALVES):
            self.halves.append(edit)
            self.removed += sizes[edit.block][edit.halves[0]]
            if self.removed >= target:
                return

    def narrow(self, kind: str, step: Callable[[UnitView], int], target: float) -> None:
        """Take units of a kind out, `step` of a block at a time, until `target` weights are gone, or none can go."""
        gone = {edit.block for edit in self.halves if edit.halves == (HALF_OF[kind],)}
        blocks = {block.index: block for block in self.model.blocks if block.index not in gone}
        while self.removed < target:
            left = {
                index: self.widths.get((index, kind), block.units[kind].count) - step(block.units[kind])
                for index, block in blocks.items()
            }
            candidates = [
                self.keeping(blocks[index], kind, count) for index, count in left.items() if count > 0
            ]
            if not candidates:
                return
            best = candidates[cheapest(self.model, self.edits(), candidates)].block
            unit = blocks[best].units[kind]
            self.widths[best, kind] = left[best]
            self.removed += step(unit) * unit.cost

    def keeping(self, block: BlockView, kind: str, count: int) -> StructureEdit:
        """The edit that keeps the `count` largest units of a block."""
        place = (block.index, kind)
        if place not in self.order:
            self.order[place] = magnitude(block.units[kind]).argsort(descending=True, stable=True)
        return StructureEdit(block.index, keep={kind: self.order[place][:count].sort().values})

    def edits(self) -> list[StructureEdit]:
        """All that has gone, an edit per block."""
        found = []
        for block in self.model.blocks:
            halves = tuple(edit.halves[0] for edit in self.halves if edit.block == block.index)
            kinds = [kind for kind in HALF_OF if (block.index, kind) in self.widths]
            keep = {
                kind: self.keeping(block, kind, self.widths[block.index, kind]).keep[kind] for kind in kinds
            }
            if halves or keep:
                found.append(StructureEdit(block.index, halves=halves, keep=keep))
        return found


def magnitude(unit: UnitView) -> Tensor:
    """Σ |w| of all rows that feed a unit, [U]; keys and values count once for every query head that reads them."""
    *feeds, _ = unit.members()
    rows = max(member.weight.shape[1] for member in feeds)
    return sum(member.weight.abs().sum((1, 2)) * (rows // member.weight.shape[1]) for member in feeds)
