"""Bonsai: what a unit is worth is estimated from how well random sub-models do, by forward passes alone.

A prior from the activations says which units may go at all; of these, random ones are switched off in all blocks at
once, and a linear regression of the perplexity on what was on gives every one its share.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tprune.core.regress import Lasso
from tprune.core.weights import HALF_OF, StructureEdit
from tprune.methods.base import Paper, param
from tprune.methods.llm_weights._width import check_reach
from tprune.methods.weight_view import BlockView, ModelView, Place, UnitView
from tprune.methods.weights import WeightBudget, WeightMethod

WORST = 1e8
"""What a perplexity counts at most."""
TOGETHER = 20
"""So many sub-models are asked for at a time; between, a search can stop."""


@dataclass(frozen=True)
class Bonsai(WeightMethod):
    """Heads and channels of all blocks together, in rounds of a small part of the model."""

    paper = Paper(
        title="Everybody Prune Now: Structured Pruning of LLMs with only Forward Passes",
        venue="arXiv",
        year=2024,
        arxiv="2402.05406",
        code="ldery/Bonsai",
        checked="code",
        notes="The prior's mean square is over all tokens, the code's root over those of a batch. Their search stops "
        "within 2% of the target, here the last round takes what is left of the budget, short of it by less than the "
        "next unit. Under grouped queries a unit is a key-value group. All rounds see the same sequences, theirs draw "
        "new ones. Their LoRA under a distillation loss is --recover lora, without the distillation.",
    )
    kind = "calibrated"
    scope = "model"
    measures = True
    stats = ("norm",)
    units = ("heads", "channels")
    propagate = "dense"
    uniform = False
    patterns = False

    fraction: float = param(0.05, "Share of the model's weights that goes in one round", low=1e-6, high=1)
    masks: int = param(200, "Sub-models that are measured in a round", low=2)
    attention_ratio: float = param(
        1.0, "Share of heads beside that of channels that is switched off", low=1e-3
    )
    prior: str = param("wanda", "wanda: |weight| x activation; none: all alike", choices=("wanda", "none"))
    batches: tuple[int, ...] = param((32, 64, 128), "Points per step that the regression tries", low=1)
    epochs: int = param(50, "Of the regression, at most", low=1)

    def plan(self, model: ModelView, budget: WeightBudget) -> list[StructureEdit]:
        """Rounds until the unit that is worth least does not fit what is left of the budget."""
        total = sum(block.parameters for block in model.blocks)
        units = {(block.index, kind): unit for block in model.blocks for kind, unit in block.units.items()}
        check_reach(
            budget.sparsity, sum(unit.cost * unit.count for unit in units.values()) / total, "what is no unit"
        )
        generator = torch.Generator().manual_seed(model.seed)
        alive = {place: torch.arange(unit.count) for place, unit in units.items()}
        left, blocks = round(budget.sparsity * total), model.blocks
        costs = [unit.cost for unit in units.values()]
        part = max(round(self.fraction * total), *costs)
        while left >= min(costs):
            gone = self.round(model, blocks, alive, min(part, left), generator)
            if not gone:
                break
            for place, lost in gone.items():
                alive[place] = alive[place][~torch.isin(alive[place], lost)]
                left -= len(lost) * units[place].cost
            if left >= min(costs):
                blocks = model.seen_with(edits(alive, units))
        return [without_empty_halves(edit) for edit in edits(alive, units)]

    def round(
        self,
        model: ModelView,
        blocks: list[BlockView],
        alive: dict[Place, Tensor],
        allowed: int,
        generator: torch.Generator,
    ) -> dict[Place, Tensor]:
        """The units that go, at most `allowed` weights, by place; places that lose none are left out."""
        units = {(block.index, kind): unit for block in blocks for kind, unit in block.units.items()}
        share = allowed / sum(block.parameters for block in blocks)
        candidates, off = {}, {}
        for place, unit in units.items():
            if len(alive[place]):
                part = share * (self.attention_ratio if unit.kind == "heads" else 1.0)
                candidates[place], chance = self.candidates(unit, alive[place], part)
                count = int(part * len(alive[place])) + 1
                off[place] = pairs(chance, count, self.masks // 2, generator)
        losses = torch.cat(
            [
                model.losses_with((), list(sub_models(units, alive, candidates, off, part)))
                for part in torch.arange(2 * (self.masks // 2)).split(TOGETHER)
            ]
        )
        on = torch.cat([~mask for mask in off.values()], 1)
        perplexity = losses.exp().nan_to_num(WORST).clamp_max(WORST)
        worth = Lasso(batches=self.batches, epochs=self.epochs).fit(on, -perplexity, generator)
        cost = torch.cat(
            [torch.full((len(found),), units[place].cost) for place, found in candidates.items()]
        )
        order = worth.argsort(stable=True)
        goes = torch.zeros(len(worth), dtype=torch.bool)
        goes[order] = cost[order].cumsum(0) <= allowed
        parts = goes.split([len(found) for found in candidates.values()])
        found = {place: candidates[place][part] for place, part in zip(candidates, parts, strict=True)}
        return {place: lost for place, lost in found.items() if len(lost)}

    def candidates(self, unit: UnitView, alive: Tensor, share: float) -> tuple[Tensor, Tensor]:
        """Of the units `alive` those of the lowest prior, twice as many as may go, and how likely each is switched off.

        Returns:
            Indices [C], the highest prior first, and weights [C], which sum to 1.
        """
        prior = self.score(unit)[alive]
        order = prior.argsort(descending=True, stable=True)[max(0, int(len(alive) * (1 - 2 * share))) :]
        chance = (prior.max() - prior)[order].double()
        if not bool(chance.sum() > 0):
            chance = torch.ones_like(chance)
        return alive[order], chance / chance.sum()

    def score(self, unit: UnitView) -> Tensor:
        """The prior of every unit, [U], on the CPU: the mean of |w| · ‖z‖ over outputs and its inputs."""
        if self.prior == "none":
            return torch.ones(unit.count)
        return (unit.weight.abs().mean(0) * unit.norm).view(-1, unit.width).mean(1).cpu()


def pairs(chance: Tensor, count: int, number: int, generator: torch.Generator) -> Tensor:
    """Which candidates are switched off: `number` draws of `count` without replacement, each before its complement.

    Args:
        chance: [C]; what has none is never drawn.

    Returns:
        bool [2 · number, C].
    """
    count = min(count, int((chance > 0).sum()))
    drawn = torch.multinomial(chance.expand(number, -1), count, generator=generator)
    off = torch.zeros(number, len(chance), dtype=torch.bool).scatter(1, drawn, True)
    return torch.stack([off, ~off], 1).flatten(0, 1)


def sub_models(
    units: dict[Place, UnitView],
    alive: dict[Place, Tensor],
    candidates: dict[Place, Tensor],
    off: dict[Place, Tensor],
    rows: Tensor,
) -> Iterator[list[StructureEdit]]:
    """The edits of the sub-models `rows`: what is alive and not switched off."""
    for row in rows.tolist():
        stays = {
            place: alive[place][~torch.isin(alive[place], found[off[place][row]])]
            for place, found in candidates.items()
        }
        yield edits(alive | stays, units)


def edits(alive: dict[Place, Tensor], units: dict[Place, UnitView]) -> list[StructureEdit]:
    """An edit per block that has lost units, also all of them."""
    found: dict[int, StructureEdit] = {}
    for (index, kind), stays in alive.items():
        if len(stays) < units[index, kind].count:
            found.setdefault(index, StructureEdit(index)).keep[kind] = stays
    return list(found.values())


def without_empty_halves(edit: StructureEdit) -> StructureEdit:
    """Where no unit is left, the half of the block goes."""
    keep = {kind: stays for kind, stays in edit.keep.items() if len(stays)}
    halves = tuple(HALF_OF[kind] for kind in edit.keep if kind not in keep)
    return replace(edit, halves=halves, keep=keep)
