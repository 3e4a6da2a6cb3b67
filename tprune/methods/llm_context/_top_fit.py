"""How ToP learns: gates of bins and of layers under a constraint, and the unpruned model's answers and ranks."""

from __future__ import annotations

import math
from contextlib import nullcontext

import torch
from torch import nn
from torch.nn import functional

from tprune.core import ranks, relax
from tprune.core.budget import Site
from tprune.methods.fit import Fit, Plan

TEMPERATURE = 2 / 3
"""Of the gates."""
OPEN, OFF = 10.0, -10.0
"""What the logits of bins and of layers begin with: all bins stay, no layer prunes."""
LIMITS = math.log(1e-2), math.log(1e2)
"""Of all logits."""


class Gates(Fit):
    """A gate for every bin of every layer, one for whether a layer prunes at all, and the weights of the model."""

    tunes = "all"
    teaches = True

    def __init__(self, method, shape, keep, seed):
        super().__init__(shape)
        self.method, self.keep, self.begins, self.tight = method, keep, method.begins(shape.depth), 0.0
        self.sites = tuple(Site(layer) for layer in range(self.begins, shape.depth))
        self.taught = range(1, shape.depth // 3)  # the blocks whose ranks are distilled
        self.plan = Plan(method.epochs, method.batch, method.lr)
        generator, places = torch.Generator().manual_seed(seed), len(self.sites)
        self.bins = nn.Parameter(OPEN + 0.01 * torch.randn(places, method.bins, generator=generator))
        self.layers = nn.Parameter(OFF + 0.01 * torch.randn(places, generator=generator))
        self.multipliers = nn.Parameter(torch.zeros(2))
        # The constraint is a game: what the gates lower, its multipliers raise.
        self.multipliers.register_hook(torch.neg)

    def groups(self, model):
        """Gates and multipliers at a pace of their own."""
        return [
            {"params": list(self.parameters()), "lr": self.method.gate_lr},
            {"params": list(model.parameters())},
        ]

    def at(self, site, view, memory):
        """Fade tokens by the gate of their bin, drawn once per forward."""
        if "gates" not in memory:
            drawn = [
                relax.hard_concrete(part, TEMPERATURE, self.generator) for part in (self.bins, self.layers)
            ]
            memory |= {"gates": drawn, "alive": view.real[:, 1:], "received": [], "real": view.real}
        bins, layers = (part[site.layer - self.begins] for part in memory["gates"])
        taught, alive = site.layer - 1 in self.taught, memory["alive"]
        # Where nothing asks for a gradient, none of what it needs is kept: several maps of attention.
        with nullcontext() if taught else torch.no_grad():
            received = self.method.received(view)
        if taught:
            memory["received"].append(received)
        gate = torch.cat([bins, bins.new_zeros(1)])[self.method.binned(received[:, 1:].detach(), alive)]
        prunes = relax.straight_through((layers > 0).float(), layers)
        kept = (1 - (1 - gate) * prunes) * alive
        memory["alive"] = kept.detach() > 0
        return view.hidden * functional.pad(kept, (1, 0), value=1.0).unsqueeze(2)

    def expected(self):
        """The mean fraction of tokens entering a sublayer, with a gradient."""
        stays = relax.open_probability(self.bins, TEMPERATURE).mean(1)
        prunes = relax.open_probability(self.layers, TEMPERATURE)
        left = (1 - (1 - stays) * prunes).cumprod(0)
        return (self.begins + left.sum()) / self.depth

    def losses(self, outputs, labels, memory, dense):
        """The unpruned model's answers, the constraint, and the unpruned model's ranks in the first third."""
        method = self.method
        logits, attention = memory["teacher"](memory["inputs"])
        target = attention.column_sums(counted=memory["real"]).mean(1)
        missed = (1 - self.expected()) - (1 - self.keep) * self.tight
        first, second = self.multipliers
        soft = [(one / method.distillation).log_softmax(-1) for one in (outputs, logits)]
        answers = functional.kl_div(*soft, reduction="batchmean", log_target=True) * method.distillation**2
        ranked = sum(
            self.ranking(received[:, 1:], target[:, 1:], memory["real"][:, 1:])
            for received in memory["received"]
        )
        weight = method.ranking * max(0.01, 1 - self.tight)
        return {
            "answers": answers,
            "constraint": first * missed + second * missed**2,
            "ranks": weight * torch.as_tensor(ranked),
        }

    def ranking(self, received, target, real):
        """How far the order by `received` is from that of the `topk` best by `target`, all [B, N]: a scalar."""
        count = min(self.method.topk, real.shape[1])
        index = target.masked_fill(~real, -torch.inf).topk(count, dim=1).indices
        place = torch.arange(count, device=real.device)
        relevance = (real.sum(1, keepdim=True) - place).clamp_min(0).float()
        score = received.gather(1, index) * (relevance > 0)
        return (ranks.ranking_loss(score, relevance) / count**2).mean()

    def settle(self, done):
        """The budget tightens, and gates stay within what a gradient can move."""
        self.tight = min(1.0, done / self.method.ramp) if self.method.ramp else 1.0
        for logits in (self.bins, self.layers):
            logits.data.clamp_(*LIMITS)

    def state(self):
        """Which bins stay, [places, bins]: all but the expected number of closed gates; and how open each gate is."""
        with torch.no_grad():
            closed = (1 - relax.open_probability(self.bins, TEMPERATURE)).sum(1).round()
            prunes = relax.open_probability(self.layers, TEMPERATURE) >= 0.5
            worst = self.bins.shape[1] - 1 - ranks.rank(self.bins)
            kept = (worst >= closed.unsqueeze(1)) | ~prunes.unsqueeze(1)
            worth = self.bins + torch.where(prunes, 0.0, 1e3).unsqueeze(1)
        return {"keep": kept.float(), "worth": worth.clone()}
