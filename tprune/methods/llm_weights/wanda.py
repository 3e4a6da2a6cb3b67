"""Wanda: remove the weights whose magnitude times the norm of their input is smallest, in every output row.

A weight on a quiet input matters less than one on a loud input; with that one factor, one forward pass and no
update, magnitude pruning works on language models.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tprune.core.weights import WeightEdit
from tprune.methods.base import Paper, param
from tprune.methods.llm_weights._scores import lowest
from tprune.methods.weight_view import LinearView
from tprune.methods.weights import WeightBudget, WeightMethod


@dataclass(frozen=True)
class Wanda(WeightMethod):
    """|W| · ‖X‖, compared per output."""

    paper = Paper(
        title="A Simple and Effective Pruning Approach for Large Language Models",
        venue="ICLR",
        year=2024,
        arxiv="2306.11695",
        code="locuslab/wanda",
        checked="code",
    )
    kind = "calibrated"
    stats = ("norm",)

    group: str = param(
        "row", "What is compared: every output row, or the whole layer", choices=("row", "layer")
    )
    variant: bool = param(
        False, "Let rows lose different numbers, by a share of their summed scores (appendix)"
    )

    def score(self, linear: LinearView) -> Tensor:
        """The magnitude of every weight times the norm of its input over all calibration tokens."""
        return linear.weight.abs().mul_(linear.norm)

    def prune(self, linear: LinearView, budget: WeightBudget, generator: torch.Generator) -> WeightEdit:
        """Remove what scores lowest in every row."""
        return lowest(self.score(linear), budget, self.group, self.variant)
