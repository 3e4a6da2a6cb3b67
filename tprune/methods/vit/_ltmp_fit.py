"""How ltmp's thresholds are learned (section 3.3 of the paper): gates that pass a gradient, nothing leaves."""

from __future__ import annotations

import torch
from torch import nn

from tprune.core import relax, score
from tprune.core.budget import Site
from tprune.core.reduction import gather_tokens
from tprune.methods.fit import Fit, Plan, Relaxed


class Thresholds(Fit):
    """A merge and a prune threshold per block; tokens are marked as absent, in the order [even, odd]."""

    def __init__(self, method, shape, keep):
        super().__init__(shape)
        self.method, self.keep = method, keep
        self.sites = tuple(Site(layer, between=True) for layer in range(shape.depth))
        self.plan = Plan(method.epochs, method.batch, method.lr)
        for name, first in (("merge_threshold", 0.9), ("prune_threshold", 0.0)):
            given = torch.tensor(getattr(method, name) or (first,))
            setattr(self, name, nn.Parameter(given.repeat(shape.depth // len(given))))

    def groups(self, model):
        """Each with its own learning rate."""
        return [
            {"params": [self.prune_threshold]},
            {"params": [self.merge_threshold], "lr": self.method.merge_lr},
        ]

    def at(self, site, view, memory):
        """The gates of one block (the authors' training block)."""
        hidden, prefix, gates = view.hidden.float(), view.prefix, self.method.temperature
        batch, length = hidden.shape[:2]
        present = hidden.new_ones(batch, length) if view.present is None else view.present
        size = hidden.new_ones(batch, length) if view.size is None else view.size
        received = self.method.importance(view)
        place = torch.arange(length, device=hidden.device)

        unit = score.cosine_normalise(view.attention.key.mean(1)) * present.detach().unsqueeze(-1)
        alike = unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)
        barred = (place[::2] < prefix).unsqueeze(1) | (place[1::2] < prefix)
        best, partner = alike.masked_fill(barred, -torch.inf).max(2)
        merges = relax.gate(best, self.merge_threshold[site.layer], gates)
        there = present[:, ::2]
        remains = torch.where(there.detach() > 0, 1 - merges, there)

        # Features flow without gradient to the gates; what flows stays in its slot, absent.
        flow = merges.detach() * size[:, ::2]
        into = 2 * partner + 1
        grown = size.scatter_add(1, into, flow)
        hidden = (hidden * size.unsqueeze(-1)).scatter_add(
            1, into.unsqueeze(-1).expand(-1, -1, hidden.shape[2]), hidden[:, ::2] * flow.unsqueeze(-1)
        ) / grown.unsqueeze(-1)
        passed = received[:, ::2].where(merges.detach() > 0, 0)
        worth = received.scatter_reduce(1, into, passed, "amax")

        left = present.clone()
        left[:, ::2] = remains
        pruned = relax.gate(worth, self.prune_threshold[site.layer], gates)
        left = torch.where(left.detach() > 0, pruned, left)
        order = even_odd(place, prefix).expand(batch, -1)
        return Relaxed(gather_tokens(hidden, order), left.gather(1, order), grown.gather(1, order), order)

    def losses(self, outputs, labels, memory, dense):
        """Cross-entropy, and what is kept beside the budget."""
        missed = self.kept(memory) - self.keep
        return super().losses(outputs, labels, memory, dense) | {"budget": self.method.penalty * missed**2}

    def settle(self, done):
        """Thresholds stay in [0, 1]."""
        for threshold in self.parameters():
            threshold.data.clamp_(0, 1)

    def state(self):
        """Both, one number per block."""
        return {name: threshold.detach().clone() for name, threshold in self.named_parameters()}


def even_odd(place, prefix):
    """`place` [N], 0 to N - 1, in the order [prefix, even, odd]."""
    return torch.cat([place[:prefix], place[prefix + prefix % 2 :: 2], place[prefix | 1 :: 2]])
