"""Simba: the upper layers of a state-space language model do with few of a prompt's tokens, and so become highways.

What a token is worth is what the last token's output has of it, carried there by the layer's recurrence. Layer by layer
the least are taken out of the sequence, and what goes on to the next layer is what is left.
"""

from __future__ import annotations

from dataclasses import dataclass

from tprune.core.budget import Site, Stage, exponent
from tprune.core.recurrence import shares_of_last
from tprune.core.reduction import Reduction
from tprune.core.select import keep_prunable_top
from tprune.methods.base import Paper, param
from tprune.methods.tokens import TokenMethod


@dataclass(frozen=True)
class Simba(TokenMethod):
    """Token pruning between the layers of Mamba, by their global impact on the last output."""

    paper = Paper(
        title="Sparsified State-Space Models are Efficient Highway Networks",
        venue="arXiv",
        year=2025,
        arxiv="2505.20698",
        code="woominsong/Simba",
        checked="paper",
        notes="The repository holds no code. The last token always stays. --keep raises the fractions of all layers to "
        "one power. Text that follows the prompt passes through all layers in full.",
    )
    reads = ()
    native = ("last",)
    runs_on = ("state-space",)

    last: float = param(
        0.1, "fraction of the prompt in the last layer, to which it falls evenly", low=0, high=1
    )
    absolute: bool = param(
        False, "by the size of what the last output has of a token, and not by its largest rise"
    )

    def stages(self, shape, knob):
        """n_l falls by equal steps from all tokens in the first layer."""
        power = 1.0 if knob is None else exponent(knob)
        fall = (1 - self.last) / max(1, shape.depth - 1)
        return [
            Stage(Site(layer), round(shape.tokens * (1 - fall * layer) ** power))
            for layer in range(1, shape.depth)
        ]

    def reduce(self, site, view, count, memory):
        """s(t) = max over channels of Δy_L(t)."""
        impact = shares_of_last(view.signal("recurrence"))  # [B, E, N]
        impact = impact.abs() if self.absolute else impact
        index, valid = keep_prunable_top(impact.amax(1), count, view.prunable)
        return Reduction.keep(index, view.hidden.shape[1], valid)
