"""How FTP is fitted: a search for what every layer saves, the router, and the search once more, with the router.

A router that begins anywhere skips nearly everything, and the error of the output then says nothing: it begins as the
fixed one.

The model computes every token and keeps apart what those would be that pass a layer by; nothing attends to them there.
The output is compared from the last token of the prompt on, where every token goes through every layer, as in use.
"""

from __future__ import annotations

from itertools import islice
from random import Random

import torch
from torch import nn
from torch.nn import functional

from tprune.core.budget import Site
from tprune.core.levels import fittest, spread
from tprune.core.relax import gate, mask_attention
from tprune.core.select import best_of
from tprune.errors import UserError
from tprune.methods.fit import Fit, Plan, Relaxed
from tprune.methods.llm_context.ftp import factors, margin, routed

UNITS = 20
"""Levels of a layer's savings: a twentieth of the tokens each."""
EXCHANGES = 4
"""Of a mutation, at most."""
TAUGHT, TAUGHT_RATE = 300, 1e-2
"""Steps, on one step's text, in which the router learns the fixed one's choices before anything else (ours)."""


class Routing(Fit):
    """The router's two matrices learn; the model stands still."""

    answers = False
    keep_self = True
    epsilon = 1e-20

    def __init__(self, method, shape, keep, seed):
        super().__init__(shape)
        self.method, self.random = method, Random(seed)
        self.sites = tuple(Site(layer) for layer in range(1, shape.depth))
        self.plan = Plan(method.epochs, method.batch, method.lr)
        total = round((method.skipped if keep is None else 1 - keep) * shape.depth * UNITS)
        if not 0 < total <= (shape.depth - 1) * UNITS:
            given = f"--set skipped={method.skipped:g}" if keep is None else f"--keep {keep:g}"
            raise UserError(
                f"{given}: ftp learns to skip tokens in all layers but the first: give --keep from "
                f"{1 / shape.depth:.3f} to below 1"
            )
        self.levels = tuple(spread(total, [1] * len(self.sites)))
        self.searching, self.learned, self.guided = False, False, 1.0
        generator = torch.Generator().manual_seed(seed)
        self.first, self.second = (
            nn.Linear(width, out, device="meta").to_empty(device="cpu")
            for width, out in ((4, method.inner), (method.inner, 2))
        )
        for layer in (self.first, self.second):
            nn.init.kaiming_uniform_(layer.weight, generator=generator)
            nn.init.zeros_(layer.bias)

    def at(self, site, view, memory):
        """The tokens that pass the next layer by are marked: by the gates, or in a search by what is asked."""
        scores = memory["table"] = self.looked_up(view, memory)
        memory["whole"] = ~view.prunable
        total = view.prunable.sum(1)
        count = (total * (1 - self.levels[site.layer - 1] / UNITS)).round()
        wanted = best_of(self.method.fixed(scores, view.real), view.prunable, count)
        looked_at, target = factors(scores, view.real, 1 - count / total), (~wanted).long()[view.prunable]
        if self.searching and not self.learned:
            memory.setdefault("fixed", []).append((looked_at[view.prunable], target))
            return Relaxed(view.hidden, self.marked(wanted, view))
        logits = routed(dict(self.named_parameters()), looked_at)
        if self.searching:
            return Relaxed(view.hidden, self.marked(best_of(margin(logits), view.prunable, count), view))
        memory.setdefault("guides", []).append(functional.cross_entropy(logits[view.prunable], target))
        return Relaxed(view.hidden, self.marked(gate(margin(logits), 0.0, 1.0), view))

    @torch.no_grad()
    def looked_up(self, view, memory):
        """The attention that every token received when it last had any, as `FTP.reduce` has it: [B, N]."""
        if view.present is None:
            return view.attention.column_sums(counted=view.real).mean(1)
        there = view.present.detach()
        rows = mask_attention(view.attention.rows(), there, self.epsilon, self.keep_self)
        received = ((there * view.real).unsqueeze(1) @ rows.mean(1)).squeeze(1)
        return torch.where(there > 0, received, memory["table"])

    def marked(self, chosen, view):
        """1 for what is `chosen` and for what cannot leave."""
        return torch.where(view.prunable, chosen.to(view.hidden.dtype), 1.0)

    def losses(self, outputs, labels, memory, dense):
        """The error of the output behind the prompt, what is saved too little, and the fixed router's choices."""
        missing = [
            (level / UNITS - (1 - stage.count)).clamp_min(0)
            for level, stage in zip(self.levels, memory["left"], strict=True)
        ]
        return {
            "distillation": self.method.distillation * relative_error(outputs, dense(), memory["whole"]),
            "sparsity": self.method.constraint * torch.stack(missing).sum(),
            "guide": self.method.guide * self.guided * torch.stack(memory["guides"]).mean(),
        }

    def settle(self, done):
        """The guide fades."""
        self.guided = 1 - done

    def begin(self, forwards):
        """What every layer saves, by the fixed router; and the other one is taught what that does."""
        self.search(forwards)
        self.searching = True
        seen = next(forwards)
        self.searching = False
        looked_at, target = (torch.cat(parts) for parts in zip(*seen["fixed"], strict=True))
        optimizer = torch.optim.Adam(self.parameters(), lr=TAUGHT_RATE)
        for _ in range(TAUGHT):
            optimizer.zero_grad()
            functional.cross_entropy(routed(dict(self.named_parameters()), looked_at), target).backward()
            optimizer.step()

    def end(self, forwards):
        """And by the one that has learned."""
        self.learned = True
        self.search(forwards)

    @torch.no_grad()
    def search(self, forwards):
        """The division of the savings that changes least what stands behind the prompt."""
        self.searching = True
        found, nothing = self.levels, (0,) * len(self.levels)
        texts = [
            (seen["inputs"], seen["again"], seen["whole"]) for seen in islice(forwards, self.method.looks)
        ]

        def outputs(levels):
            self.levels = levels
            return [run(inputs) for inputs, run, _ in texts]

        exact, wholes = outputs(nothing), [whole for *_, whole in texts]

        def fitness(levels):
            errors = map(relative_error, outputs(levels), exact, wholes)
            return sum(float(error) for error in errors)

        sizes = self.method.population, self.method.generations
        self.levels = fittest(found, [(0, UNITS)] * len(found), fitness, *sizes, EXCHANGES, self.random)
        self.searching = False

    def state(self):
        """The router, and which fraction of the tokens enters each layer but the first."""
        weights = {name: tensor.detach().clone() for name, tensor in self.named_parameters()}
        return weights | {"schedule": 1 - torch.tensor(self.levels) / UNITS}


def relative_error(found, exact, whole):
    """‖found - exact‖² / ‖exact‖², a scalar: of both, [B, N, D], the tokens that are `whole`, bool [B, N].

    What skipped a layer is far from what it was, whatever is chosen, and would outweigh all else.
    """
    found, exact = found[whole].float(), exact.detach()[whole].float()
    return (found - exact).square().mean() / exact.square().mean()
