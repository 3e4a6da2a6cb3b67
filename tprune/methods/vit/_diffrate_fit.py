"""How diffrate's counts are learned (section 3.2 of the paper): a softmax over candidate counts per block and step."""

from __future__ import annotations

import torch
from torch import nn

from tprune.core import match, relax, select
from tprune.core.budget import Site
from tprune.core.reduction import Reduction, gather_tokens
from tprune.methods.fit import Fit, Plan, Relaxed


class Rates(Fit):
    """Logits over candidate counts, for pruning and for merging in every block but the first, which keeps all.

    What leaves is marked as absent, at the end of the sequence: tokens are sorted by importance in every block.
    """

    epsilon = 1e-6
    keep_self = True

    def __init__(self, method, shape, keep):
        super().__init__(shape)
        self.method, self.keep, self.tokens = method, keep, shape.tokens
        self.sites = tuple(Site(layer, between=True) for layer in range(1, shape.depth))
        self.plan = Plan(method.epochs, method.batch, method.lr, floor=min(1.0, method.min_lr / method.lr))
        candidates = torch.arange(shape.tokens, 0, -method.granularity).float()
        self.register_buffer("candidates", candidates)
        self.logits = nn.Parameter(torch.zeros(len(self.sites), 2, len(candidates)))

    def counts(self):
        """Tokens left by each step, float [L - 1, 2], whole, with the gradient of the mean candidate."""
        mean = self.logits.softmax(-1) @ self.candidates
        return relax.straight_through(mean.ceil(), mean)

    def at(self, site, view, memory):
        """Sort, prune to the first count, merge to the second (the authors' training block)."""
        if not memory.get("counts"):
            memory["counts"], memory["alive"] = self.counts().detach().int().tolist(), self.tokens
        length, prefix = view.hidden.shape[1], view.prefix
        importance = view.attention.rows(slice(0, 1)).mean(1)[:, 0, prefix:]
        order = select.with_prefix(select.top_ranked(importance, length - prefix) + prefix, prefix)
        ones = torch.ones_like(order, dtype=torch.float32)
        hidden, size, present = (
            gather_tokens(x, order)
            for x in (
                view.hidden.float(),
                ones if view.size is None else view.size,
                ones if view.present is None else view.present,
            )
        )
        pruned, merged = memory["counts"][site.layer - 1]
        alive = memory["alive"]
        middle = min(pruned, alive)
        present = present * self.gates(site.layer, 0, middle, alive, prefix)
        if merged < middle:
            hidden, size = self.merge(hidden, size, prefix + merged, prefix + middle, prefix)
            present = present * self.gates(site.layer, 1, merged, middle, prefix)
        memory["alive"] = min(merged, middle)
        return Relaxed(hidden, present, size, order)

    def gates(self, layer, step, left, alive, prefix):
        """0 for the ranks `left` to `alive`, 1 for all others, with the gradient of each rank's probability: [N]."""
        chance = self.logits[layer - 1, step].softmax(-1)
        rank = torch.arange(self.tokens, device=chance.device)
        stays = ((rank.unsqueeze(1) < self.candidates) * chance).sum(1)
        hard = ((rank < left) | (rank >= alive)).to(stays.dtype)
        gates = relax.straight_through(hard, stays) if left < alive else hard
        return torch.cat([gates.new_ones(prefix), gates])

    def merge(self, hidden, size, left, alive, prefix):
        """Slots `left` to `alive` flow to the first ones, by plain mean, and stay in their places."""
        place = torch.arange(alive, device=hidden.device).expand(len(hidden), -1)
        kept, source = place[:, :left], place[:, left:]
        similarity, into = match.nearest(hidden.detach(), source, kept, barred=prefix)
        mean = Reduction.average(kept, hidden.shape[1], source, into).apply(hidden)
        own, flow = size[:, :left].clamp_min(1), (size[:, left:alive] * similarity).clamp_min(1)
        grown = own.scatter_add(1, into, flow)
        return torch.cat([mean, hidden[:, left:]], 1), torch.cat([grown, flow, size[:, alive:]], 1)

    def losses(self, outputs, labels, memory, dense):
        """Cross-entropy, and what the counts keep beside the budget.

        Of the smallest of three counts both new ones get the gradient, the one before gets none (the authors' rule).
        """
        left, entering = self.tokens, [self.tokens, self.tokens]
        for pruned, merged in self.counts():
            entering.append(left)
            both = pruned + merged
            smallest = min(float(torch.as_tensor(count).detach()) for count in (left, pruned, merged))
            left = both - both.detach() + smallest
            entering.append(left)
        missed = sum(entering) / (2 * self.depth * self.tokens) - self.keep
        return super().losses(outputs, labels, memory, dense) | {"budget": self.method.penalty * missed**2}

    def state(self):
        """Patches left after pruning and after merging in every block, int64 [L, 2]; the first keeps all."""
        left, rows = self.tokens, [(self.tokens, self.tokens)]
        for pruned, merged in self.counts().detach().int().tolist():
            middle = min(left, pruned)
            left = min(middle, merged)
            rows.append((middle, left))
        return {"counts": torch.tensor(rows)}
