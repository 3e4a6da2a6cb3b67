"""DarwinLM: heads and channels go by Optimal Brain Surgeon, how many where is found by evolution that trains.

Every site is pruned to several levels beforehand, with the rest updated. A search exchanges levels between sites; what
a candidate is worth shows after it was trained for a moment, for some models recover where others do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tprune.core.units import damped_gram, remove_greedily
from tprune.methods.base import Paper, param
from tprune.methods.levels import LevelMethod
from tprune.methods.weight_view import UnitView


@dataclass(frozen=True)
class DarwinLM(LevelMethod):
    """One round of training-aware evolution over levels of about an eighth."""

    paper = Paper(
        title="DarwinLM: Evolutionary Structured Pruning of Large Language Models",
        venue="arXiv",
        year=2025,
        arxiv="2502.07780",
        code="IST-DASLab/DarwinLM",
        checked="code",
        notes="Database and divergence are checked; the search follows the code with random numbers of its own, and "
        "trains candidates on the calibration sequences, all of them where more is asked, where theirs have others. "
        "Levels are equal steps around the budget, where the authors list counts; what does not divide is spread over "
        "the blocks. Under grouped queries a unit is a key-value group, where theirs is a query head and keys and "
        "values stay. A candidate is trained as it is sliced, where in theirs the zeros may move. The training after "
        "the search, on 10 billion tokens, is --recover full.",
    )
    kind = "calibrated"
    propagate = "dense"

    share: float = param(0.125, "Of a site's units between two levels, about", low=1e-3, high=1)
    damp: float = param(0.01, "Of the mean of the Gram matrix's diagonal, added to it", low=0)
    generations: int = param(200, "Of the search", low=0)
    offspring: int = param(16, "Per generation", low=1)
    survivors: tuple[int, ...] = param((8, 4, 2, 1), "Of every stage of a generation", low=1)
    tokens: tuple[int, ...] = param(
        (1024, 2048, 4096, 8192), "That the divergence is taken on, per stage", low=2
    )
    training: tuple[int, ...] = param(
        (10_000, 50_000, 100_000, 200_000),
        "Tokens that every candidate is trained on before, per stage; 0 for none",
        low=0,
    )
    rate: float = param(1e-5, "Learning rate of that training", low=0)

    def step(self, kind: str, count: int, gone: float, turn: int) -> int:
        """A whole part of what shall go, so that the dense site is a level too, or what rounding leaves of it."""
        levels = max(1, round(gone / (self.share * count)))
        return max(1, int(gone) // levels)

    def versions(self, unit: UnitView, gone: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """One unit after the other goes."""
        gram = damped_gram(unit.gram, self.damp)
        weight = unit.weight.masked_fill(unit.gram.diagonal() == 0, 0.0)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
        return list(remove_greedily(weight, inverse, unit.width, gone))
