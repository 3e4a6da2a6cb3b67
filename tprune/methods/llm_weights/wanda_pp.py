"""Wanda++: Wanda's score plus the gradient of a block's own output, and a few steps that bring the block back.

One block is enough of a region to see what a weight does behind its layer, at a fraction of the cost of gradients of
the whole model; the same backward pass then lets the pruned block approach what the dense one said.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tprune.methods.base import Paper, param
from tprune.methods.llm_weights._scores import lowest
from tprune.methods.region import Region, RegionMethod


@dataclass(frozen=True)
class WandaPP(RegionMethod):
    """|W| · (‖X‖ + α · G), compared per output; rounds of pruning and optimisation, and a last pruning."""

    paper = Paper(
        title="Wanda++: Pruning Large Language Models via Regional Gradients",
        venue="ACL Findings",
        year=2025,
        arxiv="2503.04992",
        code=None,
        checked="port",
        notes="The authors' code is not public; checked against github.com/TTTTTTris/wandaplus. There whole inputs go "
        "where no pattern is asked for, and gradients pile up over the steps of a round: here rows are compared, as "
        "in Wanda, and every step has its own gradient.",
    )
    kind = "calibrated"
    stats = ("norm",)

    alpha: float = param(100.0, "Weight of the regional gradients beside the norms of the inputs", low=0)
    rounds: int = param(5, "Rounds of regional optimisation (0: the score alone)", low=0)
    samples: int = param(32, "Calibration sequences drawn for each round, at most all", low=1)
    rate: float = param(3e-7, "Learning rate of RMSprop", low=0)

    def prune_block(self, region: Region, generator: torch.Generator) -> None:
        """Rounds of pruning and steps towards the dense block, then pruning by all sequences, with new gradients."""
        gradients = region.gradients()
        if self.rounds:
            dense = region.outputs()
            optimiser = torch.optim.RMSprop(region.parameters(), lr=self.rate)
            for _ in range(self.rounds):
                drawn = torch.randperm(region.sequences, generator=generator)[: self.samples]
                self._remove(region, gradients, drawn)
                region.approach(dense, drawn, optimiser)
            gradients = region.gradients()
        self._remove(region, gradients)

    def _remove(self, region: Region, gradients: dict[str, Tensor], drawn: Tensor | None = None) -> None:
        """Prune matrix by matrix, each by its inputs behind the pruned ones before it."""
        for linear, budget in region.linears(drawn):
            score = linear.weight.abs() * (linear.norm + self.alpha * gradients[linear.name])
            region.remove(linear, lowest(score, budget, "row", False).mask)
