"""How a budget is shared out among the matrices of a model, beside any scorer: `--allocate NAME[:SETTING=VALUE,…]`.

An allocation looks at the dense model once, before anything is pruned, and says what fraction each matrix loses; which
weights these are, and whether every row loses as many, is the method's business.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import ClassVar

from tprune.core.allocate import erk, fill_by_score, smallest_of_all, spread_by_outliers
from tprune.errors import UserError
from tprune.methods.base import Method, Paper, param
from tprune.methods.choice import chosen
from tprune.methods.llm_weights._tamp import PAPER
from tprune.methods.weight_view import LinearView
from tprune.methods.weights import WeightMethod

Views = Callable[[], Iterable[LinearView]]
"""Gives all matrices of the dense model in order, with the statistics that were asked for, at every call."""


@dataclass(frozen=True)
class Allocation(Method):
    """A rule that shares a budget out."""

    reads_scores: ClassVar[bool] = False
    """Whether the method's own scores are compared."""
    stats: ClassVar[tuple[str, ...]] = ()
    """What is gathered at the inputs of the dense model for the rule itself."""

    def sparsities(self, views: Views, method: WeightMethod, sparsity: float) -> list[float]:
        """The fraction that each matrix loses, in the order of `views`; `sparsity` of them together."""
        raise NotImplementedError

    def needs(self, method: WeightMethod) -> tuple[str, ...]:
        """The statistics to gather.

        Raises:
            UserError: the scores of `method` are asked for, and it has none.
        """
        if not self.reads_scores:
            return self.stats
        if type(method).score is WeightMethod.score:
            raise UserError(
                f"--allocate {self.id}: {method.id} has no scores that are comparable between layers; use "
                f"{' or '.join(name for name, kind in ALLOCATIONS.items() if not kind.reads_scores)}"
            )
        return method.stats


@dataclass(frozen=True)
class Global(Allocation):
    """One threshold for the scores of all matrices, as magnitude pruning has it: each loses what falls below."""

    id = "global"
    paper = Paper(
        title="Learning both Weights and Connections for Efficient Neural Networks",
        venue="NeurIPS",
        year=2015,
        arxiv="1506.02626",
    )
    reads_scores = True

    def sparsities(self, views: Views, method: WeightMethod, sparsity: float) -> list[float]:
        """The shares of the smallest scores of all."""
        sizes = [view.weight.numel() for view in views()]
        counts = smallest_of_all(lambda: map(method.score, views()), round(sparsity * sum(sizes)))
        return [count / size for count, size in zip(counts, sizes, strict=True)]


@dataclass(frozen=True)
class PerBlock(Allocation):
    """One threshold for the scores of each block's matrices, which together lose as much as any other block's.

    GAPrune's strategy "uniform" (`gaprune`), for any scores.
    """

    id = "block"
    reads_scores = True

    def sparsities(self, views: Views, method: WeightMethod, sparsity: float) -> list[float]:
        """The shares of the smallest scores of each block, whose scores are held together."""
        found: list[float] = []
        for _, block in groupby(views(), key=lambda view: view.block):
            scores = [method.score(view) for view in block]
            sizes = [score.numel() for score in scores]
            counts = smallest_of_all(partial(iter, scores), round(sparsity * sum(sizes)))
            found += [count / size for count, size in zip(counts, sizes, strict=True)]
        return found


@dataclass(frozen=True)
class Owl(Allocation):
    """Outlier weighed layerwise sparsity: blocks with more outlying scores |W| · ‖X‖ lose less."""

    id = "owl"
    paper = Paper(
        title="Outlier Weighed Layerwise Sparsity (OWL): A Missing Secret Sauce for Pruning LLMs to High Sparsity",
        venue="ICML",
        year=2024,
        arxiv="2310.05175",
        code="luuyin/OWL",
        checked="code",
    )
    stats = ("norm",)

    factor: float = param(5.0, "M: an outlier is more than so many times the block's mean", low=0)
    spread: float = param(
        0.08, "λ: how far blocks may be from the mean sparsity, were outliers even", low=0, high=1
    )

    def sparsities(self, views: Views, method: WeightMethod, sparsity: float) -> list[float]:
        """One sparsity per block, by its share of outliers."""
        weights: dict[int, int] = {}
        sums: dict[int, float] = {}
        for view in views():
            weights[view.block] = weights.get(view.block, 0) + view.weight.numel()
            sums[view.block] = (
                sums.get(view.block, 0.0) + (view.weight.abs() @ view.norm).double().sum().item()
            )
        outliers = dict.fromkeys(weights, 0)
        for view in views():
            mean = sums[view.block] / weights[view.block]
            outliers[view.block] += int((view.weight.abs() * view.norm > self.factor * mean).sum())
        shares = [outliers[block] / weights[block] for block in weights]
        found = dict(zip(weights, spread_by_outliers(shares, sparsity, self.spread), strict=True))
        return [found[view.block] for view in views()]


@dataclass(frozen=True)
class Erk(Allocation):
    """The Erdős–Rényi kernel rule: large matrices lose more."""

    id = "erk"
    paper = Paper(
        title="Rigging the Lottery: Making All Tickets Winners", venue="ICML", year=2020, arxiv="1911.11134"
    )

    def sparsities(self, views: Views, method: WeightMethod, sparsity: float) -> list[float]:
        """By the matrices' shapes alone."""
        return erk([tuple(view.weight.shape) for view in views()], sparsity)


@dataclass(frozen=True)
class TampDas(Allocation):
    """Diversity-aware sparsity of TAMP: matrices whose outputs differ more from token to token lose less."""

    id = "tamp-das"
    paper = replace(
        PAPER,
        notes="Where calibration is on text there are no visual tokens: of the three terms, within images, within text "
        "and between them, the one within text is left.",
    )
    stats = ("likeness",)

    reach: float = param(0.1, "How far the sparsity of a matrix may be above that asked for", low=0, high=1)

    def sparsities(self, views: Views, method: WeightMethod, sparsity: float) -> list[float]:
        """Weights kept in proportion to |Σ (1 - the mean likeness of two tokens' outputs)|, whatever the size.

        The sum is over pairs within images, within text, and of both.
        """
        found = [(abs(sum(1 - term for term in view.likeness)), view.weight.numel()) for view in views()]
        scores, sizes = zip(*found, strict=True)
        return fill_by_score(scores, sizes, sparsity, min(sparsity + self.reach, 1.0))


ALLOCATIONS: dict[str, type[Allocation]] = {kind.id: kind for kind in (Global, PerBlock, Owl, Erk, TampDas)}


def parse(text: str) -> Allocation | None:
    """The allocation that `--allocate` names, "owl" or "owl:factor=7,spread=0.1"; None for "uniform".

    Raises:
        UserError: an unknown name or setting.
    """
    return chosen("--allocate", text, ALLOCATIONS, neutral="uniform")
