"""How a model learns to go on with fewer tokens: it is trained while they leave as at inference."""

from __future__ import annotations

from torch.nn import functional

from tprune.core.budget import knob_at
from tprune.methods.fit import Fit


class Tuned(Fit):
    """The model's own weights.

    Args:
        method: whose `reduce` is what happens at its sites.
        shape: of the model.
        keep: the budget, or None.
        plan: how long and how fast.
        smoothing: of the labels.
    """

    tunes = "all"

    def __init__(self, method, shape, keep, plan, smoothing=0.0):
        super().__init__(shape)
        knob = knob_at(keep, lambda knob: method.stages(shape, knob), shape.tokens, shape.depth)
        self.method, self.plan, self.smoothing = method, plan, smoothing
        self.counts = {stage.site: stage.count for stage in method.stages(shape, knob)}
        self.sites = tuple(self.counts)

    def at(self, site, view, memory):
        """As at inference."""
        return self.method.reduce(site, view, self.counts[site], memory)

    def losses(self, outputs, labels, memory, dense):
        """Cross-entropy of the model."""
        return {"task": functional.cross_entropy(outputs, labels, label_smoothing=self.smoothing)}

    def groups(self, model):
        """No weight decay of vectors, nor of what was added to the model."""
        exempt = getattr(model, "no_weight_decay", set)()
        named = [(p.dim() > 1 and name not in exempt, p) for name, p in model.named_parameters()]
        named += [(False, p) for p in self.parameters()]
        return [
            {
                "params": [p for decays, p in named if decays == wanted and p.requires_grad],
                "weight_decay": self.plan.weight_decay * wanted,
            }
            for wanted in (True, False)
        ]

    def state(self):
        """Nothing beside the model."""
        return {}
