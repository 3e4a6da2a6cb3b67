"""LVPruning lets every image token read the words and decide whether it goes on, again and again inside the decoder.

A decision module before each of a few layers: image tokens are queries, words are keys and values. The modules learn
with Gumbel-softmax decisions as attention masks and a penalty that holds each to its fraction. The model stays as it
is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from tprune.core import relax, select
from tprune.core.budget import exponent, knob_at, staircase
from tprune.core.reduction import Reduction
from tprune.methods.base import Paper, param
from tprune.methods.fit import Fit, Plan, Relaxed
from tprune.methods.tokens import TokenMethod
from tprune.methods.vlm._guided import Guided, guided, spoken


@dataclass(frozen=True)
class LVPruning(TokenMethod):
    """Before layer K, keep the int(r · V) image tokens whose modules are surest that they stay."""

    kind = "trained"
    learns = "required"
    paper = Paper(
        title="LVPruning: An Effective yet Simple Language-Guided Vision Token Pruning Approach for Multi-modal Large "
        "Language Models",
        venue="Findings of NAACL",
        year=2025,
        arxiv="2501.13652",
        checked="abstract",
        notes="A reconstruction: no code is public. Layers, fractions, the norm in front of a module and its size are "
        "ours. Counts are those of the fractions learned for; a decision by each token's own two logits, as in "
        "training, is not offered. --keep raises all fractions to one power.",
    )
    reads = ()
    native = ("ratios",)
    built_in = {"epochs": 2.0, "batch": 16, "lr": 1e-3, "penalty": 4.0}

    layers: tuple[int, ...] = param((1, 8, 16), "image tokens leave before these layers, of 32", low=1)
    ratios: tuple[float, ...] = param(
        (0.5, 0.25, 0.1), "fraction of the image tokens left after each", low=0, high=1
    )
    heads: int = param(8, "of a module's attention", low=1)
    temperature: float = param(1.0, "fit: of the Gumbel-softmax", low=1e-3)
    penalty: float = param(1.0, "fit: weight of the squares of what is kept too much or too little", low=0)
    epochs: float = param(1.0, "fit: passes over the training questions", low=0)
    batch: int = param(128, "fit: questions per step", low=1)
    lr: float = param(2e-4, "fit: peak learning rate", low=0)

    def stages(self, shape, knob):
        """int(r_s · V) tokens after stage s; with --keep, r_s to one power."""
        self.check_pairs("layers", "ratios")
        power = 1.0 if knob is None else exponent(knob)
        counts = [max(1, int(ratio**power * shape.tokens + 1e-9)) for ratio in self.ratios]
        return staircase(self.layers, counts, 32, shape.depth)

    def reduce(self, site, view, count, memory):
        """The largest margins of staying over leaving."""
        words = spoken(view)
        logits = guided(self.state, f"before.{site.layer}", self.heads, 2, view.hidden, words)
        index, valid = select.keep_prunable_top(logits[..., 1] - logits[..., 0], count, view.prunable)
        return Reduction.keep(index, view.hidden.shape[1], valid)

    def fit(self, shape, keep, seed):
        """A module per stage, to the fractions of the budget."""
        knob = knob_at(keep, lambda one: self.stages(shape, one), shape.tokens, shape.depth)
        return Decisions(self, shape, self.stages(shape, knob), seed)


class Decisions(Fit):
    """Decisions drawn at every stage; who left once is not seen again."""

    epsilon = 0.0

    def __init__(self, method, shape, stages, seed):
        super().__init__(shape)
        self.method, self.sites = method, tuple(stage.site for stage in stages)
        self.targets = [stage.count / shape.tokens for stage in stages]
        self.plan = Plan(method.epochs, method.batch, method.lr, warmup=0.03)
        generator = torch.Generator().manual_seed(seed)
        self.before = nn.ModuleDict(
            {str(site.layer): Guided(shape.width, method.heads, 2).begin(generator) for site in self.sites}
        )

    def at(self, site, view, memory):
        """p = p_before · decision."""
        logits = self.before[str(site.layer)](view.hidden, spoken(view))
        stays = relax.gumbel(logits, self.method.temperature, self.generator)[..., 1]
        stays = torch.where(view.prunable, stays, 1.0)
        return Relaxed(view.hidden, stays if view.present is None else view.present * stays)

    def losses(self, outputs, labels, memory, dense):
        """The answers, and Σ_s (kept - r_s)²."""
        missed = [left.count - target for left, target in zip(memory["left"], self.targets, strict=True)]
        budget = self.method.penalty * torch.stack(missed).square().sum()
        return {"answers": functional.cross_entropy(outputs, labels), "budget": budget}

    def state(self):
        """The modules."""
        return {name: tensor.detach().clone() for name, tensor in self.state_dict().items()}
