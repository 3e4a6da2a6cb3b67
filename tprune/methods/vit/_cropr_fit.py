"""How cropr's queries are learned (section 3 of the paper): each feeds an auxiliary classifier, nothing flows back."""

from __future__ import annotations

import re

import torch
from torch import nn
from torch.nn import functional

from tprune.core.budget import Site
from tprune.methods.fit import Fit, Plan


class Croppers(Fit):
    """After every scored block a query, and a classifier of what it gathers; tokens leave as at inference.

    Args:
        method: Cropr.
        shape: of the model.
        counts: tokens left after each scored block.
        seed: of initial values.
    """

    def __init__(self, method, shape, counts, seed):
        super().__init__(shape)
        self.method, self.counts, self.tokens = method, counts, shape.tokens
        self.leaving = 0.0 if method.anneal else 1.0
        self.tunes = "all" if method.tune else "nothing"
        self.sites = tuple(Site(layer + 1) for layer in range(len(counts)))
        floor = min(1.0, method.min_lr / method.lr)
        self.plan = Plan(method.epochs, method.batch, method.lr, floor, method.warmup, method.weight_decay)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.queries = nn.Parameter(torch.empty(len(counts), 1, shape.width))
            nn.init.trunc_normal_(self.queries, a=-2, b=2)
            self.queries.data.mul_(shape.width**-0.5)
            self.mixers = nn.ModuleList(mixer(shape.width, method.mlp_ratio) for _ in counts)
            self.heads = nn.ModuleList(head(shape.width, shape.classes) for _ in counts)

    def at(self, site, view, memory):
        """Guess the class from the tokens as they are, without a gradient to them, then crop."""
        place = site.layer - 1
        query, tokens = self.queries[place], view.hidden.detach()
        seen = functional.scaled_dot_product_attention(query.expand(len(tokens), -1, -1), tokens, tokens)
        seen = seen.squeeze(1)
        seen = seen + self.mixers[place](seen)
        memory.setdefault("guesses", []).append(self.heads[place](seen))
        gone = round(self.leaving * (self.tokens - self.counts[place]))
        return self.method.crop(view, query.detach(), self.tokens - gone)

    def settle(self, done):
        """More leave, up to the budget; queries that know nothing would drop what later ones must see."""
        self.leaving = min(1.0, done / self.method.anneal) if self.method.anneal else 1.0

    def losses(self, outputs, labels, memory, dense):
        """Cross-entropy of the model and, summed, of all auxiliary heads."""
        smooth = self.method.smoothing
        task, *rest = (
            functional.cross_entropy(guess, labels, label_smoothing=smooth)
            for guess in (outputs, *memory["guesses"])
        )
        return {"task": task, "auxiliary": sum(rest)}

    def groups(self, model):
        """Lower learning rates the earlier a block is; no weight decay of vectors."""
        method, top = self.method, self.depth + 1
        exempt = getattr(model, "no_weight_decay", set)()
        groups, level = {}, 0
        for name, parameter in model.named_parameters():
            # What comes before the first block learns slowest, what comes after the last as fast as the heads.
            block = re.search(r"\.(\d+)\.", name)
            level = int(block[1]) + 1 if block else (top if level else 0)
            if parameter.requires_grad:
                decays = parameter.dim() > 1 and name not in exempt
                groups.setdefault((level, decays), []).append(parameter)
        for parameter in self.parameters():
            groups.setdefault(("own", parameter.dim() > 1), []).append(parameter)
        rates = {level: method.lr * method.layer_decay ** (top - level) for level in range(top + 1)}
        rates["own"] = method.query_lr or method.lr
        return [
            {
                "params": parameters,
                "lr": rates[level],
                "weight_decay": method.weight_decay * decays,
            }
            for (level, decays), parameters in groups.items()
        ]

    def state(self):
        """The queries, float [blocks, 1, D]."""
        return {"queries": self.queries.detach().clone()}


def mixer(width, ratio):
    """A pre-normalised MLP."""
    hidden = int(width * ratio)
    return nn.Sequential(
        nn.LayerNorm(width, eps=1e-6), nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width)
    )


def head(width, classes):
    """A linear classifier with a small start."""
    linear = nn.Linear(width, classes)
    nn.init.trunc_normal_(linear.weight, std=0.02)
    nn.init.zeros_(linear.bias)
    return nn.Sequential(nn.LayerNorm(width), linear)
