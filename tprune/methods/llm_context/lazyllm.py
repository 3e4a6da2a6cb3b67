"""LazyLLM: most of a prompt need not pass through the upper layers to make the next token.

At a few layers the attention of the last token, averaged over heads, says which prompt tokens go on; the
others leave the forward pass, and their keys and values are only in the layers below.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tprune.core.budget import Site, Stage, scale_layer
from tprune.core.reduction import Reduction
from tprune.core.select import keep_protected_and_top
from tprune.errors import UserError
from tprune.methods.base import Paper, TokenMethod, param


@dataclass(frozen=True)
class LazyLLM(TokenMethod):
    """Progressive pruning of the prompt, in prefill."""

    paper = Paper(
        title="LazyLLM: Dynamic Token Pruning for Efficient Long Context LLM Inference",
        venue="arXiv",
        year=2024,
        arxiv="2407.14057",
        checked="port",
        notes="Prefill only: tokens that left are not revived while decoding, so decoding is static progressive "
        "pruning, not the paper's dynamic one. The paper tunes layers and rates per task; these are a third party's "
        "for 32 layers, and --keep raises all rates to one power.",
    )
    native = ("layers", "rates")

    layers: tuple[int, ...] = param((10, 20, 29), "layers before which tokens leave, of 32", low=1)
    rates: tuple[float, ...] = param((0.7, 0.4, 0.1), "fraction of the prompt left after each", low=0, high=1)

    def stages(self, shape, knob):
        """The staircase of rates; the last token always goes on."""
        if len(self.layers) != len(self.rates):
            raise UserError(
                f"lazyllm: {len(self.layers)} layers and {len(self.rates)} rates; give as many of each"
            )
        power = 1.0 if knob is None else (1 - knob) / knob if knob else torch.inf
        left: dict[int, int] = {}
        for layer, rate in zip(self.layers, self.rates, strict=True):
            left[max(1, scale_layer(layer, 32, shape.depth))] = round(shape.tokens * rate**power)
        alive, stages = shape.tokens, []
        for layer, count in sorted(left.items()):
            alive = min(alive, count)
            stages.append(Stage(Site(layer), alive))
        return stages

    def reduce(self, site, view, count, memory):
        """Keep the `count` tokens that the last token attends to most, and the last token."""
        place = torch.arange(view.hidden.shape[1], device=view.hidden.device)
        last = place.expand_as(view.prunable)
        if view.real is not None:
            last = last.masked_fill(~view.real, -1)
        last = last.max(dim=1, keepdim=True).values  # [B, 1]
        paid = view.attention.rows(last).mean(dim=1).squeeze(1)  # [B, N]
        index, valid = keep_protected_and_top(paid, view.prunable.sum(1).cpu() - count, view.prunable)
        return Reduction.keep(index, view.hidden.shape[1], valid)
