"""Methods that make a few versions of every site, more and more pruned, and search which one to take where."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING

from tprune.core.levels import spread
from tprune.core.select import floor_count
from tprune.errors import UserError
from tprune.methods.llm_weights._width import check_reach
from tprune.methods.weights import WeightMethod

if TYPE_CHECKING:
    from torch import Tensor

    from tprune.methods.weight_view import BlockView, UnitView


@dataclass(frozen=True)
class LevelMethod(WeightMethod):
    """Heads and channels of every block at several levels, and an evolutionary search over all levels together.

    A level down here is one up there, so that every model the search looks at has the asked size. A generation's
    offspring go through stages, each with more tokens and fewer survivors; before the last one their parent joins.
    What counts is the divergence from the dense model.

    Attributes:
        generations: of the search, in every round.
        offspring: per generation.
        survivors: of every stage of a generation; of the last, one.
        tokens: that the divergence is taken on, per stage.
        training: tokens that every candidate is trained on before, per stage; none: it is not trained.
        rate: learning rate of that training.
        top: how many of the dense model's likeliest tokens the divergence looks at; None for all.
        rounds: how often versions are made and searched, each time around what was found before.
        reach: how many levels there are at most on each side of a round's start; None for all that there are.
        exchanges: how many exchanges make a mutation, at most.
    """

    scope = "model"
    measures = True
    stats = ("gram",)
    units = ("heads", "channels")
    uniform = False
    patterns = False

    training = ()
    rate = 0.0
    top = None
    rounds = 1
    reach = None
    exchanges = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_pairs("survivors", "tokens")
        if self.training:
            self.check_pairs("survivors", "training")
        if self.survivors[-1] != 1:
            raise UserError(f"--set survivors={','.join(map(str, self.survivors))}: expected 1 at the end")

    def stages(self) -> list[tuple[int, int, int]]:
        """Survivors, tokens and training tokens of every stage."""
        training = self.training or (0,) * len(self.survivors)
        return list(zip(self.survivors, self.tokens, training, strict=True))

    def start(self, blocks: Sequence[BlockView], sparsity: float) -> dict[tuple[int, str], int]:
        """How many units go from every site, by block and kind: of both kinds the same share in all blocks.

        What is no whole unit in a block is spread over all, and what rounding leaves of heads goes from channels.
        """
        total = sum(block.parameters for block in blocks)
        costs = {kind: blocks[0].units[kind].cost for kind in blocks[0].units}
        counts = {kind: [block.units[kind].count for block in blocks] for kind in costs}
        whole = {kind: sum(counts[kind]) * cost for kind, cost in costs.items()}
        check_reach(sparsity, sum(whole.values()) / total, "what is no unit")
        share, left, behind, found = sparsity * total / sum(whole.values()), sparsity * total, whole, {}
        for kind, cost in costs.items():
            behind = {other: size for other, size in behind.items() if other != kind}
            if behind:
                # More than the same share where the other kinds have too little for the rest.
                least = ceil((left - sum(behind.values())) / cost)
                number = max(floor_count(sum(counts[kind]), share), least)
            else:
                number = round(left / cost)
            left -= number * cost
            for block, gone in zip(blocks, spread(number, counts[kind]), strict=True):
                found[block.index, kind] = gone
        return found

    def step(self, kind: str, count: int, gone: float, turn: int) -> int:
        """How many of a site's `count` units are between two levels in round `turn`, where about `gone` shall go."""
        raise NotImplementedError

    def versions(self, unit: UnitView, gone: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """A site without so many units, for each of `gone`, ascending, from 1 to U - 1.

        Returns:
            The units that stay, int64 ascending, and the weights of the output projection [out, stay · width].
        """
        raise NotImplementedError
