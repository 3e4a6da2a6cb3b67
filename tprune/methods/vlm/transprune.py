"""TransPrune keeps the image tokens that the layers change: transitions of a token tell of its meaning.

Over a few middle layers, how far attention and MLP turn and stretch each token is summed up; the attention that the
instruction would pay joins it, and tokens leave in three steps.
"""

from __future__ import annotations

from dataclasses import dataclass

from tprune.core import score, select
from tprune.core.budget import Site, Stage, exponent, scale_layer, staircase
from tprune.core.reduction import Reduction
from tprune.methods.base import Paper, param
from tprune.methods.tokens import TokenMethod


@dataclass(frozen=True)
class TransPrune(TokenMethod):
    """Token transition variation plus instruction-guided attention, each normalised over the image tokens."""

    paper = Paper(
        title="TransPrune: Token Transition Pruning for Efficient Large Vision-Language Model",
        venue="CVPR",
        year=2026,
        arxiv="2507.20630",
        code="liaolea/TransPrune",
        checked="code",
        notes="Transitions are normalised over each row's real tokens; the authors' sum runs over the batch, which "
        "is one. --keep raises the ratios to one power.",
    )
    reads = ("sublayers",)
    positions = "compact"
    native = ("ratios",)

    layers: tuple[int, ...] = param((7, 9, 12), "image tokens leave before these layers, of 32", low=1)
    ratios: tuple[float, ...] = param(
        (0.875, 0.625, 0.125), "fraction of the image tokens left after each", low=0, high=1
    )
    first: int = param(7, "transitions are summed from the layer before this one on, of 32", low=1)
    attention: bool = param(True, "whether the instruction's attention counts too")

    def stages(self, shape, knob):
        """int(r · V) left at each of the layers; in between the method looks on."""
        self.check_pairs("layers", "ratios")
        power = 1.0 if knob is None else exponent(knob)
        counts = [int(shape.tokens * ratio**power) for ratio in self.ratios]
        if knob is not None:
            counts = [max(1, count) for count in counts]
        stages = {stage.site.layer: stage for stage in staircase(self.layers, counts, 32, shape.depth)}
        alive = shape.tokens
        for layer in range(max(1, scale_layer(self.first, 32, shape.depth)), max(stages)):
            alive = stages.setdefault(layer, Stage(Site(layer), alive)).count
        return list(stages.values())

    def reduce(self, site, view, count, memory):
        """Add up the transitions of the layer before; where tokens leave, keep the best."""
        real = view.real if view.real is not None else view.prunable | True
        for entering, leaving in view.signal("sublayers"):
            memory["total"] = memory.get("total", 0) + score.transition(entering, leaving, real)
        if site.layer not in {max(1, scale_layer(layer, 32, view.depth)) for layer in self.layers}:
            return None
        worth = self.share(memory["total"], view)
        if self.attention:
            paid = view.signal("next_attention")
            rows, said = select.places(view.text)
            worth = worth + self.share(score.mean_rows(paid.rows(rows), said), view)
        index, valid = select.keep_prunable_top(worth, count, view.prunable)
        reduction = Reduction.keep(index, view.hidden.shape[1], valid)
        memory["total"] = reduction.gather(memory["total"])
        return reduction

    def share(self, amount, view):
        """`amount` [B, N] of the image tokens over their sum, 0 elsewhere."""
        amount = amount * view.prunable
        return amount / (amount.sum(1, keepdim=True) + 1e-8)
