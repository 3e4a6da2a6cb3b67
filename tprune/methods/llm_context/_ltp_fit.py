"""How ltp's thresholds are learned: masks that fade tokens, then weights that get used to their absence."""

from __future__ import annotations

from itertools import islice

import torch
from torch import Tensor, nn

from tprune.core.budget import Site, bisect
from tprune.methods.fit import Fit, Plan

LOOKED_AT = 4
"""Batches of training texts in which the first thresholds are looked for."""


def rising(final: float, depth: int) -> Tensor:
    """Thresholds that rise evenly from 0 in the first block towards `final`, which the last does not reach: [depth]."""
    return final * torch.arange(depth) / depth


class SoftThresholds(Fit):
    """A threshold per block on top of its first value, and the weights of the model."""

    tunes = "all"

    def __init__(self, method, shape, keep):
        super().__init__(shape)
        self.method, self.keep, self.hard = method, keep, False
        self.sites = tuple(Site(layer) for layer in range(1, shape.depth))
        epochs = method.epochs + method.hard_epochs
        self.soft = method.epochs / epochs if epochs else 1.0
        self.plan = Plan(epochs, method.batch, method.lr)
        self.register_buffer("first", method.thresholds(shape.depth).clone())
        self.learned = nn.Parameter(torch.zeros(shape.depth))

    def groups(self, model):
        """Thresholds have a learning rate of their own."""
        return [
            {"params": [self.learned], "lr": self.method.threshold_lr},
            {"params": list(model.parameters())},
        ]

    def begin(self, forwards):
        """With a budget: the first thresholds are those that keep it, in the dense model's attention."""
        if self.keep is None:
            return
        self.first.zero_()
        seen = [(memory["received"], memory["real"]) for memory in islice(forwards, LOOKED_AT)]

        def kept(knob: float) -> float:
            first = rising(1 - knob, self.depth)
            return sum(
                self.entering(
                    [(part >= least).float() for part, least in zip(received, first, strict=True)], real
                )
                for received, real in seen
            ).item() / len(seen)

        self.first.copy_(rising(1 - bisect(kept, self.keep), self.depth))

    def entering(self, masks: list[Tensor], real: Tensor) -> Tensor:
        """The mean fraction of tokens, behind the class token, that enter a sublayer under these masks [B, N] each."""
        there = real.float()
        total, alive = 0.0, there
        for mask in masks:
            total, alive = total + alive[:, 1:].sum(), alive * mask
            total = total + alive[:, 1:].sum()
        return total / (2 * self.depth * there[:, 1:].sum())

    def at(self, site, view, memory):
        """Fade what is below the threshold of the block before; in the second part it leaves."""
        if self.hard:
            return self.method.bind(self.state()).dropped(site.layer - 1, view, memory)
        return view.hidden * self.mask(view, memory).unsqueeze(2)

    def finish(self, view, memory):
        """The last block's mask fades nothing that is read, and counts."""
        if not self.hard:
            self.mask(view, memory)

    def mask(self, view, memory):
        """How much of every token is left behind a block: [B, N]."""
        masks = memory.setdefault("masks", [])
        received = self.method.received(view, memory)
        memory.setdefault("received", []).append(received.detach())
        memory["real"] = view.real
        threshold = self.first[len(masks)] + self.learned[len(masks)]
        masks.append(torch.sigmoid((received - threshold) / self.method.temperature))
        return masks[-1]

    def losses(self, outputs, labels, memory, dense):
        """Cross-entropy, and while masks are soft what they keep."""
        found = super().losses(outputs, labels, memory, dense)
        if self.hard:
            return found
        masks, real = memory["masks"], memory["real"]
        if self.keep is not None:
            missed = self.entering(masks, real) - self.keep
            return found | {"budget": self.method.penalty * missed**2}
        means = sum((mask * real).sum() for mask in masks) / real.sum()
        return found | {"tokens": self.method.regularization * means}

    def settle(self, done):
        """Thresholds stand still once tokens leave."""
        self.hard = done >= self.soft

    def state(self):
        """One threshold per block."""
        return {"threshold": (self.first + self.learned).detach().clone()}
