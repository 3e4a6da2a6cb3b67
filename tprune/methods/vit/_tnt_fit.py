"""How tnt's heads are learned (section 3 of the paper): the less a token is worth, the more noise it gets."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from tprune.core.budget import Site
from tprune.methods.fit import Fit, Plan


class Noise(Fit):
    """A linear head after each of the first blocks; nothing leaves."""

    def __init__(self, method, shape, seed):
        super().__init__(shape)
        self.method = method
        count = method.heads(shape.depth)
        self.sites = tuple(Site(layer + 1) for layer in range(count))
        floor = min(1.0, method.min_lr / method.lr)
        self.plan = Plan(method.epochs, method.batch, method.lr, floor, method.warmup, method.weight_decay)
        generator = torch.Generator().manual_seed(seed)
        self.heads = nn.Parameter(torch.empty(count, shape.width))
        nn.init.trunc_normal_(self.heads, std=0.02, generator=generator)

    def at(self, site, view, memory):
        """Normalise, and add noise to the patches: σ · (1 - α) · ε, with α a softmax over the patches of an image."""
        hidden = view.hidden.float()
        patches = hidden[:, view.prefix :]
        worth = (patches @ self.heads[site.layer - 1]).softmax(-1)
        noise = torch.randn(patches.shape, generator=self.generator, device=patches.device)
        noise = self.method.noise * (1 - worth).unsqueeze(-1) * noise
        if self.method.norm:
            hidden = functional.layer_norm(hidden, hidden.shape[-1:], eps=1e-6)
        return torch.cat([hidden[:, : view.prefix], hidden[:, view.prefix :] + noise], 1)

    def state(self):
        """The heads, float [H, D]."""
        return {"heads": self.heads.detach().clone()}
