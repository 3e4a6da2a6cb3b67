"""SHRP: heads are experts, a router takes one of them while the encoder is tuned, and the one most used is left.

As many heads as shall stay, so many groups of consecutive heads there are in a block. In each the router takes one for
every token; then the most used of each group stays, the others go with the router, and training goes on a little.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tprune.core.routing import groups_of, top_of_groups
from tprune.core.weights import StructureEdit
from tprune.errors import BudgetError
from tprune.methods.base import Paper, param
from tprune.methods.llm_weights._width import check_reach
from tprune.methods.weight_view import ModelView
from tprune.methods.weights import Routed, WeightBudget, WeightMethod


@dataclass(frozen=True)
class SHRP(WeightMethod):
    """One head of every group, by how often a router took it."""

    paper = Paper(
        title="SHRP: Specialized Head Routing and Pruning for Efficient Encoder Compression",
        venue="arXiv",
        year=2025,
        arxiv="2512.20635",
        checked="abstract",
        notes="A reconstruction: that heads are experts, that usage under Top-1 routing decides which stay, and that "
        "pruning is deterministic at deployment, is the abstract's. Ours are the groups, which let more than one head "
        "stay; equally many heads in all blocks; the router, linear in what enters a block, for every token; that "
        "routing sets in gradually and ends before the training does; the loss, of classes alone; and all defaults. "
        "No expander is added: the block's output projection and MLP, which all heads share, are trained in its place, "
        "so that the result has stock layers only. Heads alone reach neither the paper's 48% of the parameters nor its "
        "extreme case, 11 of 12 layers.",
    )
    kind = "trained"
    learns = "required"
    scope = "model"
    units = ("heads",)
    runs_on = ("encoder",)
    uniform = False
    patterns = False

    epochs: float = param(10.0, "Passes over the training data, fractions allowed", low=0)
    batch: int = param(16, "Passages per step, over all processes", low=1)
    lr: float = param(1e-4, "Peak learning rate of the weights; it falls linearly", low=0)
    router_lr: float = param(1e-3, "Peak learning rate of the routers", low=0)
    grow: float = param(0.25, "Of the training, in which routing sets in", low=0, high=1)
    choose: float = param(
        0.5, "Of the training, after which the most used heads are the only ones", low=0, high=1
    )

    @property
    def routed(self) -> Routed:
        """How heads are routed while the model is trained."""
        return Routed(self.epochs, self.batch, self.lr, self.router_lr, self.grow, self.choose)

    def plan(self, model: ModelView, budget: WeightBudget) -> list[StructureEdit]:
        """The most used head of each group in every block."""
        found = [block.units["heads"] for block in model.blocks]
        total = sum(block.parameters for block in model.blocks)
        left = self.left([unit.count for unit in found], found[0].cost, total, budget.sparsity)
        edits = []
        for block, unit, groups in zip(model.blocks, found, left, strict=True):
            if groups < unit.count:
                stays, _ = top_of_groups(unit.usage, groups_of(unit.count, groups).to(unit.usage.device))
                edits.append(StructureEdit(block.index, keep={"heads": stays.nonzero().flatten()}))
        return edits

    def left(self, counts: Sequence[int], cost: int, total: int, sparsity: float) -> list[int]:
        """How many heads each block keeps, of `counts`: they go one by one where most are left, deep blocks first.

        Args:
            counts: heads of every block.
            cost: weights of one.
            total: prunable weights of the model.
            sparsity: of them.

        Raises:
            BudgetError: more than all but one of every block, or not even one.
        """
        check_reach(sparsity, (sum(counts) - len(counts)) * cost / total, "a head of every block")
        gone, left = round(sparsity * total / cost), list(counts)
        if sparsity and not gone:
            raise BudgetError(
                f"--sparsity {sparsity:g} rounds to no head at all; one is {cost / total:.2g} of the weights",
                cost / total,
            )
        for _ in range(min(gone, sum(counts) - len(counts))):
            place = max(range(len(left)), key=lambda block: (left[block], block))
            left[place] -= 1
        return left
