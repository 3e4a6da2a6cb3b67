"""How nose's attention sublayers fade (the paper's dilution learning)."""

from __future__ import annotations

import torch

from tprune.methods.fit import Fit, Plan


class Dilution(Fit):
    """Nothing of its own is learned: the model's weights are, while λ goes from 1 to 0."""

    tunes = "all"

    def __init__(self, method, shape, order):
        super().__init__(shape)
        self.sites, self.order, self.share = (), order, 1.0
        self.fade, self.identity = method.fade, method.identity
        floor = min(1.0, method.min_lr / method.lr)
        self.plan = Plan(method.epochs, method.batch, method.lr, floor, method.warmup, method.weight_decay)

    def blend(self, layer):
        """(2 - λ)·x + λ·attn(x) in the chosen blocks; x + λ·attn(x) with `identity` 1."""
        own = 1 + (self.identity - 1) * (1 - self.share)
        return (own, self.share) if layer in self.order else None

    def settle(self, done):
        """λ falls linearly."""
        self.share = max(0.0, 1 - done / self.fade)

    def state(self):
        """Which attention was removed, and what x is multiplied by in its place."""
        return {"order": torch.tensor(self.order, dtype=torch.int64), "scale": torch.tensor(self.identity)}
