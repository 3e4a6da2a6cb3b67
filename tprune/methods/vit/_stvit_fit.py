"""How stvit learns: the whole model with its semantic tokens, as at inference."""

from __future__ import annotations

import torch
from torch import nn

from tprune.methods.fit import Plan
from tprune.methods.vit._tuned import Tuned


class Semantics(Tuned):
    """The global centres and the model itself.

    Args:
        method: STViT.
        shape: of the model.
        keep: the budget, or None.
        seed: of initial values.
    """

    def __init__(self, method, shape, keep, seed):
        floor = min(1.0, method.min_lr / method.lr)
        plan = Plan(method.epochs, method.batch, method.lr, floor, method.warmup, method.weight_decay)
        super().__init__(method, shape, keep, plan, method.smoothing)
        self.count = min(self.counts.values(), default=0)
        self.centres = None
        if method.centres and self.count:
            rows, columns = method.map(shape.grid, shape.window, self.count)
            self.centres = nn.Parameter(torch.empty(rows, columns, shape.width))
            nn.init.trunc_normal_(self.centres, std=0.02, generator=torch.Generator().manual_seed(seed))

    def at(self, site, view, memory):
        """As at inference, with the centres as they are now."""
        return self.method.step(view, self.counts[site], memory, self.centres)

    def state(self):
        """The number of semantic tokens, and the centres, float [rows, columns, D], where there are any."""
        found = {"count": torch.tensor(self.count)}
        return found if self.centres is None else found | {"centres": self.centres.detach().clone()}
