"""How tokenbutler's predictor is trained: its logits shall be those of the attention, above the diagonal too."""

from __future__ import annotations

import math

import torch
from torch.nn import functional

from tprune.core.attending import attention_logits
from tprune.methods.fit import Fit, Plan


class Foresight(Fit):
    """(q̂ k̂ / √d' - q k / √d)², mean over tokens and heads, summed over layers and divided by their number."""

    answers = False
    sites = ()

    def __init__(self, method, shape, seed):
        super().__init__(shape)
        self.method, self.shape = method, shape
        self.plan = Plan(method.epochs, method.batch, method.lr, weight_decay=0.01)
        self.predictor = method.predictor(shape).begin(torch.Generator().manual_seed(seed))

    def at(self, site, view, memory):
        """The attention of every layer."""
        memory.setdefault("layers", {})[site.layer] = view.attention

    def drop(self, x):
        """Dropout with draws of this step's own."""
        stays = torch.rand(x.shape, generator=self.generator, device=x.device) >= self.method.dropout
        return x * stays / max(1 - self.method.dropout, 1e-6)

    def losses(self, outputs, labels, memory, dense):
        """The mean squared error of the logits."""
        inputs = memory["entering"].float()
        position = torch.arange(inputs.shape[1], device=inputs.device).expand(inputs.shape[:2])
        asks, is_asked = self.predictor(inputs, position, drop=self.drop)
        heads, total = self.shape.heads, 0.0
        for layer, attention in memory["layers"].items():
            if layer > 0:
                own = slice(layer * heads, (layer + 1) * heads)
                said = asks[:, own] @ is_asked[:, own].mT / math.sqrt(self.method.size)
                true = attention_logits(attention.query, attention.key, attention.scale)
                total = total + functional.mse_loss(said, true)
        return {"logits": total / self.depth}

    def state(self):
        """The predictor."""
        return {name: tensor.detach().clone() for name, tensor in self.predictor.state_dict().items()}
