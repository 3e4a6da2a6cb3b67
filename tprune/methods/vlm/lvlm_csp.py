"""LVLM_CSP: first a coarse look at the image, then a fine one, then only what the answer needs.

In the first layers a few image tokens stand for all (clustering), in the middle ones all take part (scattering), and in
the last ones those that the last token attends to most (pruning). No position is lost, for masks that come of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tprune.core import select
from tprune.core.budget import Site, Stage, exponent, scale_layer
from tprune.core.reduction import Reduction
from tprune.errors import UserError
from tprune.methods.base import Paper, param
from tprune.methods.tokens import TokenMethod


@dataclass(frozen=True)
class LvlmCsp(TokenMethod):
    """Every n-th image token before layer a, all of them up to layer b, the best from there on."""

    paper = Paper(
        title="LVLM_CSP: Accelerating Large Vision Language Models via Clustering, Scattering, and Pruning for "
        "Reasoning Segmentation",
        venue="ACM MM",
        year=2025,
        arxiv="2504.10854",
        checked="abstract",
        notes="Neither code nor full text was at hand. The three blocks are the paper's; their borders and counts are "
        "ours, chosen so that the mean is the abstract's 35% of the tokens. Representatives are every n-th token; the "
        "others come back as they left; the last prompt token stands for [SEG]. The middle block sets the floor.",
    )
    native = ("clustered", "pruned")

    layers: tuple[int, ...] = param(
        (8, 16), "a, b: where all come back, and where most leave, of 32", low=1, length=2
    )
    clustered: float = param(0.2, "fraction of the image tokens that take part before a", low=0, high=1)
    pruned: float = param(0.1, "fraction of them that is left from b on", low=0, high=1)

    def check(self, shape):
        """Three blocks of layers."""
        super().check(shape)
        if shape.depth < 3:
            raise UserError(f"lvlm-csp divides the decoder in three, and this one has {shape.depth} layers")

    def borders(self, depth):
        """The layers a and b."""
        first, second = (scale_layer(layer, 32, depth) for layer in self.layers)
        first = min(max(1, first), depth - 2)
        return first, max(first + 1, second)

    def rejoins(self, shape):
        """Before layer a."""
        return Site(self.borders(shape.depth)[0])

    def stages(self, shape, knob):
        """Few, all, few; with --keep both fractions are raised to one power."""
        power = 1.0 if knob is None else exponent(knob)
        coarse, fine = (max(1, round(shape.tokens * part**power)) for part in (self.clustered, self.pruned))
        first, second = self.borders(shape.depth)
        return [Stage(Site(0), coarse), Stage(Site(first), shape.tokens), Stage(Site(second), fine)]

    def reduce(self, site, view, count, memory):
        """Before layer 0 the tokens i · ⌊V / N_c⌋; before layer b the top of A[last, j] in layer b - 1."""
        if site.layer == 0:
            total = torch.as_tensor(count, device=view.prunable.device).expand(len(view.prunable))
            place = view.prunable.cumsum(1) - 1
            step = view.prunable.sum(1) // total.clamp_min(1)
            score = -(place % step.clamp_min(1).unsqueeze(1)).float()
        else:
            score = view.attention.rows(view.last).mean(1)[:, 0]
        index, valid = select.keep_prunable_top(score, count, view.prunable)
        return Reduction.keep(index, view.hidden.shape[1], valid)
