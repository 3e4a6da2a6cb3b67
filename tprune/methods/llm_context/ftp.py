"""FTP: in every layer some tokens of a prompt can be done without, and not the same ones in all of them.

A small router, one for all layers, looks at four numbers: where a token stands, what attention it last received, how
that ranks, and how much the layer is to save. A token it does not choose passes the layer by, attention and MLP, leaves
nothing in its cache, and is back before the next one. How much every layer saves is found by a genetic search.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from tprune.core.budget import Site, Stage, exponent
from tprune.core.ranks import rank
from tprune.core.reduction import Reduction
from tprune.core.select import keep_prunable_top
from tprune.methods.base import Paper, param
from tprune.methods.tokens import TokenMethod


@dataclass(frozen=True)
class FTP(TokenMethod):
    """The tokens with the largest margins of the router; without a fit those of a fixed order, as many in all layers.

    The last token of a prompt, and all that follow it, go through every layer; they see there what went through it.
    """

    kind = "trained"
    learns = "optional"
    returns = True
    paper = Paper(
        title="FTP: A Fine-grained Token-wise Pruner for Large Language Models via Token Routing",
        venue="arXiv",
        year=2024,
        arxiv="2412.11494",
        checked="abstract",
        notes="A reconstruction from the abstract and public reviews; neither code nor text was to be had. The four "
        "inputs, the shared MLP of 64, three losses (a guide that fades, what is saved too little, the last layer's "
        "output) and the two searches are the paper's; scales, weights, and what a search measures (that output) are "
        "ours. The paper's gates decide how many tokens pass; here they do in the fit alone, and --keep takes the best "
        "by their margin. The first layer has all, since no attention was seen; a generated token skips none, so a fit "
        "looks at the output behind the prompt alone. On smollm2-135m no fit has been seen to beat the fixed router.",
    )
    native = ("skipped",)
    built_in = {"sequence": 256, "epochs": 0.1, "population": 8, "generations": 4}

    skipped: float = param(0.3, "mean fraction of the tokens that pass a layer by", low=0, high=1)
    order: str = param(
        "position",
        "of the fixed router: the first token, then from the last one back; or then by attention",
        choices=("position", "attention"),
    )
    inner: int = param(64, "fit: width of the router", low=1)
    population: int = param(
        16, "fit: how many divisions of the savings a generation of the search has", low=2
    )
    generations: int = param(10, "fit: of the search, before the router learns and again afterwards", low=0)
    looks: int = param(2, "fit: steps of text that a division is tried on", low=1)
    guide: float = param(1.0, "fit: weight of the fixed router's choices at first, down to 0", low=0)
    constraint: float = param(1.0, "fit: weight of what is saved too little, summed over layers", low=0)
    distillation: float = param(
        1.0, "fit: weight of the relative error of what stands behind the prompt", low=0
    )
    sequence: int = param(
        512, "fit: tokens of a training sequence, a quarter of them behind the prompt", low=3
    )
    epochs: float = param(1.0, "fit: passes over the training text", low=0)
    batch: int = param(1, "fit: sequences per step", low=1)
    lr: float = param(1e-3, "fit: peak learning rate", low=0)

    def stages(self, shape, knob):
        """So many of the tokens enter each layer but the first; --keep raises these fractions to one power."""
        power = 1.0 if knob is None else exponent(knob)
        kept = self.schedule(shape.depth)
        return [Stage(Site(layer), round(shape.tokens * one**power)) for layer, one in enumerate(kept, 1)]

    def schedule(self, depth):
        """Which fraction of the tokens enters each layer but the first: as it was found, or the same for all."""
        if self.state is not None:
            return self.state["schedule"].tolist()
        return [max(0.0, 1 - self.skipped * depth / (depth - 1))] * (depth - 1)

    def reduce(self, site, view, count, memory):
        """The `count` tokens that the layer behind `site` can do without least."""
        before = memory.get("computed")
        counted = view.real if before is None else before.gather(view.real)
        if before is not None and before.valid is not None:
            counted = counted & before.valid
        received = view.attention.column_sums(counted=counted).mean(1).unsqueeze(2)
        memory["table"] = received if before is None else before.restore(received, memory["table"])
        scores, total = memory["table"].squeeze(2), view.prunable.sum(1)
        saved = 1 - torch.as_tensor(count, device=total.device) / total.clamp_min(1)
        worth = self.fixed(scores, view.real)
        if self.state is not None:
            worth = margin(routed(self.state, factors(scores, view.real, saved)))
        index, valid = keep_prunable_top(worth, count, view.prunable)
        memory["computed"] = Reduction.keep(index, view.hidden.shape[1], valid)
        return memory["computed"]

    def fixed(self, scores, real):
        """What tokens are worth to the router that learns nothing: the first one most, [B, N]."""
        place = real.cumsum(1) - 1
        return torch.where(place == 0, torch.inf, scores if self.order == "attention" else place.float())

    def fit(self, shape, keep, seed):
        """The router, and the savings of every layer."""
        from tprune.methods.llm_context._ftp_fit import Routing

        return Routing(self, shape, keep, seed)


def factors(scores, real, saved):
    """What the router looks at, [B, N, 4]: place and rank as fractions of the row, log(1 + score), and the savings.

    Args:
        scores: [B, N], the attention each token received when it last had any, summed over queries, mean over heads.
        real: bool [B, N].
        saved: the fraction of the row's tokens that pass the layer by, [B] or a number.
    """
    length = real.sum(1, keepdim=True)
    place = (real.cumsum(1) - 1) / length
    order = rank(scores.masked_fill(~real, -torch.inf)) / length
    saved = torch.as_tensor(saved, device=scores.device).view(-1, 1).expand_as(scores)
    return torch.stack([place, scores.log1p(), order, saved], dim=2)


def routed(weights, looked_at):
    """The router's logits [B, N, 2], of computing and of skipping a token."""
    inside = functional.linear(looked_at, weights["first.weight"], weights["first.bias"]).relu()
    return functional.linear(inside, weights["second.weight"], weights["second.bias"])


def margin(logits):
    """By how much computing wins: [B, N]."""
    return logits[..., 0] - logits[..., 1]
