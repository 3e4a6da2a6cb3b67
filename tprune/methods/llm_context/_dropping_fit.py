"""How dynamic context pruning is trained: softly dropped tokens fade from the attention, ever more steeply.

At first a token fades to sigmoid(bias) of itself with each later one, as the authors' do, and stays whole once the
sigmoid is steep: what the first steps teach the model is to read what is near.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from tprune.core.dropping import interaction, remaining
from tprune.methods.fit import Fit, Plan

SPREAD = 0.02
"""Standard deviation of initial weights: the authors draw all linear layers anew, and these with them."""


class SoftDropping(Fit):
    """Interaction weights of every layer, and all weights of the model with them."""

    tunes = "all"
    sites = ()

    def __init__(self, method, shape, keep, seed):
        super().__init__(shape)
        self.method, self.keep, self.alpha = method, keep, 1.0
        self.plan = Plan(method.epochs, method.batch, method.lr, floor=1.0, warmup=method.warmup)
        generator = torch.Generator().manual_seed(seed)

        def drawn():
            weight = torch.randn(shape.depth, method.size, shape.width, generator=generator)
            return nn.Parameter(SPREAD * weight)

        self.query, self.key = drawn(), drawn()
        self.bias = nn.Parameter(torch.full((shape.depth,), method.bias))

    def at(self, site, view, memory):
        """What is added to the logits of a layer: log of how far every token still is there, [B, 1, N, N]."""
        inputs, layer = view.inputs, site.layer
        query, key = (inputs.float() @ weight[layer].mT for weight in (self.query, self.key))
        left = remaining(interaction(query, key, self.bias[layer]), self.alpha)
        memory.setdefault("there", []).append(left)
        future = torch.ones(left.shape[-2:], dtype=torch.bool, device=left.device).triu(1)
        faded = (left + torch.finfo(left.dtype).tiny).log().masked_fill(future, -torch.inf)
        return faded.unsqueeze(1).to(inputs.dtype)

    def losses(self, outputs, labels, memory, dense):
        """Cross-entropy, and what layers keep above the budget: the last row predicts nothing and does not count."""
        excess = torch.stack([self.excess(left[:, :-1]) for left in memory["there"]]).mean()
        return super().losses(outputs, labels, memory, dense) | {"kept": self.method.weight * excess}

    def excess(self, left):
        """The mean of `left` [B, N - 1, N] less what it is at the budget; not below 0."""
        seen = torch.ones(left.shape[-2:], device=left.device).tril()
        return ((left * seen).sum((1, 2)).mean() - self.keep * seen.sum()).clamp_min(0) / seen.numel()

    def settle(self, done):
        """α rises from 1 along half a cosine."""
        last = self.method.alpha
        self.alpha = last + (1 - last) * (1 + math.cos(math.pi * done)) / 2

    def state(self):
        """The interaction weights, of all layers together."""
        return {name: getattr(self, name).detach().clone() for name in ("query", "key", "bias")}
