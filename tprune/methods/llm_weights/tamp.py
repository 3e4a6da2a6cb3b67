"""TAMP: Wanda with norms over the tokens that stand for a prompt of images and text, for every matrix its own.

Hundreds of patches that look alike drown the text in a plain norm. A token counts where the last one attends to it, or
to tokens whose outputs are alike; what is picked takes worth from its neighbours, until the picked tokens' outputs are
distributed as all are. The paper's sparsity by diversity is `--allocate tamp-das`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tprune.core import cosine
from tprune.core.adaptive import likenesses, representative
from tprune.core.weights import WeightEdit
from tprune.methods.base import param
from tprune.methods.llm_weights._scores import lowest
from tprune.methods.llm_weights._tamp import PAPER
from tprune.methods.selective import SelectiveMethod
from tprune.methods.weight_view import LinearView
from tprune.methods.weights import WeightBudget


@dataclass(frozen=True)
class Tamp(SelectiveMethod):
    """|W| · ‖X of the tokens that count‖, compared per output."""

    paper = replace(
        PAPER,
        notes="Adaptive multimodal input activation; the paper runs it with --allocate tamp-das. The released script "
        "names this choice of tokens 'amia' but works the attention out only where the name has 'attention' in it: it "
        "is always worked out here. Of a prompt without images the density is that of its text.",
    )
    kind = "calibrated"

    near: int = param(3, "Neighbours of a token, by their outputs", low=1)
    decay: float = param(
        0.2, "How fast what a pick takes from its neighbours falls with their distance", low=0
    )
    tolerance: float = param(0.1, "Picking ends below so much of √(1 - density)", low=0)

    def select(self, outputs: Tensor, attention: Tensor, visual: Tensor | None) -> Tensor:
        """The tokens that stand for all."""
        alike = cosine.among(outputs, eps=1e-12)
        density = likenesses(alike, visual).nanmean(1)
        bound = self.tolerance * (1 - density).clamp_min(0).sqrt()
        return representative(alike, attention, bound, self.near, self.decay)

    def score(self, linear: LinearView) -> Tensor:
        """The magnitude of every weight times the norm of its input over the tokens that count."""
        return linear.weight.abs().mul_(linear.norm)

    def prune(self, linear: LinearView, budget: WeightBudget, generator: torch.Generator) -> WeightEdit:
        """Remove what scores lowest in every row."""
        return lowest(self.score(linear), budget, "row", False)
