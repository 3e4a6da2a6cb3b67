"""CoViPAL scores image tokens with a small module of its own, before a shallow layer where attention tells little yet.

The module reads image tokens and words. It first learns what the words of a deeper layer attend to, then, with the
logarithm of its probabilities as a bias on the image's keys, to let the model answer; the model stays as it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from tprune.core import relax, select
from tprune.core.budget import Site, Stage, knob_at, scale_layer
from tprune.core.explain import foretelling_loss
from tprune.core.reduction import Reduction
from tprune.methods.base import Paper, param
from tprune.methods.fit import Fit, Plan, Relaxed
from tprune.methods.tokens import TokenMethod
from tprune.methods.vlm._guided import Guided, guided, spoken


@dataclass(frozen=True)
class CoViPAL(TokenMethod):
    """Before layer K, keep the round(r · V) image tokens that the module scores highest."""

    kind = "trained"
    learns = "required"
    paper = Paper(
        title="CoViPAL: Layer-wise Contextualized Visual Token Pruning for Large Vision-Language Models",
        venue="Findings of EMNLP",
        year=2025,
        arxiv="2508.17243",
        checked="abstract",
        notes="A reconstruction: the authors' repository, tyxqc/CoViPAL, could not be had. Both stages of training are "
        "theirs; the module's form, its layers, the divergence of the first stage, and what makes scores probabilities "
        "in the second are ours: draws around the score's distance from the last one that stays. Without draws, or "
        "with a penalty on their mean instead of the distance, scores hardly learn an order.",
    )
    reads = ()
    native = ("ratio",)
    built_in = {"epochs": 2.0, "batch": 16, "lr": 3e-3, "guide": 21, "first": 0.25, "temperature": 0.3}

    layer: int = param(2, "image tokens leave before this layer, of 32", low=1)
    guide: int = param(16, "fit: the layer whose attention is learned first, of 32", low=1)
    ratio: float = param(0.25, "fraction of the image tokens that stays", low=0, high=1)
    heads: int = param(8, "of the module's attention", low=1)
    first: float = param(0.5, "fit: fraction of the steps that learn attention", low=0, high=1)
    temperature: float = param(1.0, "fit: of the draws that what stays is weighed by", low=1e-3)
    epochs: float = param(1.0, "fit: passes over the training questions", low=0)
    batch: int = param(128, "fit: questions per step", low=1)
    lr: float = param(2e-4, "fit: peak learning rate", low=0)

    def site(self, depth):
        """Where tokens leave, in a decoder of so many layers."""
        return Site(max(1, scale_layer(self.layer, 32, depth)))

    def stages(self, shape, knob):
        """round(r · V) tokens, at least one."""
        share = self.ratio if knob is None else knob
        return [Stage(self.site(shape.depth), max(1, round(share * shape.tokens)))]

    def reduce(self, site, view, count, memory):
        """S = p(H_v, H_t); top r · V."""
        score = guided(self.state, "module", self.heads, 1, view.hidden, spoken(view))[..., 0]
        index, valid = select.keep_prunable_top(score, count, view.prunable)
        return Reduction.keep(index, view.hidden.shape[1], valid)

    def fit(self, shape, keep, seed):
        """The module, to the fraction of the budget."""
        knob = knob_at(keep, lambda one: self.stages(shape, one), shape.tokens, shape.depth)
        return Contextual(self, shape, self.stages(shape, knob)[0].count / shape.tokens, seed)


class Contextual(Fit):
    """First what the words of a deeper layer look at, then the answers."""

    epsilon = 0.0

    def __init__(self, method, shape, target, seed):
        super().__init__(shape)
        self.method, self.target, self.sites = method, target, (method.site(shape.depth),)
        self.guide = max(self.sites[0].layer, scale_layer(method.guide, 32, shape.depth))
        self.plan = Plan(method.epochs, method.batch, method.lr, warmup=0.03)
        self.module = Guided(shape.width, method.heads, 1).begin(torch.Generator().manual_seed(seed))
        self.settle(0.0)

    def settle(self, done):
        """Which of both it is."""
        self.looks = done < self.method.first
        self.watches = (self.guide,) if self.looks else ()

    def at(self, site, view, memory):
        """softmax(q k + log p) is softmax(q k) weighted by p; while attention is learned everything is there."""
        score = self.module(view.hidden, spoken(view))[..., 0]
        memory["score"], memory["image"], memory["text"] = score, view.prunable, view.text
        keeps = torch.ones_like(score)
        if not self.looks:
            above = score - self.last(score, view.prunable)
            keeps = relax.concrete(above, self.method.temperature, self.generator)
        return Relaxed(view.hidden, torch.where(view.prunable, keeps, 1.0))

    def last(self, score, image):
        """The score of the last image token that stays, [B, 1]."""
        count = (self.target * image.sum(1, keepdim=True)).round().long().clamp_min(1)
        return score.masked_fill(~image, -torch.inf).sort(1, descending=True).values.gather(1, count - 1)

    def losses(self, outputs, labels, memory, dense):
        """The divergence from the attention of all heads and words; or the answers."""
        if not self.looks:
            return {"answers": functional.cross_entropy(outputs, labels)}
        paid = memory["attention"][self.guide].sum(1) * memory["text"].unsqueeze(2)
        return {"attention": foretelling_loss(memory["score"], paid.sum(1), memory["image"])}

    def state(self):
        """The module."""
        return {name: tensor.detach().clone() for name, tensor in self.state_dict().items()}
