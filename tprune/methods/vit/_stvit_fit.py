"""How stvit learns: the whole model with its semantic tokens, as at inference."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from tprune.methods.fit import Fit, Plan


class Semantics(Fit):
    """The global centres and the model itself.

    Args:
        method: STViT.
        shape: of the model.
        stages: where semantic tokens are made and work, and how many.
        seed: of initial values.
    """

    tunes = "all"

    def __init__(self, method, shape, stages, seed):
        super().__init__(shape)
        self.method = method
        self.counts = {stage.site: stage.count for stage in stages}
        self.sites = tuple(self.counts)
        floor = min(1.0, method.min_lr / method.lr)
        self.plan = Plan(method.epochs, method.batch, method.lr, floor, method.warmup, method.weight_decay)
        self.centres = None
        if method.centres and stages:
            window, cells = method.layout(shape.grid, shape.window, stages[0].count)
            rows, columns = (
                side // one * cell for side, one, cell in zip(shape.grid, window, cells, strict=True)
            )
            self.centres = nn.Parameter(torch.empty(rows, columns, shape.width))
            nn.init.trunc_normal_(self.centres, std=0.02, generator=torch.Generator().manual_seed(seed))

    def at(self, site, view, memory):
        """As at inference, with the centres as they are now."""
        return self.method.step(view, self.counts[site], memory, self.centres)

    def losses(self, outputs, labels, memory, dense):
        """Cross-entropy of the model."""
        return {"task": functional.cross_entropy(outputs, labels, label_smoothing=self.method.smoothing)}

    def groups(self, model):
        """No weight decay of vectors, nor of the centres."""
        exempt = getattr(model, "no_weight_decay", set)()
        named = [(name not in exempt and p.dim() > 1, p) for name, p in model.named_parameters()]
        named += [(False, p) for p in self.parameters()]
        named = [(decays, p) for decays, p in named if p.requires_grad]
        return [
            {
                "params": [p for decays, p in named if decays == wanted],
                "weight_decay": self.method.weight_decay * wanted,
            }
            for wanted in (True, False)
        ]

    def state(self):
        """The number of semantic tokens, and the centres, float [rows, columns, D], where there are any."""
        count = min(self.counts.values(), default=0)
        found = {"count": torch.tensor(count)}
        return found if self.centres is None else found | {"centres": self.centres.detach().clone()}
