"""Pruner-Zero: a metric that a genetic programme found, squared weights times min-max scaled gradients.

Of all expressions over weights, gradients and input norms that were tried on LLaMA-2-7B, this short one, without any
activation, gave the lowest perplexity after pruning; `tprune search-metric` looks for one on another model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tprune.core.expression import Expression, parse
from tprune.core.weights import WeightEdit
from tprune.errors import UserError
from tprune.methods.base import Paper, param
from tprune.methods.llm_weights._scores import lowest
from tprune.methods.weight_view import LinearView
from tprune.methods.weights import WeightBudget, WeightMethod

LEAVES = ("W", "G", "X")
"""The magnitudes of the weights; 100 times the norms of their gradients; the mean squared norms of their inputs."""


@dataclass(frozen=True)
class PrunerZero(WeightMethod):
    """A metric over W, G and X, compared per output; the published one is W² · (G - min G) / (max G - min G)."""

    paper = Paper(
        title="Pruner-Zero: Evolving Symbolic Pruning Metric from scratch for Large Language Models",
        venue="ICML",
        year=2024,
        arxiv="2406.02924",
        code="pprp/Pruner-Zero",
        checked="code",
        notes="Gradients are of the calibration text (the code's are of WikiText-2), kept in float32 (the code stores "
        "float16). The code holds no search; tprune search-metric follows the paper's description.",
    )
    kind = "calibrated"

    metric: str = param(
        "mul(abs(mul(W, W)), mms(G))",
        "Over W (magnitudes), G (gradients), X (inputs), by sqr neg abs log exp sqrt tanh mms zsn, add sub mul div",
    )
    group: str = param(
        "row", "What is compared: every output row, or the whole layer", choices=("row", "layer")
    )
    variant: bool = param(
        False, "Let rows lose different numbers, by a share of their summed scores (appendix of Wanda)"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.expression()

    @property
    def stats(self) -> tuple[str, ...]:
        """Gradients, and norms of inputs where the metric reads them."""
        return ("norm", "gradient") if "X" in self.expression().leaves() else ("gradient",)

    def expression(self) -> Expression:
        """The metric.

        Raises:
            UserError: it cannot be read.
        """
        try:
            return parse(self.metric, LEAVES)
        except ValueError as error:
            raise UserError(f"--set metric={self.metric}: {error}") from None

    def score(self, linear: LinearView) -> Tensor:
        """The metric's value, [out, in].

        Raises:
            UserError: it is not finite.
        """
        tensors = {"W": linear.weight.abs(), "G": 100 * linear.gradient}
        if linear.norm is not None:
            tensors["X"] = linear.norm.square().unsqueeze(0) / max(linear.sequences, 1)
        score = self.expression().value(tensors).expand_as(linear.weight).contiguous()
        if not bool(score.isfinite().all()):
            raise UserError(
                f"--set metric={self.metric}: not finite for {linear.name}; choose another metric"
            )
        return score

    def prune(self, linear: LinearView, budget: WeightBudget, generator: torch.Generator) -> WeightEdit:
        """Remove what scores lowest in every row."""
        return lowest(self.score(linear), budget, self.group, self.variant)
