"""Týr-the-Pruner: how sparse each block shall be is searched among locally pruned versions, coarse, then ever finer.

A round prunes every site to levels around what the last round found, lets later blocks see what the earlier ones will
be, and searches the levels by the divergence of the likeliest tokens; then the distance of the levels is halved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from tprune.core.units import damped_gram, remove_in_rounds
from tprune.methods.base import Paper, param
from tprune.methods.levels import LevelMethod
from tprune.methods.weight_view import UnitView


@dataclass(frozen=True)
class Tyr(LevelMethod):
    """Four rounds of evolution over nine levels each."""

    paper = Paper(
        title="Týr-the-Pruner: Structural Pruning LLMs via Global Sparsity Distribution Optimization",
        venue="NeurIPS",
        year=2025,
        arxiv="2503.09657",
        code="AMD-AGI/Tyr-the-Pruner",
        checked="code",
        notes="Local pruning and divergence are checked; the search's random numbers are our own. What feeds the next "
        "block is the version the round starts from, which their code means, but a variable that is reset leaves it "
        "dense; the paper has the mean over versions. Under grouped queries a unit is a key-value group, where the "
        "code's are query heads. What does not divide is spread over the blocks.",
    )
    kind = "calibrated"
    propagate = "pruned"
    reach = 4
    exchanges = 4

    rounds: int = param(4, "How often versions are made and searched, ever finer", low=1)
    share: float = param(0.125, "Of a site's units between two levels of the first round", low=1e-3, high=1)
    least: int = param(32, "So many channels are between two levels at least", low=1)
    damp: float = param(0.01, "Of the mean of the Gram matrix's diagonal, added to it", low=0)
    score: str = param(
        "code", "code: with its second term; obs: the loss's change alone", choices=("code", "obs")
    )
    channel_rounds: int = param(16, "In so many rounds the channels of a site go", low=1)
    head_rounds: int = param(1, "In so many rounds its heads go", low=1)
    top: int = param(8192, "Tokens that the divergence looks at, the dense model's likeliest", low=1)
    generations: int = param(50, "Of the search, in every round", low=0)
    offspring: int = param(128, "Per generation", low=1)
    survivors: tuple[int, ...] = param((16, 4, 1), "Of every stage of a generation", low=1)
    tokens: tuple[int, ...] = param(
        (2048, 16_384, 131_072), "That the divergence is taken on, per stage", low=2
    )

    def step(self, kind: str, count: int, gone: float, turn: int) -> int:
        """Half of the round before's, down to one head and `least` channels."""
        return max(self.least if kind == "channels" else 1, round(count * self.share / 2**turn))

    def versions(self, unit: UnitView, gone: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """Each version is made of the dense site."""
        gram = damped_gram(unit.gram, self.damp)
        weight = unit.weight.masked_fill(unit.gram.diagonal() == 0, 0.0)
        rounds = self.channel_rounds if unit.kind == "channels" else self.head_rounds
        return list(remove_in_rounds(weight, gram, unit.width, gone, rounds, self.score == "code"))
