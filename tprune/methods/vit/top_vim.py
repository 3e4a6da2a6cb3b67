"""ToP-ViM drops tokens of a vision state-space model by what its scan gives out for them.

The others keep their order, with the class token in the middle, and the state goes on decaying over the places of those
that have left: it reaches the next token as if they had come without content.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Any, ClassVar

from tprune.core import select
from tprune.core.budget import Site, Stage, scale_layer
from tprune.core.reduction import Reduction
from tprune.methods.base import Paper, param
from tprune.methods.fit import Plan
from tprune.methods.tokens import TokenMethod
from tprune.methods.vit._tuned import Tuned

DEPTH = 24


@dataclass(frozen=True)
class ToPViM(TokenMethod):
    """Clipped outputs of the backward scan as importance, and hidden states that stay aligned."""

    paper = Paper(
        title="Exploring Token Pruning in Vision State Space Models",
        venue="NeurIPS",
        year=2024,
        arxiv="2409.18962",
        code="ZLKong/ToP-ViM",
        checked="code",
        notes="The released code neither clips the scores nor turns the backward scan's into the order of the tokens, "
        "and protects the class token of the first image alone; score=released does the first two. Its alignment "
        "kernel is not public: here a token that has left has the step of one without content, softplus of the "
        "bias. Runs without the paper's fine-tuning; --fit does it, at a constant learning rate. No trained Vim is "
        "built in, so that it is not measured beside random.",
    )
    kind = "trained"
    reads = ()
    native = ("ratio",)
    learns = "optional"
    runs_on = ("state-space",)
    built_in: ClassVar[dict[str, Any]] = {"epochs": 1.0, "batch": 16, "lr": 1e-4}

    layers: tuple[int, ...] = param((5, 10, 15), "blocks, of 24, before which tokens leave", low=1)
    ratio: float = param(0.8, "fraction of the remaining tokens that each of them keeps", low=0, high=1)
    score: str = param(
        "clipped", "as the paper has it, or as the released code", choices=("clipped", "released")
    )
    align: bool = param(True, "let the state decay over the places of tokens that have left")
    epochs: float = param(30.0, "of a fit", low=0)
    batch: int = param(256, "images per step of a fit", low=1)
    lr: float = param(1e-5, "of a fit", low=1e-12)
    weight_decay: float = param(1e-8, "of a fit", low=0)

    def stages(self, shape, knob):
        """ceil(ratio · n), or one less where that is odd: the class token stays in the middle."""
        ratio = self.ratio if knob is None else knob
        stages, alive = [], shape.tokens
        for layer in self.layers:
            kept = ceil(ratio * alive)
            kept = max(2, kept - kept % 2)
            if ratio < 1 and kept < alive:
                alive = kept
                stages.append(Stage(Site(scale_layer(layer, DEPTH, shape.depth)), alive))
        return stages

    def decays(self):
        """With alignment."""
        return self.align

    def reduce(self, site, view, count, memory):
        """The best by what the backward scan gave out, in their order."""
        scanned = view.signal("scan").float()  # [B, E, N]
        if self.score == "clipped":
            worth = scanned.clamp_min(0).mean(1)[:, view.prefix :]
        else:
            worth = scanned.sum(1)[:, view.prefix :].flip(1)
        index = select.with_prefix(select.top(worth, count) + view.prefix, view.prefix)
        return Reduction.keep(index, view.hidden.shape[1])

    def fit(self, shape, keep, seed):
        """The model learns on, pruned as at inference."""
        return Tuned(self, shape, keep, Plan(self.epochs, self.batch, self.lr, 1.0, 0.0, self.weight_decay))
