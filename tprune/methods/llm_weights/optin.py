"""OPTIN: rank the heads and channels of a tuned encoder by how far it strays without each of them.

With one unit switched off, all later layers see something else: how much that changes the likeness of tokens to each
other in them, and at last the answers, is what the unit is worth.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from tprune.core.allocate import two_lists
from tprune.core.divergence import divergence
from tprune.core.trajectory import balanced, relations_changed
from tprune.core.weights import StructureEdit
from tprune.methods.base import Paper, param
from tprune.methods.llm_weights._width import check_reach, keep_marked
from tprune.methods.weight_view import BlockView, ModelView, Trajectory
from tprune.methods.weights import WeightBudget, WeightMethod

RAMP = {"heads": 10.0, "channels": 100.0}
"""How much more the first unit of a block counts than the last one in the authors' code."""


@dataclass(frozen=True)
class OPTIN(WeightMethod):
    """Heads and channels by the error of the trajectory and of the answers, once, without tuning."""

    paper = Paper(
        title="The Need for Speed: Pruning Transformers with One Recipe",
        venue="ICLR",
        year=2024,
        arxiv="2403.17921",
        code="Skhaki18/optin-transformer-pruning",
        checked="code",
        notes="The code also weighs the units of a block by their index, and leaves the last head of every block "
        "behind it switched off while heads of later ones are looked at; official=true does so. The budget and the "
        "cost of a unit are weights, not MACs; every block keeps one unit of each kind. The tokens whose likeness is "
        "compared are drawn once, theirs anew for every unit. A model without classes is ranked by its trajectory "
        "alone. Patches of images and convolutions are left out.",
    )
    kind = "calibrated"
    scope = "model"
    measures = True
    units = ("heads", "channels")
    runs_on = ("encoder",)
    uniform = False
    patterns = False

    temperature: float = param(4.0, "Of the answers; its square multiplies their divergence", low=0)
    ratio: float = param(10.0, "How much larger than the answers' error the trajectory's is made", low=1e-6)
    tokens: int = param(768, "Tokens whose likeness to each other is compared", low=2)
    heads: float = param(0.5, "How much heads count beside channels", low=0)
    last: float = param(0.5, "How much units of the last block count beside others", low=0)
    official: bool = param(False, "Rank as the authors' code does, which prefers units of low index")

    def plan(self, model: ModelView, budget: WeightBudget) -> list[StructureEdit]:
        """Rank the heads of all blocks, then the channels, and split the budget so that the kept ones score most."""
        if budget.sparsity == 0:
            return []
        costs = [model.blocks[0].units[kind].cost for kind in self.units]
        total = sum(block.parameters for block in model.blocks)
        least = sum(costs) * len(model.blocks)
        check_reach(budget.sparsity, 1 - least / total)
        scores = {
            (block.index, kind): score
            for kind in self.units
            for block, score in zip(model.blocks, self.scores(model, kind), strict=True)
        }
        lists = [ranked([scores[block.index, kind] for block in model.blocks]) for kind in self.units]
        counts = two_lists(
            *(score for score, _ in lists), costs, (1 - budget.sparsity) * total, len(model.blocks)
        )
        keep = [
            torch.zeros(len(order), dtype=torch.bool).index_fill_(0, order[:count], True)
            for (_, order), count in zip(lists, counts, strict=True)
        ]
        return keep_marked(scores, torch.cat(keep))

    def scores(self, model: ModelView, kind: str) -> list[Tensor]:
        """Of every block, what its units of a kind are worth: float64 [U]."""
        counts = [block.units[kind].count for block in model.blocks]
        errors = [
            model.strayed_with(
                self.candidates(model.blocks, place, kind), partial(self.errors, block.index, model.seed)
            )
            for place, block in enumerate(model.blocks)
        ]
        found = list(balanced(*torch.cat(errors).unbind(1), self.ratio).split(counts))
        found[-1] = found[-1] * self.last
        weight = self.heads if kind == "heads" else 1.0
        return [score * weight * self.ramp(kind, len(score)) for score in found]

    def candidates(self, blocks: list[BlockView], place: int, kind: str) -> list[list[StructureEdit]]:
        """The model without each unit of a kind of the block at `place`, in turn."""
        before = []
        if self.official and kind == "heads":
            before = [
                StructureEdit(block.index, keep={kind: torch.arange(block.units[kind].count - 1)})
                for block in blocks[:place]
            ]
        every = torch.arange(blocks[place].units[kind].count)
        return [
            [*before, StructureEdit(blocks[place].index, keep={kind: every[every != unit]})] for unit in every
        ]

    def errors(self, block: int, seed: int, dense: Trajectory, found: Trajectory) -> Tensor:
        """The errors of the trajectory behind `block` (in the last block, of its own part of it) and of the answers,
        [2].
        """
        behind = [index for index in found.features if index > block] or [block]
        count, device = len(dense.features[block]), dense.features[block].device
        drawn = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[: self.tokens].to(device)
        way = sum(relations_changed(dense.features[one][drawn], found.features[one][drawn]) for one in behind)
        if dense.answers is None:
            return torch.stack([way, torch.zeros_like(way)])
        answers = divergence(dense.answers, found.answers).sum().clamp_min(0) * self.temperature**2
        return torch.stack([way, answers])

    def ramp(self, kind: str, count: int) -> Tensor:
        """What the index of a unit adds to its worth in the authors' code: float64 [count]."""
        if not self.official:
            return torch.ones(count, dtype=torch.float64)
        return torch.logspace(0, 1, count, base=RAMP[kind], dtype=torch.float64).flip(0)


def ranked(scores: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The scores of the units of all blocks in the order in which they are kept, and where they were, int64: the best
    of every block, then the others.
    """
    pooled = torch.cat(scores)
    best = torch.cat([one_hot(score.argmax(), len(score)) for score in scores]).bool()
    order = pooled.masked_fill(best, torch.inf).argsort(descending=True, stable=True)
    return pooled[order], order
